// Activations of 8 numbers at once; float64 one by one. Included by *_simd.cpp only, as element.h.
#pragma once

#include <math.h>

#include <cstdint>

#include "cpu/element.h"

namespace prunelm::PRUNELM_ISA {
namespace {

using Floats = Vector<float>;
typedef int32_t Bits __attribute__((vector_size(32)));

// exp for x in [-87, 88]: 2^n e^r with |r| <= ln(2) / 2, Taylor to order 6 (relative error below
// 2e-7). NaN stays.
PRUNELM_INLINE Floats exp_of(Floats x) {
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds
  const Bits exponent = bits_as<Bits>(shifted) - bits_as<int32_t>(12582912.0f);
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  Floats p = r * (1.0f / 720.0f) + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits_as<Floats>((exponent + 127) << 23);
}

// erf, absolute error below 2e-7; polynomials fitted here, in x^2 up to 1 and for -log(erfc) above.
PRUNELM_INLINE Floats erf_of(Floats x) {
  const Bits sign = bits_as<Bits>(x) & int32_t(0x80000000);
  const Floats size = bits_as<Floats>(bits_as<Bits>(x) ^ sign);
  const Floats t = size < 4.0f ? size : Floats{} + 4.0f;  // 1 - erf(4) is 1.5e-8
  const Floats s = t * t;
  Floats low = s * 7.889119e-05f - 8.020841e-04f;
  low = low * s + 5.1895352e-03f;
  low = low * s - 2.6854444e-02f;
  low = low * s + 1.1283600e-01f;
  low = low * s - 3.7612626e-01f;
  low = low * s + 1.1283791f;
  low = low * t;
  Floats high = t * -1.855749e-04f + 2.9396159e-03f;
  high = high * t - 2.1805352e-02f;
  high = high * t + 1.0303744e-01f;
  high = high * t + 6.3822562e-01f;
  high = high * t + 1.1270400f;
  high = high * t + 3.5370889e-04f;
  high = 1.0f - exp_of(-high);
  return bits_as<Floats>(bits_as<Bits>(t < 1.0f ? low : high) | sign);
}

PRUNELM_INLINE Floats activated(Floats x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < 0.0f ? Floats{} : x;
    // Far below 0 both are 0: nothing that large is multiplied by how far it is. NaN stays.
    case Activation::gelu:
      x = x < -20.0f ? Floats{} - 20.0f : x;
      return 0.5f * x * (1.0f + erf_of(x * 0.70710678f));
    case Activation::silu: {
      x = x < -87.0f ? Floats{} - 87.0f : x;
      return x / (1.0f + exp_of(-(x > 87.0f ? Floats{} + 87.0f : x)));
    }
  }
  return x;
}

PRUNELM_INLINE double activated(double x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < 0 ? 0 : x;
    case Activation::gelu:
      x = x < -40 ? -40 : x;
      return 0.5 * x * (1 + erf(x * 0.70710678118654752));
    case Activation::silu:
      x = x < -700 ? -700 : x;
      return x / (1 + exp(-x));
  }
  return x;
}

PRUNELM_INLINE Vector<double> activated(Vector<double> x, Activation activation) {
  for (int i = 0; i < 4; ++i) x[i] = activated(x[i], activation);
  return x;
}

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
