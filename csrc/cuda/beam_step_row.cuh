// One hypothesis of a beam search: how its row of logits and the rows of its terms come to shared
// memory, and what its extensions are worth; contract in prunelm/ops/beam_step.py.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/beam_step_select.cuh"

namespace prunelm::cuda {

enum class State { expand, blank_only, keep, dead };  // slot's numbers

__host__ __device__ constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Where a team's copies of rows lie in its shared memory.
struct Stage {
  int64_t term[kMaxTerms];  // bytes from the logits
  int64_t bytes;
};

template <typename S>
struct RowTerm {
  const void* values;  // nullptr: the row is out of range
  S weight;
};

// What a team that looks at a hypothesis shares.
template <typename T, typename S>
struct RowMemory {
  struct Sum {
    T high, sum;
  };
  RowTerm<S>* terms;  // [term_count]
  Sum* sums;          // [warps]
  unsigned char* stage;
  Selection<S> selection;

  __host__ __device__ RowMemory(Carver& shared, int threads, int listed, int64_t own,
                                int term_count, int64_t stage_bytes)
      : terms(shared.take<RowTerm<S>>(term_count)),
        sums(shared.take<Sum>(threads / kWarp)),
        stage(shared.take<unsigned char>(stage_bytes)),
        selection(shared, threads, listed, own) {}
};

template <typename T>
struct alignas(sizeof(T) * kPiece < 16 ? sizeof(T) * kPiece : 16) Piece {
  T at[kPiece];
};

template <typename T>
__device__ bool whole_pieces(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % alignof(Piece<T>) == 0;
}

template <typename S, typename T>
__device__ S widened(T x) {
  if constexpr (sizeof(T) == 2) {
    return S(to_float(x));
  } else {
    return S(x);
  }
}

// A thread copies the pieces that it is going to look at itself, so that it needs no barrier.
template <typename T, typename Team>
__device__ void copy_row(Team team, unsigned char* to, const T* row, int V) {
  constexpr int kBytes = alignof(Piece<T>);
  const bool whole = whole_pieces(row);
#pragma unroll 1
  for (int v = team.thread() * kPiece; v < V; v += team.size() * kPiece) {
    T* const target = reinterpret_cast<T*>(to) + v;
    if (whole && v + kPiece <= V) {
      for (int i = 0; i < int(sizeof(Piece<T>)); i += kBytes) {
        cp_async<kBytes>(reinterpret_cast<unsigned char*>(target) + i,
                         reinterpret_cast<const unsigned char*>(row + v) + i);
      }
      continue;
    }
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      if (v + k >= V) break;
      if constexpr (sizeof(T) < 4) {
        target[k] = row[v + k];
      } else {
        cp_async<sizeof(T)>(target + k, row + v + k);
      }
    }
  }
}

// run(T{}) with the C++ type of a term's rows.
template <typename Run>
__device__ void with_row_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::float16:
      return run(__half{});
    case DType::bfloat16:
      return run(__nv_bfloat16{});
    case DType::float64:
      return run(double{});
    default:
      return run(float{});
  }
}

// Which of the tokens from v0 are silent, a bit each.
__device__ inline uint32_t silent_among(const BeamStep& op, int v0) {
  uint32_t mask = 0;
#pragma unroll 1
  for (int i = 0; i < op.silent_count; ++i) {
    const auto k = uint32_t(int(op.silent[i]) - v0);
    if (k < kPiece) mask |= 1u << k;
  }
  return mask;
}

// A candidate's total once its terms are known.
template <typename S>
__device__ S with_parts(const BeamStep& op, S total, const S* parts, S reward, int v) {
#pragma unroll 1
  for (int i = 0; i < op.term_count; ++i) total += parts[1 + i];
  return silent_among(op, v) & 1 ? total : total + reward;
}

// The extensions of a hypothesis as a source of candidates. Staged: rows have been copied, and the
// logits scaled; else they are read from global memory each time.
template <typename T, typename S, bool kStaged>
struct Row {
  const BeamStep& op;
  const Stage& layout;
  unsigned char* stage;
  const RowTerm<S>* terms;
  const T* logits;
  S base, reward;  // what lp is added to, and what a token gets that is not silent
  bool with_terms;
  int V = int(op.V), blank = int(op.silent[0]);
  T high = 0, log_sum = 0, log_not_blank = 0;
  bool wrong = false;  // a candidate was NaN or +inf

  __device__ uint32_t pieces() const { return uint32_t(V + kPiece - 1) / kPiece; }
  __device__ T* staged() const { return reinterpret_cast<T*>(stage); }

  __device__ T scaled(T x, int v) const {
    if (v == blank) x -= T(op.blank_penalty);
    return op.temperature == 1 ? x : x / T(op.temperature);
  }
  __device__ T x(int v) const { return kStaged ? staged()[v] : scaled(logits[v], v); }
  __device__ T log_prob(int v) const { return (x(v) - high) - log_sum; }

  // A row's values from v0; those past V are anything.
  template <typename K>
  __device__ Piece<K> piece_of(const K* row, int v0, bool copied) const {
    if (copied || (whole_pieces(row) && v0 + kPiece <= V)) {
      return *reinterpret_cast<const Piece<K>*>(row + v0);
    }
    Piece<K> out;
    for (int k = 0; k < kPiece; ++k) out.at[k] = row[min(v0 + k, V - 1)];
    return out;
  }

  // The scaled logits from v0, -inf past V.
  __device__ Piece<T> logits_at(int v0) const {
    Piece<T> out = piece_of(kStaged ? staged() : logits, v0, kStaged);
    for (int k = 0; k < kPiece; ++k) {
      if constexpr (!kStaged) out.at[k] = scaled(out.at[k], v0 + k);
      if (v0 + k >= V) out.at[k] = -T(INFINITY);
    }
    return out;
  }

  // weight * value, and with weigh_blank what the term's share of the other tokens' weight is. One
  // rounding wherever it is computed, so that a total is the same each time.
  __device__ S weighed(S weight, S value) const {
    return fma(weight, value, op.weigh_blank ? weight * S(log_not_blank) : S(0));
  }
  __device__ S blank_part(int i, T lp) const {
    const S weight = terms[i].weight;
    return op.weigh_blank && weight != 0 ? fma(weight, S(lp), S(0)) : S(0);
  }

  __device__ void add_term(int i, int v0, S (&total)[kPiece]) const {
    const RowTerm<S> term = terms[i];
    if (term.weight == 0) return;
    if (!term.values) {
      for (int k = 0; k < kPiece; ++k) total[k] = NAN;
      return;
    }
    with_row_type(op.terms[i].dtype, [&](auto kind) {
      using K = decltype(kind);
      const void* const row = kStaged ? stage + layout.term[i] : term.values;
      const Piece<K> values = piece_of(static_cast<const K*>(row), v0, kStaged);
      for (int k = 0; k < kPiece; ++k) {
        total[k] += weighed(term.weight, widened<S>(values.at[k]));
      }
    });
  }

  // What the candidates of piece p are worth, -inf where there is none.
  __device__ void read(uint32_t p, S (&total)[kPiece]) {
    const int v0 = int(p) * kPiece;
    const Piece<T> logits = logits_at(v0);
    T lp[kPiece];
    for (int k = 0; k < kPiece; ++k) {
      lp[k] = (logits.at[k] - high) - log_sum;
      total[k] = base + S(lp[k]);
    }
    if (with_terms) {
#pragma unroll 1
      for (int i = 0; i < op.term_count; ++i) add_term(i, v0, total);
      const uint32_t silent = silent_among(op, v0);
      for (int k = 0; k < kPiece; ++k) {
        total[k] = silent >> k & 1 ? base + S(lp[k]) : total[k] + reward;
      }
      if (op.weigh_blank && uint32_t(blank - v0) < kPiece) {
#pragma unroll 1
        for (int i = 0; i < op.term_count; ++i) {
          for (int k = 0; k < kPiece; ++k) {
            if (v0 + k == blank) total[k] += blank_part(i, lp[k]);
          }
        }
      }
    }
    for (int k = 0; k < kPiece; ++k) {
      // Nothing that a term says brings a token back that the audio rules out.
      if (lp[k] == -T(INFINITY)) total[k] = -S(INFINITY);
      if (!(total[k] < S(INFINITY))) {
        total[k] = -S(INFINITY);
        wrong = true;
      }
    }
  }

  // What term i adds to token v; NaN where its row is out of range.
  __device__ S part(int i, int v, T lp) const {
    const RowTerm<S> term = terms[i];
    if (term.weight == 0) return 0;
    if (v == blank) return blank_part(i, lp);
    if (silent_among(op, v) & 1) return 0;
    if (!term.values) return NAN;
    S value = 0;
    with_row_type(op.terms[i].dtype, [&](auto kind) {
      using K = decltype(kind);
      const bool copied = kStaged && op.prune == Prune::late;
      const void* const row = copied ? stage + layout.term[i] : term.values;
      value = widened<S>(static_cast<const K*>(row)[v]);
    });
    return weighed(term.weight, value);
  }
};

}  // namespace prunelm::cuda
