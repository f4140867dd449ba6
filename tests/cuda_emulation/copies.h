// Asynchronous copies and the barriers in shared memory that learn of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

namespace cuda_emulation {

// An mbarrier's word: the arrivals that its phase still misses, those that a phase needs, the
// parity and, offset so that it may be below zero for a while, the bytes that are expected.
constexpr int kNeeded = 12, kParity = 24, kExpected = 25;
constexpr uint64_t kMissing = (uint64_t{1} << kNeeded) - 1, kNoBytes = uint64_t{1} << 30;

inline uint64_t mbarrier_word(uint64_t count) {
  return count | count << kNeeded | kNoBytes << kExpected;
}

// `arrivals` come, and `bytes` more are expected.
inline void change(uint64_t* barrier, int arrivals, int64_t bytes) {
  std::atomic_ref<uint64_t> word(*barrier);
  uint64_t old = word.load(), next;
  do {
    next = old - arrivals + (uint64_t(bytes) << kExpected);
    if ((next & kMissing) == 0 && next >> kExpected == kNoBytes) {
      next = (next ^ uint64_t{1} << kParity) | (next >> kNeeded & kMissing);
    }
  } while (!word.compare_exchange_weak(old, next));
}
inline void arrive(uint64_t* barrier, int64_t bytes = 0) { change(barrier, 1, bytes); }

// A thread's asynchronous copies. Each lands as late as a GPU may let it: when its thread waits for
// its group, or, where an mbarrier was told of it, before its thread waits for anything.
class Copies {
 public:
  void ask(void* to, const void* from, size_t bytes) {
    asked_.push_back({to, from, bytes, group_});
  }
  void close_group() { ++group_; }
  void arrive_after(uint64_t* barrier) { barriers_.push_back(barrier); }
  void tell(void* to, const void* from, size_t bytes, uint64_t* barrier) {
    bulk_.push_back({to, from, bytes, barrier});
  }

  void land(uint64_t pending_groups) {
    std::vector<Copy> pending;
    for (const Copy& copy : asked_) {
      if (copy.group + pending_groups >= group_) {
        pending.push_back(copy);
      } else if (copy.from) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    asked_ = std::move(pending);
  }

  void land_deferred() {
    for (const Bulk& copy : bulk_) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      change(copy.barrier, 0, -int64_t(copy.bytes));
    }
    bulk_.clear();
    if (barriers_.empty()) return;
    close_group();
    land(0);
    for (uint64_t* barrier : barriers_) arrive(barrier);
    barriers_.clear();
  }

  bool none() const { return asked_.empty(); }

 private:
  struct Copy {
    void* to;
    const void* from;  // nullptr: zeros
    size_t bytes;
    uint64_t group;
  };
  struct Bulk {
    void* to;
    const void* from;
    size_t bytes;
    uint64_t* barrier;
  };
  std::vector<Copy> asked_;
  std::vector<Bulk> bulk_;
  std::vector<uint64_t*> barriers_;
  uint64_t group_ = 0;  // the open one
};

}  // namespace cuda_emulation
