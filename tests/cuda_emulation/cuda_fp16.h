// __half and __half2 with what kernels use of CUDA's header; test only.
#pragma once

#include <bit>
#include <cstdint>

#include "device_functions.h"

struct __half {
  _Float16 value;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half __ushort_as_half(unsigned short x) { return std::bit_cast<__half>(x); }
inline unsigned short __half_as_ushort(__half x) { return std::bit_cast<unsigned short>(x); }

inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline float __low2float(__half2 x) { return __half2float(x.x); }
inline float __high2float(__half2 x) { return __half2float(x.y); }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __float22half2_rn(float2 x) { return __floats2half2_rn(x.x, x.y); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
