// Copies from global to shared memory that go on while the thread does something else (sm_80's
// cp.async). A thread sees its own copies after cp_async_wait, others after a barrier behind it.
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

}  // namespace prunelm::cuda

#endif
