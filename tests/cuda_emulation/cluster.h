// csrc/cuda/cluster.cuh on the CPU: the blocks of a cluster run at once.
#pragma once

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

}  // namespace prunelm::cuda
