// The compiler's vectors, as wide as the instruction set's registers, and exp over them. Only for
// *_simd.cpp, which setup.py compiles once per instruction set.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace prunelm::PRUNELM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kBytes = 32;
#else
constexpr int64_t kBytes = 16;
#endif

template <typename T>
using Vec [[gnu::vector_size(kBytes)]] = T;
using Ints = Vec<int32_t>;

template <typename T>
constexpr int64_t kLanes = kBytes / sizeof(T);

template <typename T>
inline Vec<T> load(const T* from) {
  Vec<T> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

// The last, incomplete vector; lanes past the end hold -inf.
template <typename T>
inline Vec<T> load_tail(const T* from, int64_t count) {
  Vec<T> x = Vec<T>{} - std::numeric_limits<T>::infinity();
  std::memcpy(&x, from, count * sizeof(T));
  return x;
}

template <typename Mask>
inline bool any(Mask mask) {
  constexpr int kWords = sizeof(Mask) / sizeof(int64_t);
  int64_t words[kWords];
  std::memcpy(words, &mask, sizeof(mask));
  int64_t found = 0;
  for (int i = 0; i < kWords; ++i) found |= words[i];
  return found != 0;
}

// exp for x <= 0: 2^n e^r with |r| <= ln(2) / 2, Taylor to order 6 (relative error below 2e-7).
// 0 below the smallest normal number.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  const Ints normal = x > -87.0f;
  const Vec<float> clamped = normal ? x : Vec<float>{} - 87.0f;
  const Vec<float> shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds
  const Ints exponent = std::bit_cast<Ints>(shifted) - std::bit_cast<int32_t>(12582912.0f);
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  Vec<float> p = r * (1.0f / 720.0f) + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return normal ? p * std::bit_cast<Vec<float>>((exponent + 127) << 23) : Vec<float>{};
}

inline Vec<double> exp_nonpositive(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
