// Copies from global to shared memory that go on while the thread does something else (sm_80's
// cp.async). A thread sees its own copies after cp_async_wait, others after a barrier behind it, or
// all see them when an mbarrier that was told of them has completed.
#pragma once

#include "cuda/device.cuh"

#ifdef CUDA_EMULATION
#include "async_copy.h"
#else

namespace prunelm::cuda {

// Copies kBytes (4, 8 or 16), to which both addresses are aligned; zeros where not `valid`, and
// `global` is not read then, but must be an address that could be.
template <int kBytes>
__device__ void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int size = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    // Past the first-level cache: weights are read once.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global),
                 "n"(kBytes), "r"(size)
                 : "memory");
  }
}

// Makes a group of the copies since the last one.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when all groups but the last kPending have arrived.
template <int kPending>
__device__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A barrier in shared memory for `count` arrivals a phase; phases are counted from 0. It is set up
// by one thread, with a __syncthreads before its first use.
__device__ inline void mbarrier_init(uint64_t* barrier, uint32_t count) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}

__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  [[maybe_unused]] uint64_t state;
  asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(state) : "r"(at) : "memory");
}

// Arrives once all copies that this thread has asked for so far have landed.
__device__ inline void mbarrier_arrive_after_copies(uint64_t* barrier) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at) : "memory");
}

// Returns when the phase has completed; it must be the one that runs or the one before.
__device__ inline void mbarrier_wait(uint64_t* barrier, uint32_t phase) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  uint32_t done = 0;
  while (!done) {
#if __CUDA_ARCH__ >= 900  // sleeps a while in hardware
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(at), "r"(phase & 1)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(at), "r"(phase & 1)
        : "memory");
#endif
  }
}

}  // namespace prunelm::cuda

#endif
