// CUDA threads, warps, blocks and clusters, and the barriers between them.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <climits>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "copies.h"

#ifdef CUDA_EMULATION_THREADS
#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#define CUDA_EMULATION_OWN thread_local
#else
#include "fiber.h"
#define CUDA_EMULATION_OWN
#endif

#ifdef CUDA_EMULATION_MEMCHECK
#include <valgrind/memcheck.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline CUDA_EMULATION_OWN dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulation {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = ~0u;
constexpr const char* kStuck = "a barrier that only some threads reach";

struct Warp;
struct Block;
struct Thread {
  Block* block;
  unsigned number;
  Warp& warp() const;
  unsigned lane() const { return number % kWarp; }
};
inline CUDA_EMULATION_OWN Thread here;

using Word = std::atomic<int>;

#ifndef CUDA_EMULATION_THREADS

// What the scheduler knows of a thread: it has to wait as long as *word == value, or until ready().
struct Fiber {
  Context context;
  const Word* word = nullptr;
  int value = 0;
  std::function<bool()> ready;
  bool done = false;

  bool blocked() const { return word ? *word == value : ready && !ready(); }
  void unblock() {
    word = nullptr;
    ready = nullptr;
  }
};
inline Context scheduler;
inline Fiber* running = nullptr;

// Lets others run until `ready`.
template <typename Ready>
void block_until(Ready ready) {
  if (ready()) return;
  running->ready = ready;
  running->context.switch_to(scheduler);
}

#endif

void land_deferred();

inline void wait_while(Word& word, int value, std::memory_order order) {
  land_deferred();
#ifdef CUDA_EMULATION_THREADS
  const timespec minute{60, 0};
  while (word.load(order) == value) {
    const long woken = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, &minute, nullptr, 0);
    if (woken < 0 && errno == ETIMEDOUT) throw std::runtime_error(kStuck);
  }
#else
  if (word.load(order) != value) return;
  running->word = &word;
  running->value = value;
  running->context.switch_to(scheduler);
#endif
}

inline void count_up(Word& word, std::memory_order order) {
  word.fetch_add(1, order);
#ifdef CUDA_EMULATION_THREADS
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
}

// Who waits learns from the one who arrives last, and from nobody else: std::barrier shares state
// between barriers and a mutex is passed from waiter to waiter, either of which hides races from
// ThreadSanitizer.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count), missing_(count) {}

  void arrive_and_wait() { wait(arrive()); }

  void leave() {
    --count_;
    arrive();
  }

  // In halves: the first says what the second has to wait for.
  int arrive() {
    const int round = round_.load(std::memory_order_relaxed);
    if (missing_.fetch_sub(1, std::memory_order_release) == 1) {
      missing_.load(std::memory_order_acquire);  // who is not last learns nothing by arriving
      missing_.store(count_, std::memory_order_relaxed);
      count_up(round_, std::memory_order_release);
    }
    return round;
  }

  void wait(int round) { wait_while(round_, round, std::memory_order_acquire); }

 private:
  Word count_, missing_, round_ = 0;
};

// A barrier of those lanes of a warp that a mask names; lanes that have returned are not waited
// for. Without `orders` they meet, but nobody learns what the others wrote: so do shuffles and
// votes. Each mask is a barrier of its own.
class LaneBarrier {
 public:
  explicit LaneBarrier(unsigned lanes) : gone_(lanes < kWarp ? kAllLanes << lanes : 0) {}

  // The lanes that met.
  unsigned arrive_and_wait(unsigned mask = kAllLanes, bool orders = true) {
    const unsigned lane = here.lane();
    if (!(mask >> lane & 1)) throw std::runtime_error("a warp mask without the lane that names it");
    if (mask != kAllLanes) split_.store(true, kRelaxed);
    for (unsigned other = 0; other < kWarp && split_.load(kRelaxed); ++other) {
      const unsigned theirs = waits_for_[other].load(kRelaxed);
      if (mask >> other & 1 && theirs >> lane & 1 && theirs != mask) {
        throw std::runtime_error("lanes that wait for each other with different masks");
      }
    }
    Group& group = group_of(mask);
    waits_for_[lane].store(mask, kRelaxed);
    const int round = round_[lane].load(kRelaxed);
    group.arrived.fetch_or(1u << lane, orders ? std::memory_order_acq_rel : kRelaxed);
    complete(group, orders);
    wait_while(round_[lane], round, orders ? std::memory_order_acquire : kRelaxed);
    return met_[lane].load(kRelaxed);
  }

  void leave() {
    gone_.fetch_or(1u << here.lane());
    for (Group& group : groups_) complete(group, true);
  }

 private:
  static constexpr auto kRelaxed = std::memory_order_relaxed;
  struct Group {
    std::atomic<unsigned> mask = 0, arrived = 0;  // mask 0: nobody's yet
  };

  Group& group_of(unsigned mask) {
    for (Group& group : groups_) {
      unsigned found = 0;
      if (group.mask.compare_exchange_strong(found, mask, kRelaxed) || found == mask) return group;
    }
    throw std::runtime_error("too many different warp masks");
  }

  void complete(Group& group, bool orders) {
    const unsigned mask = group.mask.load(kRelaxed);
    unsigned met = group.arrived.load(kRelaxed);
    while (met && ((met | gone_.load()) & mask) == mask) {
      if (!group.arrived.compare_exchange_weak(met, 0,
                                               orders ? std::memory_order_acq_rel : kRelaxed)) {
        continue;
      }
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (met >> lane & 1) waits_for_[lane].store(0, kRelaxed);
      }
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(met >> lane & 1)) continue;
        met_[lane].store(met, kRelaxed);
        count_up(round_[lane], orders ? std::memory_order_release : kRelaxed);
      }
      return;
    }
  }

  std::atomic<unsigned> gone_;
  std::atomic<bool> split_ = false;  // a mask was not full
  std::array<Group, 64> groups_;
  std::array<std::atomic<unsigned>, kWarp> waits_for_{}, met_{};  // of each lane
  std::array<Word, kWarp> round_{};
};

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  LaneBarrier barrier;
  uint64_t slot[kWarp];
  uint32_t fragments[kWarp][6];  // of a matrix instruction
  // What lanes show each other: with all lanes in two places by turns, so that one barrier does.
  std::atomic<uint64_t> shown[3][kWarp];
  unsigned turn[kWarp]{};
};

// Blocks that run at once.
struct Cluster {
  explicit Cluster(int threads) : barrier(threads) {}
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Block {
  Block(dim3 grid, dim3 size, dim3 index, size_t shared_bytes, Cluster& cluster)
      : grid(grid),
        size(size),
        index(index),
        threads(size.x * size.y * size.z),
        shared_bytes(shared_bytes),
        shared(new unsigned char[shared_bytes]),
        cluster(cluster),
        barrier(threads),
        running(threads),
        copies(threads),
        cluster_round(threads) {
    std::memset(shared.get(), 0xFF, shared_bytes);
#ifdef CUDA_EMULATION_MEMCHECK
    VALGRIND_MAKE_MEM_UNDEFINED(shared.get(), shared_bytes);
#endif
    for (unsigned i = 0; i < threads; i += kWarp) {
      warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - i)));
    }
  }
  dim3 grid, size, index;
  unsigned threads;
  size_t shared_bytes;
  std::unique_ptr<unsigned char[]> shared;  // as long as asked, for AddressSanitizer
  Cluster& cluster;
  Barrier barrier;
  std::atomic<unsigned> running;  // threads
  std::vector<Copies> copies;     // of each thread
  std::vector<int> cluster_round;
  std::atomic<int> votes = 0, votes_before = 0;  // of __syncthreads_count
  std::vector<std::unique_ptr<Warp>> warps;
};

inline Warp& Thread::warp() const { return *block->warps[number / kWarp]; }

inline void land_deferred() { here.block->copies[here.number].land_deferred(); }

// From now on this C++ thread runs the CUDA thread `number`.
inline void become(Block& block, unsigned number) {
  here = {&block, number};
  gridDim = block.grid;
  blockDim = block.size;
  blockIdx = block.index;
  threadIdx = {number % blockDim.x, number / blockDim.x % blockDim.y,
               number / blockDim.x / blockDim.y};
}

inline std::mutex failure_mutex;
inline std::string failure;  // of the launch that runs

inline void fail(const std::string& why) {
  std::lock_guard lock(failure_mutex);
  if (failure.empty()) failure = why;
}

// A thread that returns no longer counts at the barriers, as on a GPU. With its last thread a
// block's shared memory is gone, also for its neighbours in the cluster.
inline void end_thread() {
  Block& block = *here.block;
  land_deferred();
  if (!block.copies[here.number].none()) fail("copies that nobody waited for");
  if (--block.running == 0) std::memset(block.shared.get(), 0xFF, block.shared_bytes);
  block.barrier.leave();
  block.cluster.barrier.leave();
  here.warp().barrier.leave();
}

inline void run_thread(const std::function<void()>& kernel) {
  try {
    kernel();
  } catch (const std::exception& error) {
    fail(error.what());
  }
  end_thread();
}

#ifdef CUDA_EMULATION_THREADS

inline void run_cluster(Cluster& cluster, const std::function<void()>& kernel) {
  std::vector<std::thread> threads;
  for (const auto& block : cluster.blocks) {
    for (unsigned i = 0; i < block->threads; ++i) {
      threads.emplace_back([&block, &kernel, i] {
        become(*block, i);
        run_thread(kernel);
      });
    }
  }
  for (auto& thread : threads) thread.join();
}

#else

inline const std::function<void()>* kernel_to_run = nullptr;

[[noreturn]] inline void end_fiber() {
  running->done = true;
  running->context.switch_to(scheduler);
  __builtin_unreachable();
}

inline void fiber_main() {
  run_thread(*kernel_to_run);
  end_fiber();
}

inline void run_cluster(Cluster& cluster, const std::function<void()>& kernel) {
  static std::vector<std::unique_ptr<Fiber>> fibers;  // kept: their stacks cost more than the work
  const unsigned size = cluster.blocks[0]->threads, all = size * unsigned(cluster.blocks.size());
  while (fibers.size() < all) fibers.push_back(std::make_unique<Fiber>());
  kernel_to_run = &kernel;
  for (unsigned i = 0; i < all; ++i) {
    fibers[i]->context.start(fiber_main);
    fibers[i]->unblock();
    fibers[i]->done = false;
  }
  unsigned done = 0;
  while (done < all) {
    bool progress = false;
    for (unsigned i = 0; i < all; ++i) {
      Fiber& fiber = *fibers[i];
      if (fiber.done || fiber.blocked()) continue;
      fiber.unblock();
      progress = true;
      running = &fiber;
      become(*cluster.blocks[i / size], i % size);
      scheduler.switch_to(fiber.context);
      done += fiber.done;
    }
    if (!progress) {
      fail(kStuck);
      break;
    }
  }
  running = nullptr;
}

#endif

inline unsigned char* dynamic_shared() { return here.block->shared.get(); }

}  // namespace cuda_emulation
