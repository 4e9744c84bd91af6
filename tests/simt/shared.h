// Simulated shared memory: every access is checked for bounds, for bytes that no thread has written, and for races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

class SharedMemory {
 public:
  SharedMemory(const char* name, size_t bytes) : name_(name), bytes_(bytes), history_(bytes) {}

  // Each throws a fault, naming the array and the threads, for what a GPU leaves undefined.
  void read(int64_t offset, void* to, size_t bytes);
  void write(int64_t offset, const void* from, size_t bytes);

  // An asynchronous copy: from its start on a write of this thread's, to bytes that may not be touched until its end.
  void start_copy(int64_t offset, size_t bytes);
  void end_copy(int64_t offset, const void* from, size_t bytes);  // from null: zeros

 private:
  // Who touched a byte last: in which interval between barriers of the block, after how many __syncwarp of its own.
  struct Access {
    uint64_t interval = 0;
    int thread = -1;
    unsigned warp_syncs = 0;
  };
  // Two readers suffice: whoever writes next, one of them is another thread.
  struct History {
    Access write, read, other_read;
    bool copying = false;  // the write is a copy that nobody has waited for
  };

  std::string element(int64_t offset, size_t bytes) const;
  void check_bounds(const char* verb, int64_t offset, size_t bytes) const;
  void check_order(const char* verb, const Access& before, const char* before_verb, int64_t offset, size_t bytes) const;
  [[noreturn]] void fault_of_copy(const char* verb, const History& history, int64_t offset, size_t bytes) const;
  void note_write(int64_t offset, size_t bytes, bool copying);

  std::string name_;
  std::vector<std::byte> bytes_;
  std::vector<History> history_;
};

// The array that `key`, an address of its declaration's own, stands for in the running block.
SharedMemory& shared_memory(const void* key, const char* name, size_t bytes);
SharedMemory& dynamic_shared_memory();

// What shared_array[i] gives: reads as a T, and can be assigned.
template <class T>
class Element {
 public:
  Element(SharedMemory& memory, int64_t offset) : memory_(memory), offset_(offset) {}

  operator T() const {
    T value;
    memory_.read(offset_, &value, sizeof value);
    return value;
  }
  T operator=(T value) const {
    memory_.write(offset_, &value, sizeof value);
    return value;
  }
  T operator=(const Element& other) const { return *this = T(other); }
  T operator+=(T value) const { return *this = T(*this) + value; }

 private:
  SharedMemory& memory_;
  int64_t offset_;
};

// What takes a pointer's place.
template <class T>
class Shared {
 public:
  explicit Shared(SharedMemory& memory, int64_t offset = 0) : memory_(&memory), offset_(offset) {}

  Element<T> operator[](int64_t i) const { return {*memory_, offset_ + i * int64_t(sizeof(T))}; }
  Element<T> operator*() const { return (*this)[0]; }
  Shared operator+(int64_t i) const { return Shared(*memory_, offset_ + i * int64_t(sizeof(T))); }

  SharedMemory& memory() const { return *memory_; }
  int64_t offset() const { return offset_; }

 private:
  SharedMemory* memory_;
  int64_t offset_;
};

}  // namespace simt

#define LLMSYS_SHARED(T, name, size) \
  static char name##_key;            \
  const simt::Shared<T> name(simt::shared_memory(&name##_key, #name, (size) * sizeof(T)))
#define LLMSYS_DYNAMIC_SHARED(T, name) const simt::Shared<T> name(simt::dynamic_shared_memory())
