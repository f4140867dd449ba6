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
  copies.asked.push_back({shared, valid ? global : nullptr, kBytes, copies.group});
  std::memset(shared, 0xFF, kBytes);
}

inline void cp_async_commit() { ++emulation::here.block->copies[emulation::here.number].group; }

template <int kPending>
void cp_async_wait() {
  emulation::Copies& copies = emulation::here.block->copies[emulation::here.number];
  std::vector<emulation::Copy> pending;
  for (const emulation::Copy& copy : copies.asked) {
    if (copy.group + kPending >= copies.group) {
      pending.push_back(copy);
    } else if (copy.from) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  copies.asked = std::move(pending);
}

}  // namespace prunelm::cuda
