// CUDA kernels on the CPU, for tests only: with this folder first on the include path, g++ builds a
// .cu file as it stands. Clusters of blocks run one after another; inside one each CUDA thread is a
// fiber (fast, and always in the same order, so that a missing barrier gives the same wrong result
// every time), or with CUDA_EMULATION_THREADS a std::thread (so that ThreadSanitizer reports it).
// Shared memory starts as 0xFF bytes, which are NaN. Not emulated: speed, partial warps and masks,
// poison in static __shared__ arrays, streams.
#pragma once

#include <math.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifdef CUDA_EMULATION_THREADS
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <ucontext.h>
#endif

#define CUDA_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulation {

constexpr unsigned kWarp = 32;

#ifndef CUDA_EMULATION_THREADS

// What the scheduler knows of the thread that runs; `blocked` says whether it has to wait.
struct Fiber {
  ucontext_t context{};
  std::vector<char> stack = std::vector<char>(1 << 16);
  std::function<bool()> blocked;
  bool done = false;
};
inline ucontext_t scheduler;
inline Fiber* running = nullptr;

#endif

void land_deferred();

#ifndef CUDA_EMULATION_THREADS

// Lets others run until `ready`.
template <typename Ready>
void block_until(Ready ready) {
  if (ready()) return;
  running->blocked = [ready] { return !ready(); };
  swapcontext(&running->context, &scheduler);
}

#endif

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
    if (missing_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      missing_.store(count_, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
#ifdef CUDA_EMULATION_THREADS
      syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
    }
    return round;
  }

  void wait(int round) {
    land_deferred();
#ifdef CUDA_EMULATION_THREADS
    while (round_.load(std::memory_order_acquire) == round) {
      syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
    }
#else
    block_until([this, round] { return round != round_; });
#endif
  }

 private:
  std::atomic<int> count_, missing_, round_ = 0;
};

struct Warp {
  Barrier barrier{kWarp};
  uint64_t slot[kWarp];
  uint32_t fragments[kWarp][6];  // of a matrix instruction
};

struct Block;

// Blocks that run at once.
struct Cluster {
  explicit Cluster(int threads) : barrier(threads) {}
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

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
    for (unsigned i = 0; i < threads / kWarp; ++i) warps.push_back(std::make_unique<Warp>());
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
  std::vector<std::unique_ptr<Warp>> warps;
};

struct Thread {
  Block* block;
  unsigned number;
  Warp& warp() const { return *block->warps[number / kWarp]; }
  unsigned lane() const { return number % kWarp; }
};
inline thread_local Thread here;

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

inline void fail(const char* why) {
  std::lock_guard lock(failure_mutex);
  failure = why;
}

// A thread that returns no longer counts at the barriers, as on a GPU. With its last thread a
// block's shared memory is gone, also for its neighbours in the cluster.
inline void run_thread(const std::function<void()>& kernel) {
  Block& block = *here.block;
  try {
    kernel();
  } catch (const std::exception& error) {
    fail(error.what());
  }
  land_deferred();
  if (!block.copies[here.number].none()) fail("copies that nobody waited for");
  if (--block.running == 0) std::memset(block.shared.get(), 0xFF, block.shared_bytes);
  block.barrier.leave();
  block.cluster.barrier.leave();
  here.warp().barrier.leave();
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

inline void fiber_main() {
  run_thread(*kernel_to_run);
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

inline void run_cluster(Cluster& cluster, const std::function<void()>& kernel) {
  static std::vector<std::unique_ptr<Fiber>> fibers;  // kept: their stacks cost more than the work
  const unsigned size = cluster.blocks[0]->threads, all = size * unsigned(cluster.blocks.size());
  while (fibers.size() < all) fibers.push_back(std::make_unique<Fiber>());
  kernel_to_run = &kernel;
  for (unsigned i = 0; i < all; ++i) {
    Fiber& fiber = *fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    fiber.done = false;
    fiber.blocked = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  unsigned done = 0;
  while (done < all) {
    bool progress = false;
    for (unsigned i = 0; i < all; ++i) {
      Fiber& fiber = *fibers[i];
      if (fiber.done || (fiber.blocked && fiber.blocked())) continue;
      fiber.blocked = nullptr;
      progress = true;
      running = &fiber;
      become(*cluster.blocks[i / size], i % size);
      swapcontext(&scheduler, &fiber.context);
      done += fiber.done;
    }
    if (!progress) {
      failure = "a barrier that only some threads reach";
      return;
    }
  }
}

#endif

template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xFFFFFFFFu) throw std::runtime_error("a warp mask that is not full");
  Warp& warp = here.warp();
  std::memcpy(&warp.slot[here.lane()], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  std::memcpy(&value, &warp.slot[source], sizeof(T));
  warp.barrier.arrive_and_wait();
  return value;
}

inline unsigned char* dynamic_shared() { return here.block->shared.get(); }

}  // namespace cuda_emulation

using std::max;
using std::min;

inline void __syncthreads() { cuda_emulation::here.block->barrier.arrive_and_wait(); }
inline void __syncwarp() { cuda_emulation::here.warp().barrier.arrive_and_wait(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned source) {
  return cuda_emulation::exchange(mask, value, source % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
  return cuda_emulation::exchange(mask, value, cuda_emulation::here.lane() ^ lanes);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = cuda_emulation::here.lane();
  return cuda_emulation::exchange(mask, value, lane + by < 32 ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    votes |= unsigned(cuda_emulation::exchange(mask, vote, lane)) << lane;
  }
  return votes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == ~0u; }

template <typename T>
T atomicAdd(T* where, T value) {
  return std::atomic_ref<T>(*where).fetch_add(value);
}
template <typename T>
T atomicMax(T* where, T value) {
  std::atomic_ref<T> target(*where);
  T old = target.load();
  while (old < value && !target.compare_exchange_weak(old, value)) {
  }
  return old;
}
template <typename T>
T atomicOr(T* where, T value) {
  return std::atomic_ref<T>(*where).fetch_or(value);
}

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
using cudaStream_t = void*;

namespace cuda_emulation {

// The device that is played; tests choose.
inline int compute_capability = 90;
inline int multiprocessors = 132;
inline size_t most_shared = 227 * 1024;

}  // namespace cuda_emulation

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_emulation::failure.c_str();
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = cuda_emulation::compute_capability;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_emulation::multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(cuda_emulation::most_shared);
  }
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = cuda_emulation::compute_capability;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, size = config->blockDim;
  const std::function<void()> call = [&] { kernel(arguments...); };
  std::string& failure = cuda_emulation::failure;
  failure.clear();
  const unsigned threads = size.x * size.y * size.z;
  unsigned together = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    const bool cluster = attribute.id == cudaLaunchAttributeClusterDimension;
    if (cluster) together = attribute.val.clusterDim.x;
    if (cluster && cuda_emulation::compute_capability < 90) failure = "a cluster below sm_90";
  }
  if (threads % cuda_emulation::kWarp) failure = "a block of broken warps";
  if (threads == 0 || threads > 1024) failure = "a block of no or more than 1024 threads";
  if (grid.x == 0 || grid.x % together) failure = "a grid that is no whole number of clusters";
  if (config->dynamicSmemBytes > cuda_emulation::most_shared) failure = "too much shared memory";
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t first = 0; first < blocks && failure.empty(); first += together) {
    cuda_emulation::Cluster cluster(int(together * threads));
    for (uint64_t i = first; i < first + together; ++i) {
      const dim3 index{unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                       unsigned(i / grid.x / grid.y)};
      cluster.blocks.push_back(std::make_unique<cuda_emulation::Block>(
          grid, size, index, config->dynamicSmemBytes, cluster));
    }
    cuda_emulation::run_cluster(cluster, call);
  }
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
