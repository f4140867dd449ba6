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
// Arrives for those who only wait until it has gone so far, as who has used all that it reads of
// others: what it wrote is not made seen, which takes as long as a write to global memory.
__device__ inline void cluster_arrive_relaxed() {
#if PRUNELM_CLUSTERS
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
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

// Makes mbarriers that this thread has set up known to the cluster; a barrier of the cluster
// follows, to which it may arrive relaxed.
__device__ inline void mbarrier_publish() {
#if PRUNELM_CLUSTERS
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives, and lets the phase wait for so many bytes of bulk copies beside.
__device__ inline void mbarrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
#if PRUNELM_CLUSTERS
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
#endif
}

// Arrives at the same barrier of block `rank`, to say that memory has been read. It has the scope
// of the own block, as CUTLASS's arrivals at other blocks: with the cluster's, which who publishes
// what it wrote needs, the compiler waits for all of the thread's accesses to global memory first.
__device__ inline void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank) {
#if PRUNELM_CLUSTERS
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(at),
      "r"(rank)
      : "memory");
#endif
}

// Copies `bytes` (a multiple of 16, as both addresses) to the same place in each block of `blocks`,
// a bit a rank, and tells the same barrier of each. One thread asks; where the architecture can
// multicast, memory is read once.
__device__ inline void copy_to_cluster(void* shared, const void* global, uint32_t bytes,
                                       uint64_t* barrier, uint16_t blocks) {
#if PRUNELM_CLUSTERS
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const auto told = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(global), "r"(bytes), "r"(told), "h"(blocks)
      : "memory");
#else
  for (uint32_t rank = 0; blocks >> rank; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    asm volatile(
        "{ .reg .b32 to, told; mapa.shared::cluster.u32 to, %0, %4; "
        "mapa.shared::cluster.u32 told, %3, %4; "
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[to], [%1], %2, [told]; }" ::"r"(to),
        "l"(global), "r"(bytes), "r"(told), "r"(rank)
        : "memory");
  }
#endif
#endif
}

}  // namespace prunelm::cuda

#endif
