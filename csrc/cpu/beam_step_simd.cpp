// beam_step's loops over V; compiled once per instruction set, in the compiler's vectors.
#include <cmath>
#include <limits>

#include "beam_step.h"
#include "vectors.h"

namespace prunelm::PRUNELM_ISA {
namespace {

template <typename T>
SoftmaxStatistics<T> statistics(const T* x, int64_t V) {
  const int64_t whole = V - V % kLanes<T>;
  Vec<T> high = Vec<T>{} - std::numeric_limits<T>::infinity();
  auto nan = high != high;
  for (int64_t v = 0; v < whole; v += kLanes<T>) {
    const Vec<T> here = load(x + v);
    high = here > high ? here : high;
    nan |= here != here;
  }
  if (whole < V) {
    const Vec<T> here = load_tail(x + whole, V - whole);
    high = here > high ? here : high;
    nan |= here != here;
  }
  SoftmaxStatistics<T> result{high[0], 0, any(nan)};
  for (int64_t i = 1; i < kLanes<T>; ++i)
    result.high = high[i] > result.high ? high[i] : result.high;
  if (result.nan || std::isinf(result.high)) return result;
  Vec<T> sum{}, second{};
  int64_t v = 0;
  for (; v + 2 * kLanes<T> <= V; v += 2 * kLanes<T>) {
    sum += exp_nonpositive(load(x + v) - result.high);
    second += exp_nonpositive(load(x + v + kLanes<T>) - result.high);
  }
  if (v < whole) sum += exp_nonpositive(load(x + v) - result.high);
  if (whole < V) sum += exp_nonpositive(load_tail(x + whole, V - whole) - result.high);
  sum += second;
  for (int64_t i = 0; i < kLanes<T>; ++i) result.sum += sum[i];
  return result;
}

template <typename T>
void log_softmax(const T* x, T high, T log_sum, int64_t V, T* __restrict out) {
  for (int64_t v = 0; v < V; ++v) out[v] = (x[v] - high) - log_sum;
}

template <typename T>
void add(const T* row, T weight, int64_t V, T* __restrict out) {
  for (int64_t v = 0; v < V; ++v) out[v] += weight * row[v];
}

template <typename T>
int64_t next_above(const T* x, int64_t begin, int64_t V, T bound) {
  int64_t v = begin;
  for (; v + 4 * kLanes<T> <= V; v += 4 * kLanes<T>) {
    auto found = ~(load(x + v) <= bound);  // not "above": NaN is to be found too
    for (int64_t i = 1; i < 4; ++i) found |= ~(load(x + v + i * kLanes<T>) <= bound);
    if (any(found)) break;
  }
  while (v < V && x[v] <= bound) ++v;
  return v;
}

}  // namespace

const BeamLoops<float> beam_loops_float{statistics<float>, log_softmax<float>, add<float>,
                                        next_above<float>};
const BeamLoops<double> beam_loops_double{statistics<double>, log_softmax<double>, add<double>,
                                          next_above<double>};

}  // namespace prunelm::PRUNELM_ISA
