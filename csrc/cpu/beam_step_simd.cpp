// beam_step's loops over V; compiled once per instruction set, vectorised by the compiler.
//
// Sums run over kLanes independent lanes, lane i taking every element v with v % kLanes == i, so
// the order of addition is the same for every compiler and instruction set.
#include <bit>
#include <cmath>
#include <limits>

#include "beam_step.h"

namespace prunelm::PRUNELM_ISA {
namespace {

constexpr int64_t kLanes = 16;

// exp for x <= 0: 2^n e^r with |r| <= ln(2) / 2, Taylor to order 6 (relative error below 2e-7).
// 0 below the smallest normal number.
inline float exp_nonpositive(float x) {
  const float clamped = x > -87.0f ? x : -87.0f;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(12582912.0f);
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float scaled = p * std::bit_cast<float>((exponent + 127) << 23);
  return x > -87.0f ? scaled : 0.0f;
}

inline double exp_nonpositive(double x) { return std::exp(x); }

template <typename T>
SoftmaxStatistics<T> statistics(const T* x, int64_t V) {
  T highs[kLanes], sums[kLanes];
  int32_t nans[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    highs[i] = -std::numeric_limits<T>::infinity();
    sums[i] = 0;
    nans[i] = 0;
  }
  const int64_t whole = V - V % kLanes;
  for (int64_t v = 0; v < whole; v += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      highs[i] = x[v + i] > highs[i] ? x[v + i] : highs[i];
      nans[i] |= x[v + i] != x[v + i];
    }
  }
  for (int64_t v = whole; v < V; ++v) {
    highs[v - whole] = x[v] > highs[v - whole] ? x[v] : highs[v - whole];
    nans[v - whole] |= x[v] != x[v];
  }
  SoftmaxStatistics<T> result{highs[0], 0, false};
  for (int64_t i = 0; i < kLanes; ++i) {
    result.high = highs[i] > result.high ? highs[i] : result.high;
    result.nan |= nans[i] != 0;
  }
  if (result.nan || std::isinf(result.high)) return result;
  for (int64_t v = 0; v < whole; v += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) sums[i] += exp_nonpositive(x[v + i] - result.high);
  }
  for (int64_t v = whole; v < V; ++v) sums[v - whole] += exp_nonpositive(x[v] - result.high);
  for (int64_t i = 0; i < kLanes; ++i) result.sum += sums[i];
  return result;
}

template <typename T>
void log_softmax(const T* x, T high, T log_sum, int64_t V, T* out) {
  for (int64_t v = 0; v < V; ++v) out[v] = (x[v] - high) - log_sum;
}

template <typename T>
void add(const T* row, T weight, int64_t V, T* out) {
  for (int64_t v = 0; v < V; ++v) out[v] += weight * row[v];
}

template <typename T>
int64_t next_above(const T* x, int64_t begin, int64_t V, T bound) {
  int64_t v = begin;
  for (; v + 2 * kLanes <= V; v += 2 * kLanes) {
    int32_t hit = 0;
    for (int64_t i = 0; i < 2 * kLanes; ++i) hit |= !(x[v + i] <= bound);
    if (hit) break;
  }
  while (v < V && x[v] <= bound) ++v;
  return v;
}

}  // namespace

extern const BeamLoops<float> beam_loops_float{statistics<float>, log_softmax<float>, add<float>,
                                               next_above<float>};
extern const BeamLoops<double> beam_loops_double{statistics<double>, log_softmax<double>,
                                                 add<double>, next_above<double>};

}  // namespace prunelm::PRUNELM_ISA
