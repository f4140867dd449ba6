// csrc/cuda/cluster.cuh on the CPU: the blocks of a cluster run at once.
#pragma once

#include "async_copy.h"

#define PRUNELM_CLUSTERS 1

namespace prunelm::cuda {

inline uint32_t cluster_size() {
  return uint32_t(::cuda_emulation::here.block->cluster.blocks.size());
}
inline uint32_t cluster_rank() { return blockIdx.x % cluster_size(); }

inline void cluster_arrive() {
  ::cuda_emulation::Block& block = *::cuda_emulation::here.block;
  block.cluster_round[::cuda_emulation::here.number] = block.cluster.barrier.arrive();
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  ::cuda_emulation::Block& block = *::cuda_emulation::here.block;
  block.cluster.barrier.wait(block.cluster_round[::cuda_emulation::here.number]);
}
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

template <typename T>
T* map_shared(T* own, uint32_t rank) {
  ::cuda_emulation::Block& block = *::cuda_emulation::here.block;
  const auto offset = reinterpret_cast<unsigned char*>(own) - block.shared.get();
  if (offset < 0 || size_t(offset) >= block.shared_bytes) {
    throw std::runtime_error("an address outside dynamic shared memory");
  }
  return reinterpret_cast<T*>(block.cluster.blocks.at(rank)->shared.get() + offset);
}

inline void mbarrier_publish() {}

inline void mbarrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  emulation::arrive(barrier, bytes);
}

inline void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  emulation::arrive(map_shared(barrier, rank));
}

inline void copy_to_cluster(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                            uint16_t blocks) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(shared) % 16 ||
      reinterpret_cast<uintptr_t>(global) % 16) {
    throw std::runtime_error("a misaligned copy");
  }
  if (blocks >> cluster_size()) throw std::runtime_error("a copy to a block that is not there");
  emulation::Copies& copies = emulation::here.block->copies[emulation::here.number];
  for (uint32_t rank = 0; rank < cluster_size(); ++rank) {
    if (blocks >> rank & 1) {
      copies.tell(map_shared(static_cast<unsigned char*>(shared), rank), global, bytes,
                  map_shared(barrier, rank));
    }
  }
}

}  // namespace prunelm::cuda
