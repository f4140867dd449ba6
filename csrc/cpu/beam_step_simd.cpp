// beam_step's loops over V; compiled once per instruction set, in the compiler's vectors.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "beam_step.h"
#include "element.h"
#include "vectors.h"

namespace prunelm::PRUNELM_ISA {
namespace {

template <typename T>
constexpr T kNone = -std::numeric_limits<T>::infinity();
constexpr int kUnroll = 4;  // vectors at once, and in a chunk
template <typename T>
constexpr int64_t kChunk = kUnroll * kLanes<T>;

template <typename T>
PRUNELM_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Lanes of the last vector that the vector before it holds too, where it ends at V.
template <typename T>
PRUNELM_INLINE auto seen_before(int64_t V) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Vec<Lane> lane;
  for (int64_t i = 0; i < kLanes<T>; ++i) lane[i] = Lane(i);
  return lane < Lane(kLanes<T> - V % kLanes<T>);
}

// visit(i, vector) for all of x, i below kUnroll, by the position; in the last vector what is not
// new is -inf.
template <typename T, typename Visit>
PRUNELM_INLINE void over(const T* x, int64_t V, Visit visit) {
  int64_t v = 0;
  for (; v + kChunk<T> <= V; v += kChunk<T>) {
    for (int i = 0; i < kUnroll; ++i) visit(i, load(x + v + i * kLanes<T>));
  }
  // Not a loop: compilers keep sums in registers where i is known.
  const int64_t rest = (V - v) / kLanes<T>;
  if (rest > 0) visit(0, load(x + v));
  if (rest > 1) visit(1, load(x + v + kLanes<T>));
  if (rest > 2) visit(2, load(x + v + 2 * kLanes<T>));
  if (V % kLanes<T>)
    visit(kUnroll - 1, seen_before<T>(V) ? Vec<T>{} + kNone<T> : load(x + V - kLanes<T>));
}

template <typename T>
SoftmaxStatistics<T> statistics(const T* x, int64_t V) {
  Vec<T> highs[kUnroll], sums[kUnroll];
  for (int i = 0; i < kUnroll; ++i) highs[i] = Vec<T>{} + kNone<T>, sums[i] = Vec<T>{};
  over(x, V, [&](int i, Vec<T> here) {
    highs[i] = larger<T>(here, highs[i]);
    sums[i] += here;  // NaN where any is
  });
  const Vec<T> top = larger<T>(larger<T>(highs[0], highs[1]), larger<T>(highs[2], highs[3]));
  const Vec<T> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  SoftmaxStatistics<T> result{fold<T>(top, [](auto a, auto b) { return a > b ? a : b; }), 0, false};
  if (any(total != total)) {  // a sum that overflows may meet -inf
    result.nan = std::any_of(x, x + V, [](T value) { return value != value; });
  }
  if (result.nan || std::isinf(result.high)) return result;
  for (Vec<T>& sum : sums) sum = Vec<T>{};
  over(x, V, [&](int i, Vec<T> here) { sums[i] += exp_summand(here - result.high); });
  const Vec<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  result.sum = fold<T>(sum, [](auto a, auto b) { return a + b; });
  return result;
}

// Row: what the row holds; void: there is none.
template <typename T, typename Row>
bool combine_row(const Increments<T>& of, int64_t V, T* out, T* tops) {
  const auto* row = static_cast<const Row*>(of.row);
  const auto at = [&](int64_t v) {
    Vec<T> sum = (load(of.x + v) - of.high) - of.log_sum;
    if constexpr (!std::is_void_v<Row>) sum += of.weight * load<Vec<T>, Row>(row + v);
    return sum + of.extra;
  };
  // The last vector ends at V. It overlaps others: in place, it is to be read before they change.
  const bool overlaps = V % kLanes<T> != 0;
  const Vec<T> last = at(V - kLanes<T>);
  Vec<T> sums[kUnroll] = {};  // NaN or +inf where any is
  int64_t v = 0;
  for (; v + kChunk<T> <= V; v += kChunk<T>, tops += kLanes<T>) {
    Vec<T> here[kUnroll];
    for (int i = 0; i < kUnroll; ++i) {
      here[i] = at(v + i * kLanes<T>);
      sums[i] += here[i];
      store(here[i], out + v + i * kLanes<T>);
    }
    store(larger<T>(larger<T>(here[0], here[1]), larger<T>(here[2], here[3])), tops);
  }
  if (v < V) {
    Vec<T> top = overlaps && seen_before<T>(V) ? Vec<T>{} + kNone<T> : last;
    sums[0] += top;
    for (; v + kLanes<T> <= V; v += kLanes<T>) {
      const Vec<T> here = at(v);
      top = larger<T>(top, here);
      sums[1] += here;
      store(here, out + v);
    }
    store(last, out + V - kLanes<T>);
    store(top, tops);
  }
  const Vec<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return any(~(sum < std::numeric_limits<T>::infinity()));
}

template <typename T>
bool combine(const Increments<T>& of, int64_t V, T* out, T* tops) {
  if (!of.row) return combine_row<T, void>(of, V, out, tops);
  if constexpr (std::is_same_v<T, float>) {
    if (of.number == Number::bf16) return combine_row<T, Bf16>(of, V, out, tops);
    if (of.number == Number::f16) return combine_row<T, Fp16>(of, V, out, tops);
  }
  return combine_row<T, T>(of, V, out, tops);
}

template <typename T>
void renew(const T* increments, int64_t begin, int64_t end, T* tops) {
  for (int64_t c = begin / kChunk<T>; c * kChunk<T> < end; ++c) {
    const T* const chunk = increments + c * kChunk<T>;
    Vec<T> top = load(chunk);
    for (int i = 1; i < kUnroll; ++i) top = larger<T>(top, load(chunk + i * kLanes<T>));
    store(top, tops + c * kLanes<T>);
  }
}

template <typename T>
int64_t chunks_of(int64_t V) {
  return (V + kChunk<T> - 1) / kChunk<T>;
}

template <typename T>
T reached(const T* tops, int64_t V, int64_t count) {
  constexpr int kGroups = 32 / kLanes<T>;  // each lane of a group stands for other increments
  if (count > kGroups * kLanes<T>) return kNone<T>;
  Vec<T> groups[kGroups];
  for (Vec<T>& group : groups) group = Vec<T>{} + kNone<T>;
  const int64_t chunks = chunks_of<T>(V);
  int64_t c = 0;
  for (; c + kGroups <= chunks; c += kGroups) {
    for (int g = 0; g < kGroups; ++g) {
      groups[g] = larger<T>(groups[g], load(tops + (c + g) * kLanes<T>));
    }
  }
  for (int g = 0; c + g < chunks; ++g) {
    groups[g] = larger<T>(groups[g], load(tops + (c + g) * kLanes<T>));
  }
  T best[kGroups * kLanes<T>];  // the largest `count`, in descending order
  std::fill_n(best, count, kNone<T>);
  for (const Vec<T>& group : groups) {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
      const T here = group[lane];
      if (!(here > best[count - 1])) continue;
      int64_t i = count - 1;
      for (; i > 0 && here > best[i - 1]; --i) best[i] = best[i - 1];
      best[i] = here;
    }
  }
  return best[count - 1];
}

template <typename T>
int64_t above(const T* increments, const T* tops, int64_t V, T bound, int64_t* found) {
  int64_t count = 0;
  const int64_t chunks = chunks_of<T>(V);
  for (int64_t c = 0; c < chunks; ++c) {
    if (!any(load(tops + c * kLanes<T>) > bound)) continue;
    const T* const chunk = increments + c * kChunk<T>;
    uint64_t bits = 0;
    for (int i = 0; i < kUnroll; ++i) {
      bits |= bits_of(load(chunk + i * kLanes<T>) > bound) << (i * kLanes<T>);
    }
    for (; bits; bits &= bits - 1) found[count++] = c * kChunk<T> + std::countr_zero(bits);
  }
  return count;
}

template <typename T>
constexpr BeamLoops<T> kLoops{statistics<T>, combine<T>, renew<T>, reached<T>, above<T>};

}  // namespace

const BeamLoops<float> beam_loops_float = kLoops<float>;
const BeamLoops<double> beam_loops_double = kLoops<double>;

}  // namespace prunelm::PRUNELM_ISA
