// Numbers as the linear kernels' loops see them: 16-bit formats, vectors, loads that widen and
// stores that narrow. Included by *_simd.cpp only: everything here is compiled once per instruction
// set and must stay private to that object.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/number.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace prunelm::PRUNELM_ISA {
namespace {

#define PRUNELM_INLINE inline __attribute__((always_inline))

template <int value_>
struct Constant {
  static constexpr int value = value_;
};

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

template <typename W>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename W>
using Compute = typename ComputeType<W>::type;

template <typename C, int bytes>
struct VectorOf {
  typedef C type __attribute__((vector_size(bytes)));
};
template <typename C>
using Vector = typename VectorOf<C, 32>::type;
// As wide as the registers.
#if defined(__AVX512F__)
constexpr int kWideBytes = 64;
#else
constexpr int kWideBytes = 32;
#endif
template <typename C>
using Wide = typename VectorOf<C, kWideBytes>::type;

template <typename To, typename From>
PRUNELM_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

PRUNELM_INLINE float widen(float x) { return x; }
PRUNELM_INLINE double widen(double x) { return x; }
PRUNELM_INLINE float widen(Bf16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
PRUNELM_INLINE float widen(Fp16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t rest = uint32_t{x.bits & 0x7fffu} << 13;
  if (rest >= 0x7c00u << 13) return bits_as<float>(sign | 0x7f800000u | rest);
  // 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal, exactly.
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(rest) * 0x1p112f));
}

PRUNELM_INLINE void narrow(float x, float* out) { *out = x; }
PRUNELM_INLINE void narrow(double x, double* out) { *out = x; }
PRUNELM_INLINE void narrow(float x, Bf16* out) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1);  // to nearest, ties to even
  out->bits = uint16_t((x != x ? bits | 0x400000u : rounded) >> 16);
}
PRUNELM_INLINE void narrow(float x, Fp16* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u;
  } else if (size >= 0x47800000u) {  // 65536 and more
    half = 0x7c00u;
  } else if (size < 0x38800000u) {  // subnormal: adding 0.5 rounds at the last bit that fp16 keeps
    half = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000u;
  } else {
    half = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1)) >> 13;  // may carry into infinity
  }
  out->bits = uint16_t(sign | half);
#endif
}

template <typename V>
PRUNELM_INLINE V fused(V a, V b, V sum) {
#if defined(__FMA__)
  if constexpr (__is_same(V, Vector<float>)) return _mm256_fmadd_ps(a, b, sum);
#endif
#if defined(__AVX512F__)
  if constexpr (__is_same(V, Wide<float>)) return _mm512_fmadd_ps(a, b, sum);
#endif
  return a * b + sum;
}

template <typename V, typename C>
PRUNELM_INLINE V broadcast(C x) {
  return x - V{};
}

// A vector of numbers from p, widened.
template <typename V, typename W>
PRUNELM_INLINE V load(const W* p) {
  constexpr int kLanes = sizeof(V) / sizeof(Compute<W>);
  V out;
  if constexpr (sizeof(W) == sizeof(Compute<W>)) {
    std::memcpy(&out, p, sizeof(out));
    return out;
  }
  if constexpr (__is_same(W, Bf16)) {
    using Bits = typename VectorOf<uint32_t, sizeof(V)>::type;
    typename VectorOf<uint16_t, sizeof(V) / 2>::type half;
    std::memcpy(&half, p, sizeof(half));
    return bits_as<V>(__builtin_convertvector(half, Bits) << 16);
  }
#if defined(__AVX512F__)
  if constexpr (__is_same(W, Fp16) && kLanes == 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_maskz_cvtph_ps(0xffff, half);  // all lanes: gcc warns of the plain form
  }
#endif
#if defined(__AVX2__)
  if constexpr (__is_same(W, Fp16) && kLanes == 8) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
#endif
  for (int i = 0; i < kLanes; ++i) out[i] = widen(p[i]);
  return out;
}

#if defined(__AVX2__)
// Four numbers from p in every 16 bytes of a vector, and one of the four everywhere.
template <typename V>
PRUNELM_INLINE V load_four(const float* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(p));
#endif
  if constexpr (sizeof(V) == 32) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
}
template <int which, typename V>
PRUNELM_INLINE V splat(V four) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_maskz_permute_ps(0xffff, four, which * 0x55);
#endif
  if constexpr (sizeof(V) == 32) return _mm256_permute_ps(four, which * 0x55);
}
#endif

// The sum of a vector's numbers, halves first.
PRUNELM_INLINE float sum_of(Vector<float> x) {
  typedef float Half __attribute__((vector_size(16)));
  Half low, high;
  std::memcpy(&low, &x, 16);
  std::memcpy(&high, reinterpret_cast<const char*>(&x) + 16, 16);
  const Half four = low + high;
  return (four[0] + four[2]) + (four[1] + four[3]);
}
PRUNELM_INLINE double sum_of(Vector<double> x) { return (x[0] + x[2]) + (x[1] + x[3]); }
#if defined(__AVX512F__)
template <typename V>
PRUNELM_INLINE auto sum_of(V x)
  requires(sizeof(V) == 64)
{
  Vector<std::remove_cvref_t<decltype(x[0])>> half[2];
  std::memcpy(half, &x, sizeof(x));
  return sum_of(half[0] + half[1]);
}
#endif

// run(W{}) for the type that a Number names.
template <typename Run>
PRUNELM_INLINE void with_number(Number number, Run run) {
  switch (number) {
    case Number::f32:
      return run(float{});
    case Number::f64:
      return run(double{});
    case Number::bf16:
      return run(Bf16{});
    case Number::f16:
      return run(Fp16{});
  }
}

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
