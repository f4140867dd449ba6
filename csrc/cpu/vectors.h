// The compiler's vectors, as wide as the instruction set's registers, and exp over them. Only for
// *_simd.cpp, which setup.py compiles once per instruction set.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

template <typename V, typename T>
inline void store(V x, T* to) {
  std::memcpy(to, &x, sizeof(x));
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
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask(std::bit_cast<__m512i>(mask), std::bit_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(std::bit_cast<__m256i>(mask), std::bit_cast<__m256i>(mask));
#else
  const auto words = std::bit_cast<Vec<int64_t>>(mask);
  return (words[0] | words[1]) != 0;
#endif
}

// A bit for each lane of a comparison, the first lane's lowest.
template <typename Mask>
inline uint64_t bits_of(Mask mask) {
  [[maybe_unused]] constexpr bool k32 = sizeof(mask[0]) == 4;
#if defined(__AVX512F__)
  const auto all = std::bit_cast<__m512i>(mask);
  return k32 ? _mm512_movepi32_mask(all) : _mm512_movepi64_mask(all);
#elif defined(__AVX2__)
  return uint64_t(k32 ? _mm256_movemask_ps(std::bit_cast<__m256>(mask))
                      : _mm256_movemask_pd(std::bit_cast<__m256d>(mask)));
#else
  uint64_t bits = 0;
  for (unsigned i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i) bits |= uint64_t(mask[i] & 1) << i;
  return bits;
#endif
}

template <int64_t first, typename V, int64_t... i>
inline auto lanes_of(V x, std::integer_sequence<int64_t, i...>) {
  return __builtin_shufflevector(x, x, (first + i)...);
}

// A vector's numbers made one by op, halves first: a chain of them would take four times as long.
template <typename T, int64_t lanes = kLanes<T>, typename V, typename Op>
inline T fold(V x, Op op) {
  if constexpr (lanes == 2) {
    return op(x[0], x[1]);
  } else {
    constexpr int64_t kHalf = lanes / 2;
    const std::make_integer_sequence<int64_t, kHalf> half{};
    return fold<T, kHalf>(op(lanes_of<0>(x, half), lanes_of<kHalf>(x, half)), op);
  }
}

// exp for -87 <= x <= 0: 2^n e^r with |r| <= ln(2) / 2, of which a polynomial that is 1 at 0 errs
// by 9.2e-8. Relative error below 2e-7 from -16 on, 4e-7 from -87 on.
inline Vec<float> exp_normal(Vec<float> x) {
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds
  const Vec<float> n = shifted - 12582912.0f;
#if defined(__FMA__)
  const Vec<float> r = x - n * 0.69314718246f;  // n is small: the rest of ln(2) is below 2.5e-7
#else
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
#endif
  Vec<float> p = r * 0.008290272206f + 0.041898161173f;
  p = p * r + 0.166676387191f;
  p = p * r + 0.499991476536f;
  p = p * r + 0.999999701977f;
  p = p * r + 1.0f;
  // The low bits of `shifted` are n's; they go to the exponent.
  return std::bit_cast<Vec<float>>(std::bit_cast<Ints>(p) + (std::bit_cast<Ints>(shifted) << 23));
}

// exp for x <= 0, and 0 below -87, where e^x leaves the normal numbers.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  const Vec<float> least = Vec<float>{} - 87.0f;
  return x > least ? exp_normal(x > least ? x : least) : Vec<float>{};
}

inline Vec<double> exp_nonpositive(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// exp for terms of a sum that has a 1 in it: what is below e^-87 may come out as that.
inline Vec<float> exp_summand(Vec<float> x) {
  const Vec<float> least = Vec<float>{} - 87.0f;
  return exp_normal(x > least ? x : least);
}

inline Vec<double> exp_summand(Vec<double> x) { return exp_nonpositive(x); }

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
