// One step of a beam search on CUDA; contract in prunelm/ops/beam_step.py. A team of threads finds
// the best candidates of one hypothesis, then a thread block those of its utterance. Where rows are
// short a team is a warp and one launch does both; else it is a block, and a second launch merges.
#include "cuda/beam_step_row.cuh"
#include "cuda/beam_step_select.cuh"

namespace prunelm::cuda {
namespace {

// Four pieces a thread: enough loads in flight, and little to do behind the last one.
constexpr int kPiecesEach = 4, kMostMergers = 256;
constexpr int64_t kFusedBeam = 16, kFusedTokens = 1024;

// At most 48 registers a thread for staged float32, so that four blocks of 320 threads, for 5000
// tokens, fit a multiprocessor; others need up to 128.
template <typename T, typename S, bool kStaged>
struct Bounds {
  static constexpr bool kLean = kStaged && sizeof(T) + sizeof(S) == 8;
  static constexpr int kThreads = kLean ? 640 : 512, kBlocks = kLean ? 2 : 1;
};

// What hypotheses leave for the merge: `own` candidates each, in the order of their tokens where
// totals are equal.
template <typename S>
struct Lists {
  Candidate<S>* candidates;  // [W, own]; at: the token
  S* parts;                  // [W, own, 1 + term_count]
  uint32_t* bad;             // [W]

  __host__ __device__ Lists(Carver& memory, int64_t rows, int64_t own, int term_count)
      : candidates(memory.take<Candidate<S>>(rows * own)),
        parts(memory.take<S>(rows * own * (1 + term_count))),
        bad(memory.take<uint32_t>(rows)) {}
  __device__ void skip(int64_t rows, int64_t own, int term_count) {
    candidates += rows * own;
    parts += rows * own * (1 + term_count);
    bad += rows;
  }
};

// The two numbers of log_softmax; false where it cannot be taken.
template <typename Team, typename T, typename S, bool kStaged>
__device__ bool sum_up(Team team, Row<T, S, kStaged>& row, const RowMemory<T, S>& memory,
                       uint32_t* bad) {
  const BeamStep& op = row.op;
  const int thread = team.thread(), threads = team.size();
  if (kStaged && (op.temperature != 1 || op.blank_penalty != 0)) {
#pragma unroll 1
    for (int v = thread * kPiece; v < row.V; v += threads * kPiece) {
#pragma unroll 1
      for (int k = 0; k < kPiece; ++k) row.staged()[v + k] = row.scaled(row.x(v + k), v + k);
    }
  }
  T high = -T(INFINITY), sum = 0;
#pragma unroll 1
  for (uint32_t p = thread; p < row.pieces(); p += threads) {
    const Piece<T> x = row.logits_at(int(p) * kPiece);
    for (int k = 0; k < kPiece; ++k) high = x.at[k] > high ? x.at[k] : high;
  }
  high = warp_max(high);
  const T base = high == -T(INFINITY) ? T(0) : high;
#pragma unroll 1
  for (uint32_t p = thread; p < row.pieces(); p += threads) {
    const Piece<T> x = row.logits_at(int(p) * kPiece);
    for (int k = 0; k < kPiece; ++k) sum += exp(x.at[k] - base);  // NaN for NaN and for +inf
  }
  sum = warp_sum(sum);
  if (thread % kWarp == 0) memory.sums[thread / kWarp] = {high, sum};
  team.sync();
  row.high = -T(INFINITY);
  for (int i = 0; i < threads / kWarp; ++i) {
    row.high = memory.sums[i].high > row.high ? memory.sums[i].high : row.high;
  }
  const T center = row.high == -T(INFINITY) ? T(0) : row.high;
  T whole = 0;
  for (int i = 0; i < threads / kWarp; ++i) {
    whole += memory.sums[i].sum * exp(memory.sums[i].high - center);
  }
  row.log_sum = log(whole);
  if (whole != whole && thread == 0) atomicOr(bad, 1u);
  return whole == whole && row.high != -T(INFINITY);
}

// Takes the rows of hypothesis h to shared memory, and says what state it is in.
template <typename Team, typename T, typename S, bool kStaged>
__device__ State prepare(Team team, Row<T, S, kStaged>& row, const RowMemory<T, S>& memory,
                         int64_t h, uint32_t* bad) {
  const BeamStep& op = row.op;
  const int thread = team.thread();
  const int64_t slot = op.slot ? op.slot[h] : int64_t{0};
  int64_t which = 0;
  S weight = 0;
  if (thread < op.term_count) {
    which = op.terms[thread].row[h];
    weight = static_cast<const S*>(op.terms[thread].weight)[h / op.W];
  }
  // Whatever the state: it is not known yet, and rows of dead slots are few.
  if constexpr (kStaged) {
    copy_row(team, row.stage, row.logits, row.V);
    cp_async_commit();
  }
  const bool live = slot != int64_t(State::dead) && row.base != -S(INFINITY);
  const bool amiss = live && (slot < 0 || slot > 3 || !(row.base < S(INFINITY)));
  const State state = live && !amiss ? State(slot) : State::dead;
  const bool scored = state == State::expand || state == State::blank_only;
  if (thread < op.term_count) {
    const BeamTerm& term = op.terms[thread];
    const auto* const rows = static_cast<const unsigned char*>(term.rows);
    const bool inside = state == State::expand && which >= 0 && which < term.L;
    memory.terms[thread] = {inside ? rows + which * op.V * bytes_of(term.dtype) : nullptr, weight};
  }
  if (thread == 0) *bad = amiss;
  team.sync();
  if constexpr (kStaged) {
#pragma unroll 1
    for (int i = 0; i < op.term_count && op.prune == Prune::late; ++i) {
      const RowTerm<S> term = memory.terms[i];
      if (term.weight == 0 || !term.values) continue;
      with_row_type(op.terms[i].dtype, [&](auto kind) {
        using K = decltype(kind);
        copy_row(team, row.stage + row.layout.term[i], static_cast<const K*>(term.values), row.V);
      });
    }
    cp_async_commit();
    cp_async_wait<1>();
  }
  const bool summed = scored && sum_up(team, row, memory, bad);
  if constexpr (kStaged) cp_async_wait<0>();
  if (scored && !summed) return State::dead;
  if (scored && op.weigh_blank) {
    const T rest = T(1) - exp(row.log_prob(row.blank));
    row.log_not_blank = log(rest > T(0.01) ? rest : T(0.01));
  }
  return state;
}

// The one candidate of a hypothesis that does not expand.
template <typename T, typename S, bool kStaged>
__device__ Candidate<S> blank_of(Row<T, S, kStaged>& row, State state) {
  if (state == State::dead) return no_candidate<S>();
  S total = row.base;
  if (state == State::blank_only) {
    const T lp = row.log_prob(row.blank);
    total += S(lp);
    for (int i = 0; i < row.op.term_count && row.op.prune != Prune::after; ++i) {
      total += row.blank_part(i, lp);
    }
    if (lp == -T(INFINITY)) total = -S(INFINITY);
  }
  if (total == -S(INFINITY)) return no_candidate<S>();
  if (total < S(INFINITY)) return {total, uint32_t(row.blank)};
  row.wrong = true;
  return no_candidate<S>();
}

// A team: the `own` best candidates of hypothesis h and what they are made of.
template <bool kStaged, typename T, typename S, typename Team>
__device__ void examine(Team team, const BeamStep& op, const Stage& layout,
                        const RowMemory<T, S>& memory, int64_t h, int64_t own, Lists<S> to) {
  const S old = static_cast<const S*>(op.score)[h];
  const S reward = op.token_reward ? static_cast<const S*>(op.token_reward)[h / op.W] : S(0);
  const T* const logits = static_cast<const T*>(op.am_logits) + h * op.V;
  Row<T, S, kStaged> row{op,     layout, memory.stage, memory.terms,
                         logits, old,    reward,       op.prune == Prune::late};
  const State state = prepare(team, row, memory, h, to.bad);
  const bool early = op.prune == Prune::early && state == State::expand;
  Candidate<S>* const best = memory.selection.best;
  if (state == State::expand) {
    if (early) row.base = 0;
    select(team, row, memory.selection, own);
  } else {
    for (int64_t j = team.thread(); j < own; j += team.size()) {
      best[j] = j == 0 ? blank_of(row, state) : no_candidate<S>();
    }
  }
  for (int64_t j = team.thread(); j < own; j += team.size()) {
    Candidate<S> mine = best[j];
    int64_t place = j;
    if (early && mine.live()) {
      place = 0;
      for (int64_t i = 0; i < own; ++i) place += best[i].at < mine.at;
    }
    S* const parts = to.parts + place * (1 + op.term_count);
    if (mine.live() && state == State::keep) {
      for (int i = 0; i <= op.term_count; ++i) parts[i] = 0;
    } else if (mine.live()) {
      const T lp = row.log_prob(mine.at);
      parts[0] = S(lp);
#pragma unroll 1
      for (int i = 0; i < op.term_count; ++i) parts[1 + i] = row.part(i, mine.at, lp);
      if (early) {
        mine.total = with_parts(op, old + S(lp), parts, reward, mine.at);
        if (!(mine.total < S(INFINITY))) {
          mine.total = -S(INFINITY);
          row.wrong = true;
        }
      }
    }
    to.candidates[place] = mine;
  }
  if (row.wrong) atomicOr(to.bad, 1u);
}

template <typename S>
struct ListSource {
  const Candidate<S>* candidates;
  int64_t count;
  bool wrong = false;

  __device__ uint32_t pieces() const { return uint32_t((count + kPiece - 1) / kPiece); }
  __device__ void read(uint32_t p, S (&total)[kPiece]) const {
    for (int k = 0; k < kPiece; ++k) {
      const int64_t i = int64_t{p} * kPiece + k;
      total[k] = i < count ? candidates[i].total : -S(INFINITY);
    }
  }
};

// What the merge of an utterance's lists shares.
template <typename S>
struct MergeMemory {
  uint32_t* bad;
  Selection<S> selection;

  __host__ __device__ MergeMemory(Carver& shared, int threads, int64_t W)
      : bad(shared.take<uint32_t>(1)), selection(shared, threads, BlockTeam::kListed, W) {}
};

// The thread block: the best W of what utterance b's hypotheses left, written to the results.
template <typename S>
__device__ void merge(const BeamStep& op, int64_t b, int64_t own, const Lists<S>& lists,
                      const MergeMemory<S>& memory) {
  const BlockTeam team;
  const int thread = team.thread(), threads = team.size(), width = 1 + op.term_count;
  const S reward = op.token_reward ? static_cast<const S*>(op.token_reward)[b] : S(0);
  const bool after = op.prune == Prune::after;
  Candidate<S>* const best = memory.selection.best;
  if (thread == 0) *memory.bad = 0;
  ListSource<S> source{lists.candidates, op.W * own};
  select(team, source, memory.selection, op.W);
  for (int64_t j = thread; j < op.W; j += threads) {
    bool bad = lists.bad[j];
    Candidate<S>& mine = best[j];
    if (after && mine.live()) {
      // The order stays; what is no longer finite leaves.
      const int v = int(lists.candidates[mine.at].at);
      mine.total = with_parts(op, mine.total, lists.parts + mine.at * width, reward, v);
      if (!(mine.total < S(INFINITY))) {
        mine.total = -S(INFINITY);
        bad = true;
      }
    }
    if (bad) atomicOr(memory.bad, 1u);
  }
  team.sync();
  for (int64_t j = thread; j < op.W; j += threads) {
    const Candidate<S> mine = best[j];
    int64_t to = j;
    if (after) {
      to = 0;  // live ones first, each kind in order
      for (int64_t i = 0; i < op.W; ++i) {
        const bool live = best[i].live();
        to += mine.live() ? live && i < j : live || i < j;
      }
    }
    const int64_t at = b * op.W + to;
    static_cast<S*>(op.new_score)[at] = mine.total;
    op.parent[at] = mine.live() ? mine.at / own : to;
    op.token[at] = mine.live() ? int64_t{lists.candidates[mine.at].at} : op.silent[0];
    S* const parts = static_cast<S*>(op.parts) + at * width;
    for (int i = 0; i < width; ++i) {
      parts[i] = mine.live() ? lists.parts[mine.at * width + i] : S(0);
    }
  }
  if (thread == 0) op.bad[b] = *memory.bad != 0;
}

// How a step runs; from sizes alone.
struct Plan {
  bool fused, staged;
  int threads;  // of a team
  int64_t own;  // candidates that a hypothesis leaves
  Stage stage;
  int64_t row_bytes, shared_bytes;
};

// A thread block takes an utterance, a warp each of its hypotheses.
template <typename T, typename S>
__global__ void __launch_bounds__(kFusedBeam* kWarp, 1)
    beam_step_kernel(const __grid_constant__ BeamStep op, const __grid_constant__ Plan plan) {
  wait_for_kernel_ahead();
  let_kernel_behind_begin();
  const int64_t w = threadIdx.x / kWarp;
  Carver own_shared{dynamic_shared() + w * plan.row_bytes};
  Carver shared{dynamic_shared() + op.W * plan.row_bytes};
  const RowMemory<T, S> memory(own_shared, kWarp, WarpTeam::kListed, plan.own, op.term_count,
                               plan.stage.bytes);
  const Lists<S> lists(shared, op.W, plan.own, op.term_count);
  const MergeMemory<S> merging(shared, int(blockDim.x), op.W);
  Lists<S> to = lists;
  to.skip(w, plan.own, op.term_count);
  examine<true>(WarpTeam{}, op, plan.stage, memory, blockIdx.x * op.W + w, plan.own, to);
  __syncthreads();
  merge(op, blockIdx.x, plan.own, lists, merging);
}

// A thread block takes a hypothesis.
template <typename T, typename S, bool kStaged>
__global__ void __launch_bounds__(Bounds<T, S, kStaged>::kThreads, Bounds<T, S, kStaged>::kBlocks)
    rows_kernel(const __grid_constant__ BeamStep op, const __grid_constant__ Plan plan) {
  wait_for_kernel_ahead();
  let_kernel_behind_begin();
  Carver shared{dynamic_shared()}, workspace{static_cast<unsigned char*>(op.workspace)};
  const RowMemory<T, S> memory(shared, int(blockDim.x), BlockTeam::kListed, plan.own, op.term_count,
                               plan.stage.bytes);
  Lists<S> to(workspace, op.B * op.W, plan.own, op.term_count);
  to.skip(blockIdx.x, plan.own, op.term_count);
  examine<kStaged>(BlockTeam{}, op, plan.stage, memory, blockIdx.x, plan.own, to);
}

// A thread block takes an utterance.
template <typename S>
__global__ void __launch_bounds__(kMostMergers)
    merge_kernel(const __grid_constant__ BeamStep op, int64_t own) {
  wait_for_kernel_ahead();
  let_kernel_behind_begin();
  Carver shared{dynamic_shared()}, workspace{static_cast<unsigned char*>(op.workspace)};
  const MergeMemory<S> memory(shared, int(blockDim.x), op.W);
  Lists<S> lists(workspace, op.B * op.W, own, op.term_count);
  lists.skip(blockIdx.x * op.W, own, op.term_count);
  merge(op, blockIdx.x, own, lists, memory);
}

int whole_warps(int64_t threads, int most) {
  const int64_t warps = ceil_div(threads, kWarp);
  return int(min(max(warps, int64_t{1}), int64_t{most / kWarp})) * kWarp;
}

template <typename T, typename S>
Plan plan_of(const BeamStep& op) {
  const int64_t pieces = ceil_div(op.V, kPiece);
  Plan plan{};
  plan.own = min(op.W, op.V);
  Carver stage{nullptr};
  stage.take<Piece<T>>(pieces);
  for (int i = 0; i < op.term_count && op.prune == Prune::late; ++i) {
    plan.stage.term[i] = stage.bytes;
    stage.take<unsigned char>(pieces * kPiece * bytes_of(op.terms[i].dtype));
  }
  plan.stage.bytes = stage.bytes;

  Carver row{nullptr};
  RowMemory<T, S>(row, kWarp, WarpTeam::kListed, plan.own, op.term_count, plan.stage.bytes);
  plan.row_bytes = row.bytes;
  Carver fused{nullptr, op.W * row.bytes};
  Lists<S>(fused, op.W, plan.own, op.term_count);
  MergeMemory<S>(fused, int(op.W * kWarp), op.W);
  plan.fused = op.W <= kFusedBeam && op.V <= kFusedTokens && fused.bytes <= op.most_shared;
  if (plan.fused) {
    plan.staged = true;
    plan.shared_bytes = fused.bytes;
    return plan;
  }
  for (const bool staged : {true, false}) {
    const int most = staged ? Bounds<T, S, true>::kThreads : Bounds<T, S, false>::kThreads;
    plan.threads = whole_warps(ceil_div(pieces, kPiecesEach), most);
    if (!staged) plan.stage.bytes = 0;
    Carver block{nullptr};
    RowMemory<T, S>(block, plan.threads, BlockTeam::kListed, plan.own, op.term_count,
                    plan.stage.bytes);
    plan.staged = staged;
    plan.shared_bytes = block.bytes;
    if (block.bytes <= op.most_shared) break;
  }
  return plan;
}

template <typename T, typename S>
const char* launch_typed(const BeamStep& op, void* stream) {
  const Plan plan = plan_of<T, S>(op);
  if (plan.fused) {
    Grid grid{op.B, dim3{unsigned(op.W * kWarp)}, plan.shared_bytes};
    grid.early = true;
    return launch(beam_step_kernel<T, S>, grid, stream, op, plan);
  }
  Grid grid{op.B * op.W, dim3{unsigned(plan.threads)}, plan.shared_bytes};
  grid.early = true;
  const char* const error = launch(plan.staged ? rows_kernel<T, S, true> : rows_kernel<T, S, false>,
                                   grid, stream, op, plan);
  if (error) return error;
  const int threads = whole_warps(op.W * plan.own, kMostMergers);
  Carver merging{nullptr};
  MergeMemory<S>(merging, threads, op.W);
  Grid merge_grid{op.B, dim3{unsigned(threads)}, merging.bytes};
  merge_grid.early = true;
  return launch(merge_kernel<S>, merge_grid, stream, op, plan.own);
}

// run(T{}, S{}) with the C++ types of logits and scores.
template <typename Run>
auto with_types(DType logits, DType score, Run run) {
  const bool wide = score == DType::float64;
  if (logits == DType::float64) return wide ? run(double{}, double{}) : run(double{}, float{});
  return wide ? run(float{}, double{}) : run(float{}, float{});
}

}  // namespace

int64_t beam_step_workspace(const BeamStep& op, DType logits_dtype, DType score_dtype) {
  return with_types(logits_dtype, score_dtype, [&]<typename T, typename S>(T, S) -> int64_t {
    const Plan plan = plan_of<T, S>(op);
    Carver workspace{nullptr};
    if (!plan.fused) Lists<S>(workspace, op.B * op.W, plan.own, op.term_count);
    return workspace.bytes;
  });
}

const char* launch_beam_step(const BeamStep& op, DType logits_dtype, DType score_dtype,
                             void* stream) {
  if (op.B == 0) return nullptr;
  // Places, of candidates and of their parts, are counted in 32 bits.
  if (op.V > INT32_MAX || op.W * min(op.W, op.V) > INT32_MAX / (1 + op.term_count)) {
    return "a beam or vocabulary too big";
  }
  return with_types(logits_dtype, score_dtype,
                    [&]<typename T, typename S>(T, S) { return launch_typed<T, S>(op, stream); });
}

}  // namespace prunelm::cuda
