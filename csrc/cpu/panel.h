// The inner loops of the linear kernels. Included by *_simd.cpp only: everything here is compiled
// once per instruction set and must stay private to that object.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "cpu/number.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Vectors are passed between inlined functions only, so that their ABI does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace prunelm::PRUNELM_ISA {
namespace {

#define PRUNELM_INLINE inline __attribute__((always_inline))

constexpr int kWidth = 16;    // outputs of a panel
constexpr int kPackRows = 8;  // rows that are packed side by side
constexpr int kTileRows = 6;  // rows of a tile: 6 x 16 float32 sums fill AVX2's registers

template <int value_>
struct Constant {
  static constexpr int value = value_;
};

// run(Constant<rows>{}) for 1 to 6 rows.
template <typename Run>
PRUNELM_INLINE void with_rows(int rows, Run run) {
  switch (rows) {
    case 1:
      return run(Constant<1>{});
    case 2:
      return run(Constant<2>{});
    case 3:
      return run(Constant<3>{});
    case 4:
      return run(Constant<4>{});
    case 5:
      return run(Constant<5>{});
    default:
      return run(Constant<6>{});
  }
}

// M rows as tiles of nearly equal size, since a small tile is as slow as a large one. Tiles are
// packed [K][8] each, and two that fit into eight lanes share them; one row is packed as it is.
struct Tiles {
  int64_t M, count, step;  // step: from one k to the next in a packed tile

  explicit Tiles(int64_t M)
      : M(M), count((M + kTileRows - 1) / kTileRows), step(M == 1 ? 1 : kPackRows) {}
  bool shared() const { return M <= kPackRows; }
  int64_t groups() const { return shared() ? M > 0 : count; }
  int64_t begin(int64_t t) const { return t * M / count; }
  int rows(int64_t t) const { return int(begin(t + 1) - begin(t)); }
  template <typename C>
  C* x(C* packed, int64_t t, int64_t K) const {
    return packed + (shared() ? begin(t) : t * K * step);
  }
};

// A sum runs over K in ascending order in registers and is added to the total in memory, and starts
// anew, at every multiple of kChunk and after at most kRun terms. The rule knows the pattern of
// stored blocks but not M, so a row's bits do not depend on M. Short runs lose fewer bits; chunks
// keep a panel's weights in the first-level cache while all tiles read them.
constexpr int64_t kRun = 64;
constexpr int64_t kChunk = 512;
constexpr int64_t kChunkRuns = 4;  // 16 KB of a panel's weights, which all tiles read

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

template <typename C>
struct VectorOf {
  typedef C type __attribute__((vector_size(32)));
};
template <typename C>
using Vector = typename VectorOf<C>::type;
template <typename C>
constexpr int kParts = kWidth * sizeof(C) / 32;

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

template <typename C>
PRUNELM_INLINE Vector<C> fused(Vector<C> a, Vector<C> b, Vector<C> sum) {
#if defined(__FMA__)
  if constexpr (sizeof(C) == 4) return _mm256_fmadd_ps(a, b, sum);
#endif
  return a * b + sum;
}

template <typename C>
PRUNELM_INLINE Vector<C> broadcast(C x) {
  if constexpr (sizeof(C) == 4) {
    return Vector<C>{x, x, x, x, x, x, x, x};
  } else {
    return Vector<C>{x, x, x, x};
  }
}

// 32 bytes' worth of numbers from p, widened.
template <typename W>
PRUNELM_INLINE Vector<Compute<W>> load(const W* p) {
  Vector<Compute<W>> out;
  if constexpr (sizeof(W) == sizeof(Compute<W>)) {
    std::memcpy(&out, p, sizeof(out));
  } else {
#if defined(__AVX2__)
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (__is_same(W, Fp16)) {
      out = _mm256_cvtph_ps(half);
    } else {
      out = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
#else
    for (int i = 0; i < 8; ++i) out[i] = widen(p[i]);
#endif
  }
  return out;
}

// R x 16 running sums.
template <int R, typename C>
struct Sums {
  Vector<C> part[R][kParts<C>];

  PRUNELM_INLINE void clear() {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int p = 0; p < kParts<C>; ++p) part[i][p] = Vector<C>{};
  }

  // sums[i][:] += a[i] * b[:]
  template <typename A, typename B>
  PRUNELM_INLINE void add(const A* a, int64_t a_row, const B* b) {
    Vector<C> wide[kParts<C>];
#pragma GCC unroll 4
    for (int p = 0; p < kParts<C>; ++p) wide[p] = load(b + p * (32 / sizeof(C)));
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vector<C> x = broadcast<C>(widen(a[i * a_row]));
#pragma GCC unroll 4
      for (int p = 0; p < kParts<C>; ++p) part[i][p] = fused<C>(x, wide[p], part[i][p]);
    }
  }

  // out[i * row + 0:16] = sums[i][:]
  PRUNELM_INLINE void put(C* out, int64_t row) const {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts<C>; ++p) {
        std::memcpy(out + i * row + p * (32 / sizeof(C)), &part[i][p], sizeof(part[i][p]));
      }
    }
  }

  // out[i * row + 0:16] += sums[i][:]
  PRUNELM_INLINE void add_to(C* out, int64_t row) const {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts<C>; ++p) {
        C* const at = out + i * row + p * (32 / sizeof(C));
        const Vector<C> sum = load(at) + part[i][p];
        std::memcpy(at, &sum, sizeof(sum));
      }
    }
  }

  PRUNELM_INLINE void flush(C* out, int64_t row) {
    add_to(out, row);
    clear();
  }
};

#if defined(__AVX2__)
PRUNELM_INLINE void transpose(__m256 (&r)[8]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#endif

// out[k * out_row + i] = in[i * in_row + k] for i < rows <= 8 and k < count. Where fewer than 8
// rows are given, the lanes up to 8 hold copies of the last.
template <typename X>
void pack_transposed(const X* in, int64_t in_row, int rows, int64_t count, Compute<X>* out,
                     int64_t out_row) {
  const X* row[kPackRows];
  for (int i = 0; i < kPackRows; ++i) row[i] = in + (i < rows ? i : rows - 1) * in_row;
  int64_t k = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(Compute<X>) == 4) {
    for (; k + 8 <= count; k += 8) {
      __m256 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = load(row[i] + k);
      transpose(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + (k + i) * out_row, r[i]);
    }
  }
#endif
  for (; k < count; ++k) {
    for (int i = 0; i < kPackRows; ++i) out[k * out_row + i] = widen(row[i][k]);
  }
}

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

// Tiles [begin, end) of x's rows, each [K][8] ([K] where x has one row).
[[maybe_unused]] void pack_tiles(const MatrixView& x, int64_t begin, int64_t end, void* packed) {
  with_number(x.number, [&](auto zero) {
    using X = decltype(zero);
    const auto* in = static_cast<const X*>(x.data);
    auto* out = static_cast<Compute<X>*>(packed);
    const Tiles tiles(x.rows);
    if (tiles.step == 1) {
      for (int64_t k = 0; k < x.columns; ++k) out[k] = widen(in[k]);
      return;
    }
    for (int64_t t = begin; t < end; ++t) {
      const int rows = tiles.shared() ? int(tiles.M) : tiles.rows(t);
      pack_transposed(in + tiles.begin(t) * x.stride, x.stride, rows, x.columns,
                      out + t * x.columns * kPackRows, kPackRows);
    }
  });
}

// Rows side by side: up to 8 as [K][8], more in groups [K][16].
PRUNELM_INLINE int64_t lane_groups(int64_t M) { return (M + kWidth - 1) / kWidth; }

// Groups [begin, end) of them.
[[maybe_unused]] void pack_lanes(const MatrixView& x, int64_t begin, int64_t end, void* packed) {
  const int lanes = x.rows <= kPackRows ? kPackRows : kWidth;
  with_number(x.number, [&](auto zero) {
    using X = decltype(zero);
    for (int64_t t = begin; t < end; ++t) {
      for (int half = 0; half < lanes; half += kPackRows) {
        int64_t row = t * kWidth + half;
        if (row >= x.rows) row = x.rows - 1;
        const int rows = int(x.rows - row < kPackRows ? x.rows - row : kPackRows);
        pack_transposed(static_cast<const X*>(x.data) + row * x.stride, x.stride, rows, x.columns,
                        static_cast<Compute<X>*>(packed) + t * kWidth * x.columns + half, lanes);
      }
    }
  });
}

PRUNELM_INLINE float activated(float x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x > 0 || x != x ? x : 0;
    case Activation::gelu:
      return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
    case Activation::silu:
      return x / (1 + expf(-x));
  }
  return x;
}
PRUNELM_INLINE double activated(double x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x > 0 || x != x ? x : 0;
    case Activation::gelu:
      return 0.5 * x * (1 + erf(x * 0.70710678118654752));
    case Activation::silu:
      return x / (1 + exp(-x));
  }
  return x;
}

// values = activation(values + bias[n:n + count])
template <typename C>
PRUNELM_INLINE void add_bias(C* values, int64_t n, int64_t count, const LinearResult& y) {
  if (!y.bias) return;
  with_number(y.bias_number, [&](auto zero) {
    const auto* bias = static_cast<const decltype(zero)*>(y.bias) + n;
    for (int64_t i = 0; i < count; ++i) values[i] += C(widen(bias[i]));
  });
}

// How many of the outputs n to n + most y has.
PRUNELM_INLINE int64_t outputs_from(int64_t n, int64_t most, const LinearResult& y) {
  return y.columns - n < most ? y.columns - n : most;
}

// y[first:first + rows, n:n + count] = activation(sums [rows][16] + bias [16]).
template <typename C>
PRUNELM_INLINE void finish_rows(const C* sums, const C* bias, int64_t n, int64_t count,
                                int64_t first, int64_t rows, const LinearResult& y) {
  with_number(y.number, [&](auto zero) {
    using Y = decltype(zero);
    if constexpr (sizeof(Y) <= sizeof(C)) {
      for (int64_t m = 0; m < rows; ++m) {
        C row[kWidth];
        for (int i = 0; i < kWidth; ++i) row[i] = sums[m * kWidth + i] + bias[i];
        if (y.activation != Activation::none) {
          for (int64_t i = 0; i < count; ++i) row[i] = activated(row[i], y.activation);
        }
        Y* const out = static_cast<Y*>(y.data) + (first + m) * y.columns + n;
        if (count == kWidth) {
          for (int i = 0; i < kWidth; ++i) narrow(row[i], out + i);
        } else {
          for (int64_t i = 0; i < count; ++i) narrow(row[i], out + i);
        }
      }
    }
  });
}

// y[:, n:n + most] from sums [rows][16], as far as y has columns; most is at most 16.
template <typename C>
void finish_panel(const C* sums, int64_t n, int64_t most, const LinearResult& y) {
  const int64_t count = outputs_from(n, most, y);
  C bias[kWidth] = {};
  add_bias(bias, n, count, y);
  finish_rows(sums, bias, n, count, 0, y.rows, y);
}

// to [rows][16] = from [count][stride] turned over; the lanes past count hold anything.
template <typename C>
[[maybe_unused]] void turn(const C* from, int64_t stride, int count, int64_t rows, C* to) {
  for (int half = 0; half < count; half += kPackRows) {
    const int here = count - half < kPackRows ? count - half : kPackRows;
    pack_transposed(from + half * stride, stride, here, rows, to + half, kWidth);
  }
}

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
