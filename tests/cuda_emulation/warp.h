// Barriers, shuffles, votes and reductions, as the CUDA C++ guide describes them. What a lane reads
// that does not take part is 0xFF bytes.
#pragma once

#include "threads.h"

namespace cuda_emulation {

// What the lanes that met show each other.
template <typename T>
struct Shown {
  const std::atomic<uint64_t>* of;
  unsigned met;

  T operator[](unsigned lane) const {
    const uint64_t bits = met >> lane & 1 ? of[lane].load(std::memory_order_relaxed) : ~uint64_t{0};
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
  }
};

// Shows `value` to the lanes of the mask; read(shown) is what this lane takes of theirs.
template <typename T, typename Read>
auto exchange(unsigned mask, T value, Read read) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& warp = here.warp();
  const unsigned lane = here.lane();
  const bool all = mask == kAllLanes;
  std::atomic<uint64_t>* of = warp.shown[all ? warp.turn[lane]++ % 2 : 2];
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  of[lane].store(bits, std::memory_order_relaxed);
  const Shown<T> shown{of, warp.barrier.arrive_and_wait(mask, false)};
  const auto result = read(shown);
  if (!all) warp.barrier.arrive_and_wait(mask, false);
  return result;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source) {
  return exchange(mask, value, [source](const auto& shown) { return shown[source]; });
}

template <typename T, typename Combine>
T reduce(unsigned mask, T value, Combine combine) {
  return exchange(mask, value, [combine](const auto& shown) {
    T result = shown[std::countr_zero(shown.met)];
    for (unsigned lane = std::countr_zero(shown.met) + 1; lane < kWarp; ++lane) {
      if (shown.met >> lane & 1) result = combine(result, shown[lane]);
    }
    return result;
  });
}

// How many threads of the block vote yes; those that have returned do not vote.
inline int count_votes(bool vote) {
  Block& block = *here.block;
  if (vote) block.votes.fetch_add(1, std::memory_order_relaxed);
  block.barrier.arrive_and_wait();
  const int all = block.votes.load(std::memory_order_relaxed);
  const int count = all - block.votes_before.load(std::memory_order_relaxed);
  block.barrier.arrive_and_wait();
  block.votes_before.store(all, std::memory_order_relaxed);
  return count;
}

inline std::atomic<unsigned> fence = 0;

}  // namespace cuda_emulation

inline void __syncthreads() { cuda_emulation::here.block->barrier.arrive_and_wait(); }
inline int __syncthreads_count(int vote) { return cuda_emulation::count_votes(vote != 0); }
inline int __syncthreads_or(int vote) { return cuda_emulation::count_votes(vote != 0) != 0; }
inline int __syncthreads_and(int vote) { return cuda_emulation::count_votes(vote == 0) == 0; }
inline void __syncwarp(unsigned mask = ~0u) {
  cuda_emulation::here.warp().barrier.arrive_and_wait(mask);
}

// Orders everything before it before everything behind it, for whoever also makes one: as a
// read-modify-write of one word, since ThreadSanitizer knows no fences.
inline void __threadfence() { cuda_emulation::fence.fetch_add(1, std::memory_order_acq_rel); }
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = cuda_emulation::here.lane(), last = width - 1;
  return cuda_emulation::shuffle(mask, value, (lane & ~last) | (unsigned(source) & last));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = cuda_emulation::here.lane(), last = width - 1;
  return cuda_emulation::shuffle(mask, value, (lane & last) < by ? lane : lane - by);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = cuda_emulation::here.lane(), last = width - 1;
  return cuda_emulation::shuffle(mask, value, (lane & last) + by > last ? lane : lane + by);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned lane = cuda_emulation::here.lane(), last = width - 1;
  const unsigned source = lane ^ unsigned(lanes);
  return cuda_emulation::shuffle(mask, value, source > (lane | last) ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
  return cuda_emulation::exchange(mask, vote != 0, [](const auto& shown) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (shown.met >> lane & 1) votes |= unsigned(shown[lane]) << lane;
    }
    return votes;
  });
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, !vote) == 0; }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  return cuda_emulation::exchange(mask, value, [value](const auto& shown) {
    unsigned same = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (shown.met >> lane & 1) same |= unsigned(shown[lane] == value) << lane;
    }
    return same;
  });
}

// For int and unsigned, and the last three for unsigned.
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return cuda_emulation::reduce(mask, value, [](T a, T b) { return T(unsigned(a) + unsigned(b)); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return cuda_emulation::reduce(mask, value, [](T a, T b) { return b < a ? b : a; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return cuda_emulation::reduce(mask, value, [](T a, T b) { return a < b ? b : a; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return cuda_emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a & b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return cuda_emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return cuda_emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a ^ b; });
}
