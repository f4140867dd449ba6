// Atomic operations, which order nothing but themselves, as CUDA's. Of the suffixes for a scope
// there is _block; every scope is the widest here.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <type_traits>

namespace cuda_emulation {

constexpr auto kRelaxed = std::memory_order_relaxed;

// *where = next(*where); what was there before.
template <typename T, typename Next>
T update(T* where, Next next) {
  std::atomic_ref<T> target(*where);
  T old = target.load(kRelaxed);
  while (!target.compare_exchange_weak(old, next(old), kRelaxed)) {
  }
  return old;
}

template <typename T>
using Same = std::type_identity_t<T>;  // converted to the type that the address says

}  // namespace cuda_emulation

template <typename T>
T atomicAdd(T* where, cuda_emulation::Same<T> value) {
  return std::atomic_ref<T>(*where).fetch_add(value, cuda_emulation::kRelaxed);
}
template <typename T>
T atomicSub(T* where, cuda_emulation::Same<T> value) {
  return std::atomic_ref<T>(*where).fetch_sub(value, cuda_emulation::kRelaxed);
}
template <typename T>
T atomicMax(T* where, cuda_emulation::Same<T> value) {
  return cuda_emulation::update(where, [value](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* where, cuda_emulation::Same<T> value) {
  return cuda_emulation::update(where, [value](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicAnd(T* where, cuda_emulation::Same<T> value) {
  return std::atomic_ref<T>(*where).fetch_and(value, cuda_emulation::kRelaxed);
}
template <typename T>
T atomicOr(T* where, cuda_emulation::Same<T> value) {
  return std::atomic_ref<T>(*where).fetch_or(value, cuda_emulation::kRelaxed);
}
template <typename T>
T atomicExch(T* where, cuda_emulation::Same<T> value) {
  return std::atomic_ref<T>(*where).exchange(value, cuda_emulation::kRelaxed);
}
template <typename T>
T atomicCAS(T* where, cuda_emulation::Same<T> expected, cuda_emulation::Same<T> value) {
  std::atomic_ref<T>(*where).compare_exchange_strong(expected, value, cuda_emulation::kRelaxed);
  return expected;
}
// Counts up to `last`, then begins at 0 again.
inline unsigned atomicInc(unsigned* where, unsigned last) {
  return cuda_emulation::update(where, [last](unsigned old) { return old >= last ? 0 : old + 1; });
}

template <typename T>
T atomicAdd_block(T* where, cuda_emulation::Same<T> value) {
  return atomicAdd(where, value);
}
template <typename T>
T atomicMax_block(T* where, cuda_emulation::Same<T> value) {
  return atomicMax(where, value);
}
template <typename T>
T atomicOr_block(T* where, cuda_emulation::Same<T> value) {
  return atomicOr(where, value);
}
template <typename T>
T atomicCAS_block(T* where, cuda_emulation::Same<T> expected, cuda_emulation::Same<T> value) {
  return atomicCAS(where, expected, value);
}
