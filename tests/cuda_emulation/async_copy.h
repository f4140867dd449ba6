// csrc/cuda/async_copy.cuh on the CPU. A copy lands as late as a GPU may let it, when it is waited
// for; until then its target is 0xFF bytes, which are NaN.
#pragma once

namespace prunelm::cuda {

namespace emulation = ::cuda_emulation;

template <int kBytes>
void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  for (const void* at : {static_cast<const void*>(shared), global}) {
    if (reinterpret_cast<uintptr_t>(at) % kBytes) throw std::runtime_error("a misaligned copy");
  }
  emulation::Copies& copies = emulation::here.block->copies[emulation::here.number];
  copies.ask(shared, valid ? global : nullptr, kBytes);
  std::memset(shared, 0xFF, kBytes);
}

inline void cp_async_commit() {
  emulation::here.block->copies[emulation::here.number].close_group();
}

template <int kPending>
void cp_async_wait() {
  emulation::here.block->copies[emulation::here.number].land(kPending);
}

inline std::atomic_ref<uint64_t> word_of(uint64_t* barrier) {
  return std::atomic_ref<uint64_t>(*barrier);
}

inline void mbarrier_init(uint64_t* barrier, uint32_t count) {
  word_of(barrier).store(emulation::mbarrier_word(count));
}

inline void mbarrier_arrive(uint64_t* barrier) { emulation::arrive(barrier); }

inline void mbarrier_arrive_after_copies(uint64_t* barrier) {
  emulation::here.block->copies[emulation::here.number].arrive_after(barrier);
}

inline void mbarrier_wait(uint64_t* barrier, uint32_t phase) {
  emulation::land_deferred();
  const auto done = [barrier, phase] {
    return (word_of(barrier).load() >> emulation::kParity & 1) != (phase & 1);
  };
#ifdef CUDA_EMULATION_THREADS
  while (!done()) std::this_thread::yield();
#else
  emulation::block_until(done);
#endif
}

}  // namespace prunelm::cuda
