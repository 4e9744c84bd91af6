// Runs the blocks of a launch one after the other: schedules their threads and judges how they meet. Over 400 lines, as
// all of it reads and writes the state of the one block that runs.
#include <algorithm>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "ptx.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr size_t kSharedBytes = 48 << 10,
                 kMostSharedBytes = 163 << 10;  // of a block: without asking, and on sm_80 with

struct Kernel {
  size_t asked_bytes = 0, dynamic_bytes = 0;     // of dynamic shared memory: asked for, and of the last launch
  std::map<const void*, SharedMemory> declared;  // by key: the arrays that a thread has come to, in any launch
  size_t declared_bytes = 0;

  // Whether a block may have that much dynamic shared memory beside what is declared.
  bool has_room(size_t bytes) const {
    return declared_bytes <= kSharedBytes &&
           declared_bytes + bytes <= (asked_bytes > 0 ? kMostSharedBytes : kSharedBytes);
  }
};

struct Copy {  // asynchronous, to shared memory
  SharedMemory* to;
  int64_t offset;
  const void* from;  // null for zeros
  size_t bytes;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  bool waits;
  Site site;                       // of the wait
  unsigned mask;                   // of a wait for lanes
  void* brought;                   // to a meeting
  unsigned warp_syncs;             // meetings of lanes at __syncwarp
  std::vector<Copy> copies;        // not waited for
  std::vector<size_t> group_ends;  // of those, where each committed group ends
};

struct Meeting {  // lanes of one warp at one warp function
  Site site;
  unsigned mask, arrived;
};

struct Warp {
  std::vector<Meeting> meetings;  // of masks apart from each other
  unsigned exited;
};

std::mutex one_launch;  // what follows belongs to the launch that holds it
uint64_t seed = 0;
std::mt19937_64 random_order;
std::string skipped_file;
int skipped_line = 0;
std::string last_fault;

std::vector<std::unique_ptr<Thread>> threads;  // kept, for their stacks
std::vector<Warp> warps;
std::vector<int> ready;  // threads that can go on
int num_threads, current, num_exited, num_at_barrier;
const std::function<void()>* thread_body;
std::exception_ptr failure;

// Intervals between barriers are counted over all blocks and launches, so that no memory of an earlier one is mistaken.
uint64_t interval = 0, first_interval_of_block = 0;

std::map<const void*, Kernel> kernels;
Kernel* running = nullptr;
std::unique_ptr<SharedMemory> dynamic_shared;

std::string name_of(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string name_of(int thread) { return "thread " + name_of(threads[thread]->index); }

std::string name_of(const Site& site) {
  return std::string(site.function) + " (" + site.file + ":" + std::to_string(site.line) + ")";
}

std::string hex(unsigned mask) {
  char text[11];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

[[noreturn]] void fault(const std::string& what) {
  throw std::runtime_error("block " + name_of(blockIdx) + ", " + name_of(current) + ": " + what);
}

bool same_place(const Site& a, const Site& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

bool skipped(const Site& site) {
  return site.line == skipped_line && skipped_file == std::filesystem::path(site.file).filename();
}

void wait(const Site& site, unsigned mask) {
  Thread& thread = *threads[current];
  thread.waits = true;
  thread.site = site;
  thread.mask = mask;
  thread.fiber.suspend();
}

void wake(int thread) {
  threads[thread]->waits = false;
  ready.push_back(thread);
}

// The thread of the block that waits at a barrier.
int someone_at_barrier() {
  for (int t = 0; t < num_threads; ++t)
    if (threads[t]->waits && threads[t]->mask == 0) return t;
  return -1;
}

void leave_block() {
  Warp& warp = warps[current / kWarp];
  const unsigned bit = 1u << lane();
  for (const Meeting& meeting : warp.meetings)
    if (meeting.mask & bit)
      fault("exits, while lanes wait for it at " + name_of(meeting.site) + " with mask " + hex(meeting.mask));
  if (num_at_barrier > 0) {
    const int waiting = someone_at_barrier();
    fault("exits, while " + name_of(waiting) + " waits for it at " + name_of(threads[waiting]->site));
  }
  if (!threads[current]->copies.empty()) fault("exits, with asynchronous copies that it has not waited for");
  warp.exited |= bit;
  ++num_exited;
}

void run_thread() {
  try {
    (*thread_body)();
    leave_block();
  } catch (...) {
    failure = std::current_exception();
  }
  threads[current]->fiber.suspend();
}

[[noreturn]] void report_deadlock() {
  std::string waits;
  std::vector<Site> seen;
  for (int t = 0; t < num_threads; ++t) {
    const Thread& thread = *threads[t];
    if (!thread.waits) continue;
    if (std::any_of(seen.begin(), seen.end(), [&](const Site& site) { return same_place(site, thread.site); }))
      continue;
    seen.push_back(thread.site);
    waits += (waits.empty() ? "" : "; ") + name_of(t) + " at " + name_of(thread.site);
    if (thread.mask) waits += " with mask " + hex(thread.mask);
  }
  throw std::runtime_error("block " + name_of(blockIdx) + ": its threads wait for each other: " + waits);
}

void run_block() {
  first_interval_of_block = ++interval;
  num_exited = num_at_barrier = 0;
  warps.assign((num_threads + kWarp - 1) / kWarp, {});
  ready.resize(num_threads);
  for (int t = 0; t < num_threads; ++t) {
    Thread& thread = *threads[t];
    thread.fiber.reset(run_thread);
    thread.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    thread.waits = false;
    thread.warp_syncs = 0;
    thread.copies.clear();
    thread.group_ends.clear();
    ready[t] = t;
  }
  while (num_exited < num_threads) {
    if (ready.empty()) report_deadlock();
    std::swap(ready[random_order() % ready.size()], ready.back());
    current = ready.back();
    ready.pop_back();
    threadIdx = threads[current]->index;
    threads[current]->fiber.resume();
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
  }
}

bool valid(const cudaLaunchConfig_t& config, const Kernel& kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t block_threads = uint64_t(block.x) * block.y * block.z;
  return grid.x > 0 && grid.x <= 0x7fffffff && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535 &&
         block_threads > 0 && block_threads <= 1024 && block.z <= 64 && kernel.has_room(config.dynamicSmemBytes) &&
         (kernel.asked_bytes == 0 || config.dynamicSmemBytes <= kernel.asked_bytes);
}

#if defined(__SANITIZE_ADDRESS__)
void name_thread(const char*) {
  fprintf(stderr, "simt: in block %s, %s\n", name_of(blockIdx).c_str(), name_of(current).c_str());
}
#endif

}  // namespace

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  std::lock_guard<std::mutex> lock(one_launch);
  Kernel& asking = kernels[kernel];
  if (bytes < 0 || asking.declared_bytes + bytes > kMostSharedBytes) return cudaErrorInvalidValue;
  asking.asked_bytes = bytes;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  std::lock_guard<std::mutex> lock(one_launch);
  running = &kernels[kernel];
  if (!valid(config, *running)) return cudaErrorInvalidConfiguration;
#if defined(__SANITIZE_ADDRESS__)
  __asan_set_error_report_callback(name_thread);
#endif
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  num_threads = int(blockDim.x * blockDim.y * blockDim.z);
  while (int(threads.size()) < num_threads) threads.push_back(std::make_unique<Thread>());
  thread_body = &thread;
  running->dynamic_bytes = config.dynamicSmemBytes;
  dynamic_shared = std::make_unique<SharedMemory>("dynamic shared memory", config.dynamicSmemBytes);
  random_order.seed(seed);
  std::vector<uint64_t> blocks(uint64_t(gridDim.x) * gridDim.y * gridDim.z);
  for (uint64_t b = 0; b < blocks.size(); ++b) blocks[b] = b;
  std::shuffle(blocks.begin(), blocks.end(), random_order);
  try {
    for (uint64_t b : blocks) {
      blockIdx = {unsigned(b % gridDim.x), unsigned(b / gridDim.x % gridDim.y), unsigned(b / gridDim.x / gridDim.y)};
      run_block();
    }
  } catch (const std::exception& error) {
    last_fault = error.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

int lane() { return current % kWarp; }

void barrier(const Site& site) {
  if (skipped(site)) return;
  if (num_exited > 0) fault("reaches " + name_of(site) + ", but a thread of its block has exited");
  if (num_at_barrier > 0) {
    const int other = someone_at_barrier();
    if (!same_place(threads[other]->site, site))
      fault("reaches " + name_of(site) + ", while " + name_of(other) + " waits at " + name_of(threads[other]->site));
  }
  if (++num_at_barrier == num_threads) {
    ++interval;
    num_at_barrier = 0;
    for (int t = 0; t < num_threads; ++t)
      if (t != current) wake(t);
    ready.push_back(current);
    threads[current]->fiber.suspend();
  } else {
    wait(site, 0);
  }
}

void meet(const Site& site, unsigned mask, void* brought, const std::function<void(void* const*)>& together) {
  const int first = current - lane();
  Warp& warp = warps[current / kWarp];
  const unsigned bit = 1u << lane();
  const int lanes = std::min(kWarp, num_threads - first);
  auto misuse = [&](const std::string& why) { fault("calls " + name_of(site) + " with mask " + hex(mask) + why); };
  if (!(mask & bit)) misuse(", which leaves itself out");
  if (lanes < kWarp && mask >> lanes) misuse(", but its warp has " + std::to_string(lanes) + " lanes");
  if (mask & warp.exited) misuse(", but lanes " + hex(mask & warp.exited) + " have exited");

  threads[current]->brought = brought;
  auto meeting =
      std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](auto& m) { return (m.mask & mask) != 0; });
  if (meeting == warp.meetings.end()) {
    warp.meetings.push_back({site, mask, 0});
    meeting = warp.meetings.end() - 1;
  } else if (meeting->mask != mask || std::strcmp(meeting->site.function, site.function) != 0) {
    misuse(", while lanes " + hex(meeting->arrived) + " wait at " + name_of(meeting->site) + " with mask " +
           hex(meeting->mask));
  }
  meeting->arrived |= bit;
  if (meeting->arrived != mask) return wait(site, mask);
  warp.meetings.erase(meeting);
  void* brought_by[kWarp] = {};
  for (int l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1)) continue;
    brought_by[l] = threads[first + l]->brought;
    if (first + l != current) wake(first + l);
  }
  together(brought_by);
  ready.push_back(current);
  threads[current]->fiber.suspend();
}

uint64_t exchange(const Site& site, unsigned mask, uint64_t sent, int source) {
  if (!(mask >> source & 1))
    fault("calls " + name_of(site) + " with mask " + hex(mask) + " to read lane " + std::to_string(source) +
          ", which it leaves out");
  struct Message {
    uint64_t sent, received;
    int source;
  } mine{sent, 0, source};
  meet(site, mask, &mine, [=](void* const* lanes) {
    for (int l = 0; l < kWarp; ++l)
      if (auto* message = static_cast<Message*>(lanes[l]))
        message->received = static_cast<const Message*>(lanes[message->source])->sent;
  });
  return mine.received;
}

void copy_async(SharedMemory& memory, int64_t offset, const void* from, size_t bytes, bool there) {
  memory.start_copy(offset, bytes);
  threads[current]->copies.push_back({&memory, offset, there ? from : nullptr, bytes});
}

void commit_copies() { threads[current]->group_ends.push_back(threads[current]->copies.size()); }

void wait_for_copies(const Site& site, int newest) {
  if (skipped(site)) return;
  std::vector<Copy>& copies = threads[current]->copies;
  std::vector<size_t>& group_ends = threads[current]->group_ends;
  const int groups = int(group_ends.size()) - newest;
  if (groups <= 0) return;
  const size_t ended = group_ends[groups - 1];
  for (size_t i = 0; i < ended; ++i) copies[i].to->end_copy(copies[i].offset, copies[i].from, copies[i].bytes);
  copies.erase(copies.begin(), copies.begin() + ended);
  group_ends.erase(group_ends.begin(), group_ends.begin() + groups);
  for (size_t& end : group_ends) end -= ended;
}

SharedMemory& shared_memory(const void* key, const char* name, size_t bytes) {
  const auto [array, added] = running->declared.try_emplace(key, name, bytes);
  if (added) running->declared_bytes += bytes;
  if (!running->has_room(running->dynamic_bytes))
    fault(std::string("declares ") + name + ", which makes " + std::to_string(running->declared_bytes) +
          " bytes of shared memory beside the launch's " + std::to_string(running->dynamic_bytes) +
          ": more than a block has");
  return array->second;
}

SharedMemory& dynamic_shared_memory() { return *dynamic_shared; }

std::string SharedMemory::element(int64_t offset, size_t bytes) const {
  return name_ + "[" + std::to_string(offset / int64_t(bytes)) + "]";
}

void SharedMemory::check_bounds(const char* verb, int64_t offset, size_t bytes) const {
  if (offset < 0 || offset + int64_t(bytes) > int64_t(bytes_.size()))
    fault(std::string(verb) + " " + element(offset, bytes) + ", out of bounds: the array has " +
          std::to_string(bytes_.size() / bytes) + " elements");
  if (offset % int64_t(bytes) != 0)
    fault(std::string(verb) + " " + name_ + " at byte " + std::to_string(offset) + ", unaligned");
}

void SharedMemory::fault_of_copy(const char* verb, const History& history, int64_t offset, size_t bytes) const {
  fault(std::string(verb) + " " + element(offset, bytes) + ", to which " + name_of(history.write.thread) +
        " copies and has not waited");
}

// Accesses of two threads are in order if a barrier of the block lies between them, or a __syncwarp of their warp.
void SharedMemory::check_order(const char* verb, const Access& before, const char* before_verb, int64_t offset,
                               size_t bytes) const {
  if (before.interval != interval || before.thread == current) return;
  const bool same_warp = before.thread / kWarp == current / kWarp;
  if (same_warp && threads[current]->warp_syncs > before.warp_syncs) return;
  fault(std::string(verb) + " " + element(offset, bytes) + ", which " + name_of(before.thread) + " " + before_verb +
        ", with no barrier between");
}

void SharedMemory::read(int64_t offset, void* to, size_t bytes) {
  check_bounds("reads", offset, bytes);
  const Access now{interval, current, threads[current]->warp_syncs};
  for (size_t b = 0; b < bytes; ++b) {
    History& history = history_[offset + b];
    if (history.write.interval < first_interval_of_block)
      fault("reads " + element(offset, bytes) + ", which nobody has written");
    if (history.copying) fault_of_copy("reads", history, offset, bytes);
    check_order("reads", history.write, "wrote", offset, bytes);
    const bool first = history.read.interval != interval || history.read.thread == current;
    (first ? history.read : history.other_read) = now;
  }
  std::memcpy(to, &bytes_[offset], bytes);
}

void SharedMemory::write(int64_t offset, const void* from, size_t bytes) {
  note_write(offset, bytes, false);
  std::memcpy(&bytes_[offset], from, bytes);
}

void SharedMemory::start_copy(int64_t offset, size_t bytes) { note_write(offset, bytes, true); }

void SharedMemory::end_copy(int64_t offset, const void* from, size_t bytes) {
  for (size_t b = 0; b < bytes; ++b) history_[offset + b].copying = false;
  const std::byte zeros[16] = {};
  write(offset, from ? from : zeros, bytes);
}

void SharedMemory::note_write(int64_t offset, size_t bytes, bool copying) {
  check_bounds(copying ? "copies to" : "writes", offset, bytes);
  for (size_t b = 0; b < bytes; ++b) {
    History& history = history_[offset + b];
    const bool stale = history.write.interval < first_interval_of_block;
    if (history.copying && !stale) fault_of_copy("writes", history, offset, bytes);
    check_order("writes", history.write, "wrote", offset, bytes);
    check_order("writes", history.read, "read", offset, bytes);
    check_order("writes", history.other_read, "read", offset, bytes);
    history.write = {interval, current, threads[current]->warp_syncs};
    history.copying = copying;
  }
}

}  // namespace simt

void __syncwarp(unsigned mask, const char* file, int line) {
  simt::exchange({"__syncwarp", file, line}, mask, 0, simt::lane());
  ++simt::threads[simt::current]->warp_syncs;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return simt::last_fault.c_str();
  }
  return "unknown error";
}

void simt_seed(uint64_t seed) { simt::seed = seed; }

void simt_skip_barrier(const char* file, int line) {
  simt::skipped_file = file;
  simt::skipped_line = line;
}
