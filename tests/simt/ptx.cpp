#include "ptx.h"

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Row {
  const uint16_t* row;
  uint32_t* pairs;
};

void give_matrices(void* const* lanes, bool transposed) {
  for (int lane = 0; lane < kWarp; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t pair = 0;
      for (int i = 0; i < 2; ++i) {
        const int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
        pair |= uint32_t(static_cast<const Row*>(lanes[matrix * 8 + row])->row[column]) << 16 * i;
      }
      static_cast<Row*>(lanes[lane])->pairs[matrix] = pair;
    }
}

float widen(uint16_t bits, bool halves) {
  return halves ? __half2float({bits}) : __bfloat162float(__nv_bfloat16{bits});
}

struct Operands {
  float* sums;
  const uint32_t *a, *b;
};

// sums += A B, 16 x 16 times 16 x 8. Each sum is rounded once; tensor cores cut off bits instead, how many is not told.
void multiply(void* const* lanes, bool halves) {
  double a[16][16], b[16][8], sums[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Operands& given = *static_cast<const Operands*>(lanes[lane]);
    const int row = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int part = 0; part < 4; ++part)
        a[row + part % 2 * 8][pair + part / 2 * 8 + i] = widen(uint16_t(given.a[part] >> 16 * i), halves);
      for (int part = 0; part < 2; ++part)
        b[pair + part * 8 + i][row] = widen(uint16_t(given.b[part] >> 16 * i), halves);
      for (int part = 0; part < 2; ++part) sums[row + part * 8][pair + i] = given.sums[part * 2 + i];
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int part = 0; part < 2; ++part)
      for (int i = 0; i < 2; ++i)
        static_cast<Operands*>(lanes[lane])->sums[part * 2 + i] = float(sums[lane / 4 + part * 8][lane % 4 * 2 + i]);
}

}  // namespace

void exchange_matrices(const Site& site, const uint16_t (&row)[8], bool transposed, uint32_t (&pairs)[4]) {
  Row mine{row, pairs};
  meet(site, kAllLanes, &mine, [=](void* const* lanes) { give_matrices(lanes, transposed); });
}

void multiply_matrices(const Site& site, bool halves, float (&sums)[4], const uint32_t (&a)[4],
                       const uint32_t (&b)[2]) {
  Operands mine{sums, a, b};
  meet(site, kAllLanes, &mine, [=](void* const* lanes) { multiply(lanes, halves); });
}

}  // namespace simt
