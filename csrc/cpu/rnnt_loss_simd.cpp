// rnnt_loss's loops over V; compiled once per instruction set, in the compiler's vectors.
#include <cmath>
#include <limits>

#include "rnnt_loss.h"
#include "vectors.h"

namespace prunelm::PRUNELM_ISA {
namespace {

template <typename T>
Normaliser exponentials(const T* x, int64_t V, T* __restrict out) {
  constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  const int64_t whole = V - V % kLanes<T>;
  Vec<T> highs = Vec<T>{} - std::numeric_limits<T>::infinity();
  auto nan = highs != highs;
  for (int64_t v = 0; v < whole; v += kLanes<T>) {
    const Vec<T> here = load(x + v);
    highs = here > highs ? here : highs;
    nan |= here != here;
  }
  if (whole < V) {
    const Vec<T> here = load_tail(x + whole, V - whole);
    highs = here > highs ? here : highs;
    nan |= here != here;
  }
  T high = highs[0];
  for (int64_t i = 1; i < kLanes<T>; ++i) high = highs[i] > high ? highs[i] : high;
  if (any(nan) || std::isinf(high)) {
    for (int64_t v = 0; v < V; ++v) out[v] = kNan;
    return {kNan, kNan};
  }
  Vec<T> sums{};
  for (int64_t v = 0; v < whole; v += kLanes<T>) {
    const Vec<T> here = exp_nonpositive(load(x + v) - high);
    std::memcpy(out + v, &here, sizeof(here));
    sums += here;
  }
  if (whole < V) {
    const Vec<T> here = exp_nonpositive(load_tail(x + whole, V - whole) - high);
    std::memcpy(out + whole, &here, (V - whole) * sizeof(T));
    sums += here;  // lanes past the end hold exp(-inf)
  }
  double sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += sums[i];
  return {high + std::log(sum), sum};
}

template <typename T>
void scale(T* x, T factor, int64_t V) {
  for (int64_t v = 0; v < V; ++v) x[v] *= factor;
}

}  // namespace

const RnntLoops<float> rnnt_loops_float{exponentials<float>, scale<float>};
const RnntLoops<double> rnnt_loops_double{exponentials<double>, scale<double>};

}  // namespace prunelm::PRUNELM_ISA
