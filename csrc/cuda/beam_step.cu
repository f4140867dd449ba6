// One step of a beam search on CUDA; contract in prunelm/ops/beam_step.py.
#include <math.h>

#include "cuda/device.cuh"

namespace prunelm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kNobody = INT64_MAX;

enum State : int { kExpand, kBlankOnly, kKeep, kDead };

template <typename T>
struct Hypothesis {
  State state;
  T high, log_sum;  // log_softmax(x) = (x - high) - log_sum
};

// A key is parent * V + token, so that the lower key is the lower parent, then the lower token.
template <typename S>
struct Candidate {
  S total = -INFINITY;
  int64_t key = kNobody;

  __device__ bool before(const Candidate& other) const {
    return total != other.total ? total > other.total : key < other.key;
  }
};

template <typename S>
__device__ Candidate<S> warp_best(Candidate<S> best) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const Candidate<S> other{__shfl_xor_sync(kAllLanes, best.total, lanes),
                             __shfl_xor_sync(kAllLanes, best.key, lanes)};
    if (other.before(best)) best = other;
  }
  return best;
}

__device__ inline double load(const void* from, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float16:
      return to_float(static_cast<const __half*>(from)[i]);
    case DType::bfloat16:
      return to_float(static_cast<const __nv_bfloat16*>(from)[i]);
    case DType::float64:
      return static_cast<const double*>(from)[i];
    default:
      return static_cast<const float*>(from)[i];
  }
}

template <typename S>
__device__ bool finite(S x) {
  return x > -S(INFINITY) && x < S(INFINITY);
}

// Where a thread block keeps what its threads share; `bytes` is the size of it all.
template <typename T, typename S>
struct Shared {
  Candidate<S>* picked;       // [W], the winners, best first
  Candidate<S>* warps;        // [kWarps]
  Hypothesis<T>* hypotheses;  // [W]
  int64_t* shortlist;         // [W, own]: "early": keys, or kNobody
  int* bad;

  __host__ __device__ Shared(unsigned char* from, int64_t W, int64_t own) {
    shortlist = reinterpret_cast<int64_t*>(from);
    picked = reinterpret_cast<Candidate<S>*>(shortlist + W * own);
    warps = picked + W;
    hypotheses = reinterpret_cast<Hypothesis<T>*>(warps + kWarps);
    bad = reinterpret_cast<int*>(hypotheses + W);
  }
  static int64_t bytes(int64_t W, int64_t own) {
    const Shared at(nullptr, W, own);
    return reinterpret_cast<intptr_t>(at.bad + 1);
  }
};

// The candidates of utterance b.
template <typename T, typename S>
struct Beam {
  const BeamStep& op;
  const Hypothesis<T>* hypotheses;
  int64_t b;

  __device__ int64_t blank() const { return op.silent[0]; }
  __device__ int64_t at(int64_t w) const { return b * op.W + w; }
  __device__ S old_score(int64_t w) const { return static_cast<const S*>(op.score)[at(w)]; }
  __device__ S weight(int i) const { return static_cast<const S*>(op.terms[i].weight)[b]; }

  __device__ bool is_silent(int64_t v) const {
    for (int i = 0; i < op.silent_count; ++i) {
      if (op.silent[i] == v) return true;
    }
    return false;
  }

  __device__ T scaled(int64_t w, int64_t v) const {
    T x = static_cast<const T*>(op.am_logits)[at(w) * op.V + v];
    if (v == blank()) x -= T(op.blank_penalty);
    return op.temperature == 1 ? x : x / T(op.temperature);
  }

  __device__ T log_prob(int64_t w, int64_t v) const {
    return (scaled(w, v) - hypotheses[w].high) - hypotheses[w].log_sum;
  }

  // What term i adds to token v of hypothesis w; NaN where row is out of range.
  __device__ S part(int i, int64_t w, int64_t v) const {
    const BeamTerm& term = op.terms[i];
    if (weight(i) == 0) return 0;
    if (is_silent(v)) {
      return op.weigh_blank && v == blank() ? weight(i) * S(log_prob(w, v)) : S(0);
    }
    const int64_t row = term.row[at(w)];
    if (row < 0 || row >= term.L) return NAN;
    S result = weight(i) * S(load(term.rows, term.dtype, row * op.V + v));
    if (op.weigh_blank) {
      // log P(not blank), from 0.01 up, shares the terms' weight among the tokens.
      const T rest = T(1) - exp(log_prob(w, blank()));
      result += weight(i) * S(log(rest > T(0.01) ? rest : T(0.01)));
    }
    return result;
  }

  __device__ S with_terms(S total, int64_t w, int64_t v) const {
    for (int i = 0; i < op.term_count; ++i) total += part(i, w, v);
    if (op.token_reward && !is_silent(v)) total += static_cast<const S*>(op.token_reward)[b];
    return total;
  }

  // The score of a candidate, -inf where there is none.
  __device__ S total(int64_t w, int64_t v, bool terms) const {
    const State state = hypotheses[w].state;
    if (state == kDead || (state != kExpand && v != blank())) return -INFINITY;
    if (state == kKeep) return old_score(w);
    const T own = log_prob(w, v);
    if (own == -T(INFINITY)) return -INFINITY;  // whatever the terms say
    const S sum = old_score(w) + S(own);
    return terms ? with_terms(sum, w, v) : sum;
  }
};

// One warp: the state of hypothesis w and the two numbers of its log_softmax.
template <typename T, typename S>
__device__ Hypothesis<T> prepare(const Beam<T, S>& beam, int64_t w, int lane, int* bad) {
  const int64_t slot = beam.op.slot ? beam.op.slot[beam.at(w)] : int64_t{kExpand};
  const S old = beam.old_score(w);
  if (slot == kDead || old == -S(INFINITY)) return {kDead, 0, 0};
  if (slot < 0 || slot > kDead || old != old) {
    if (lane == 0) atomicOr(bad, 1);
    return {kDead, 0, 0};
  }
  if (slot == kKeep) return {kKeep, 0, 0};
  T high = -INFINITY;
  T nan = 0;
  for (int64_t v = lane; v < beam.op.V; v += kWarp) {
    const T x = beam.scaled(w, v);
    if (x != x) nan = 1;
    if (x > high) high = x;
  }
  high = warp_max(high);
  if (warp_max(nan) != 0 || high == T(INFINITY)) {
    if (lane == 0) atomicOr(bad, 1);
    return {kDead, 0, 0};
  }
  if (high == -T(INFINITY)) return {kDead, 0, 0};
  T sum = 0;
  for (int64_t v = lane; v < beam.op.V; v += kWarp) sum += exp(beam.scaled(w, v) - high);
  return {State(slot), high, log(warp_sum(sum))};
}

// One warp: the `own` best tokens of hypothesis w by the audio alone, by repeated selection.
template <typename T, typename S>
__device__ void shorten(const Beam<T, S>& beam, int64_t w, int lane, int64_t own, int64_t* keys) {
  const int64_t V = beam.op.V;
  if (beam.hypotheses[w].state != kExpand) {
    for (int64_t i = lane; i < own; i += kWarp) keys[i] = i == 0 ? w * V + beam.blank() : kNobody;
    return;
  }
  Candidate<S> last{S(INFINITY), -1};
  for (int64_t i = 0; i < own; ++i) {
    Candidate<S> best;
    for (int64_t v = lane; v < V; v += kWarp) {
      const Candidate<S> here{S(beam.log_prob(w, v)), w * V + v};
      if (last.before(here) && here.before(best)) best = here;
    }
    last = warp_best(best);
    if (last.total == -S(INFINITY)) last.key = kNobody;
    if (lane == 0) keys[i] = last.key;
  }
}

// The thread block: the W best candidates by repeated selection. Each round takes the best one that
// comes after the last winner, so ties need no marks and no order of arrival.
template <typename T, typename S>
__device__ void pick(const Beam<T, S>& beam, const Shared<T, S>& shared, int64_t own) {
  const BeamStep& op = beam.op;
  const bool early = op.prune == Prune::early;
  const int64_t count = early ? op.W * own : op.W * op.V;
  Candidate<S> last{S(INFINITY), -1};
  for (int64_t j = 0; j < op.W; ++j) {
    Candidate<S> best;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      const int64_t key = early ? shared.shortlist[i] : i;
      if (key == kNobody) continue;
      const S total = beam.total(key / op.V, key % op.V, op.prune != Prune::after);
      if (total != total || total == S(INFINITY)) {
        if (j == 0) atomicOr(shared.bad, 1);
        continue;
      }
      const Candidate<S> here{total, key};
      if (last.before(here) && here.before(best)) best = here;
    }
    best = warp_best(best);
    if (threadIdx.x % kWarp == 0) shared.warps[threadIdx.x / kWarp] = best;
    __syncthreads();
    last = shared.warps[0];
    for (int i = 1; i < kWarps; ++i) {
      if (shared.warps[i].before(last)) last = shared.warps[i];
    }
    if (last.total == -S(INFINITY)) last.key = kNobody;
    if (threadIdx.x == 0) shared.picked[j] = last;
    __syncthreads();
  }
}

// "after" adds the terms to the winners now, keeping their order; what is no longer finite leaves.
template <typename T, typename S>
__device__ void finish(const Beam<T, S>& beam, const Shared<T, S>& shared) {
  const BeamStep& op = beam.op;
  for (int64_t j = threadIdx.x; j < op.W && op.prune == Prune::after; j += kThreads) {
    Candidate<S>& winner = shared.picked[j];
    if (winner.key == kNobody) continue;
    const int64_t w = winner.key / op.V;
    if (beam.hypotheses[w].state == kKeep) continue;
    winner.total = beam.with_terms(winner.total, w, winner.key % op.V);
    if (winner.total != winner.total || winner.total == S(INFINITY)) atomicOr(shared.bad, 1);
  }
  __syncthreads();

  const int64_t width = 1 + op.term_count;
  for (int64_t j = threadIdx.x; j < op.W; j += kThreads) {
    const Candidate<S> winner = shared.picked[j];
    const bool live = finite(winner.total);
    int64_t to = 0;  // live ones first, each kind in order
    for (int64_t i = 0; i < op.W; ++i) {
      const bool other = finite(shared.picked[i].total);
      to += live ? other && i < j : other || i < j;
    }
    const int64_t w = live ? winner.key / op.V : to;
    const int64_t v = live ? winner.key % op.V : beam.blank();
    const bool scored = live && beam.hypotheses[w].state != kKeep;
    static_cast<S*>(op.new_score)[beam.at(to)] = live ? winner.total : -S(INFINITY);
    op.parent[beam.at(to)] = w;
    op.token[beam.at(to)] = v;
    S* parts = static_cast<S*>(op.parts) + beam.at(to) * width;
    parts[0] = scored ? S(beam.log_prob(w, v)) : S(0);
    for (int i = 0; i < op.term_count; ++i) parts[1 + i] = scored ? beam.part(i, w, v) : S(0);
  }
  if (threadIdx.x == 0) op.bad[beam.b] = *shared.bad != 0;
}

// A thread block takes one utterance: a warp a hypothesis for the log-sum-exp (and for "early" its
// shortlist), then all threads together for the best W of all candidates.
template <typename T, typename S>
__global__ void beam_step_kernel(BeamStep op, int64_t own) {
  const Shared<T, S> shared(dynamic_shared(), op.W, own);
  const Beam<T, S> beam{op, shared.hypotheses, blockIdx.x};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (threadIdx.x == 0) *shared.bad = 0;
  __syncthreads();
  for (int64_t w = warp; w < op.W; w += kWarps) {
    const Hypothesis<T> hypothesis = prepare(beam, w, lane, shared.bad);
    if (lane == 0) shared.hypotheses[w] = hypothesis;
  }
  __syncthreads();
  if (op.prune == Prune::early) {
    for (int64_t w = warp; w < op.W; w += kWarps) {
      shorten(beam, w, lane, own, shared.shortlist + w * own);
    }
    __syncthreads();
  }
  pick(beam, shared, own);
  finish(beam, shared);
}

template <typename T, typename S>
const char* launch_typed(const BeamStep& op, void* stream) {
  const int64_t own = op.prune == Prune::early ? (op.W < op.V ? op.W : op.V) : 0;
  return launch(beam_step_kernel<T, S>, {op.B, dim3{kThreads}, Shared<T, S>::bytes(op.W, own)},
                stream, op, own);
}

}  // namespace

const char* launch_beam_step(const BeamStep& op, DType logits_dtype, DType score_dtype,
                             void* stream) {
  if (op.B == 0) return nullptr;
  const bool wide_score = score_dtype == DType::float64;
  if (logits_dtype == DType::float64) {
    return wide_score ? launch_typed<double, double>(op, stream)
                      : launch_typed<double, float>(op, stream);
  }
  return wide_score ? launch_typed<float, double>(op, stream)
                    : launch_typed<float, float>(op, stream);
}

}  // namespace prunelm::cuda
