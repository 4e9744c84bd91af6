// Products of small matrices on simulated tensor cores against sums of plain loops: prints "right" or what is not.
#include <cstdio>
#include <memory>

#include "device.cuh"

using namespace llmsys::cuda;

constexpr int kRows = 16, kInner = 16, kColumns = 16;

using Chunk = Vector<uint16_t, 8>;

// Which element of a fragment a lane holds, word for word as PTX ISA 9.0, section 9.7.14.5.8, has it.
struct Place {
  int row, column;
};
__device__ Place place_in_a(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  return {(i >= 0 && i < 2) || (i >= 4 && i < 6) ? group : group + 8, thread_in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
__device__ Place place_in_b(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  return {thread_in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), group};
}
__device__ Place place_in_c(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  return {i < 2 ? group : group + 8, thread_in_group * 2 + (i & 1)};
}

// c += a b with the fragments made element by element; `c` has kColumns columns, of which the first 8 are made so.
template <class T>
__global__ void by_elements(const T* a, const T* b, float* c) {
  const int lane = threadIdx.x;
  uint32_t a_pairs[4] = {}, b_pairs[2] = {};
  float sums[4];
  for (int i = 0; i < 8; ++i) {
    const Place at = place_in_a(lane, i);
    a_pairs[i / 2] |= uint32_t(a[at.row * kInner + at.column].bits) << 16 * (i % 2);
  }
  for (int i = 0; i < 4; ++i) {
    const Place at = place_in_b(lane, i);
    b_pairs[i / 2] |= uint32_t(b[at.row * kColumns + at.column].bits) << 16 * (i % 2);
  }
  for (int i = 0; i < 4; ++i) sums[i] = c[place_in_c(lane, i).row * kColumns + place_in_c(lane, i).column];
  mma<T>(sums, a_pairs, b_pairs);
  for (int i = 0; i < 4; ++i) c[place_in_c(lane, i).row * kColumns + place_in_c(lane, i).column] = sums[i];
}

// c += a b through shared memory and ldmatrix, b as it is or, with kTransposed, given by its columns.
template <class T, bool kByColumns>
__global__ void by_matrices(const T* a, const T* b, float* c) {
  LLMSYS_SHARED(Chunk, left, kRows * 2);
  LLMSYS_SHARED(Chunk, right, kInner * 2);
  const int lane = threadIdx.x;
  copy_async(left + lane, reinterpret_cast<const Chunk*>(a) + lane, true);
  copy_async(right + lane, reinterpret_cast<const Chunk*>(b) + lane, true);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  uint32_t a_pairs[4], b_pairs[4];
  ldmatrix<false>(a_pairs, left + ((lane % 16) * 2 + lane / 16));
  if (kByColumns)
    ldmatrix<false>(b_pairs, right + ((lane % 8 + lane / 16 * 8) * 2 + lane / 8 % 2));
  else
    ldmatrix<true>(b_pairs, right + ((lane % 16) * 2 + lane / 16));
  for (int half = 0; half < 2; ++half) {
    const uint32_t of_half[2] = {b_pairs[half * 2], b_pairs[half * 2 + 1]};
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = c[place_in_c(lane, i).row * kColumns + place_in_c(lane, i).column + half * 8];
    mma<T>(sums, a_pairs, of_half);
    for (int i = 0; i < 4; ++i) c[place_in_c(lane, i).row * kColumns + place_in_c(lane, i).column + half * 8] = sums[i];
  }
}

// Small whole numbers, whose sums are exact.
int left_at(int row, int inner) { return (row * 7 + inner * 13) % 23 - 11; }
int right_at(int inner, int column) { return (inner * 5 + column * 11) % 19 - 9; }
int before_at(int row, int column) { return row - 2 * column; }

template <class T>
bool check(const char* name, void (*kernel)(const T*, const T*, float*), bool by_columns, int columns) {
  alignas(16) T a[kRows * kInner], b[kInner * kColumns];
  float c[kRows * kColumns];
  for (int i = 0; i < kRows * kInner; ++i) a[i] = from_float<T>(float(left_at(i / kInner, i % kInner)));
  for (int i = 0; i < kInner * kColumns; ++i)
    b[i] = from_float<T>(float(by_columns ? right_at(i % kInner, i / kInner) : right_at(i / kColumns, i % kColumns)));
  for (int i = 0; i < kRows * kColumns; ++i) c[i] = float(before_at(i / kColumns, i % kColumns));
  launch(name, {dim3(1), dim3(kWarp)}, nullptr, kernel, static_cast<const T*>(a), static_cast<const T*>(b),
         static_cast<float*>(c));
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kColumns; ++column) {
      int expected = before_at(row, column);
      for (int inner = 0; inner < kInner && column < columns; ++inner)
        expected += left_at(row, inner) * right_at(inner, column);
      if (c[row * kColumns + column] == float(expected)) continue;
      std::printf("%s [%d, %d] is %g, not %d\n", name, row, column, c[row * kColumns + column], expected);
      return false;
    }
  return true;
}

template <class T>
bool check_all() {
  return check<T>("by elements", by_elements<T>, false, 8) && check<T>("by rows", by_matrices<T, false>, false, 16) &&
         check<T>("by columns", by_matrices<T, true>, true, 16);
}

int main() {
  if (check_all<__half>() && check_all<__nv_bfloat16>()) std::puts("right");
  return 0;
}
