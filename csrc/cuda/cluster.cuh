// Thread-block clusters (sm_90): neighbouring blocks that run at once and read each other's shared
// memory. A kernel that is launched as one keeps all its shared memory in dynamic_shared().
#pragma once

#include "cuda/device.cuh"

#ifdef CUDA_EMULATION
#include "cluster.h"
#else

namespace prunelm::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PRUNELM_CLUSTERS 1
#else
#define PRUNELM_CLUSTERS 0  // the kernel is compiled, and never launched, for this architecture
#endif

// Which block of its cluster this is, and of how many.
__device__ inline uint32_t cluster_rank() {
  uint32_t rank = 0;
#if PRUNELM_CLUSTERS
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ inline uint32_t cluster_size() {
  uint32_t size = 1;
#if PRUNELM_CLUSTERS
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

// A barrier of all threads of the cluster in two halves: what they wrote before they arrived, in
// anybody's shared memory, is seen by all who waited.
__device__ inline void cluster_arrive() {
#if PRUNELM_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if PRUNELM_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The same place in the shared memory of block `rank`. That block must still run when it is read:
// nobody leaves before a last cluster_sync.
template <typename T>
__device__ T* map_shared(T* own, uint32_t rank) {
#if PRUNELM_CLUSTERS
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(mapped)
               : "l"(reinterpret_cast<uint64_t>(own)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  return own;
#endif
}

}  // namespace prunelm::cuda

#endif
