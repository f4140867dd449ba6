// What a search of beam_step keeps: the best candidates, and rows as it needs them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/number.h"

namespace prunelm {

template <typename S>
struct Candidate {
  S total;
  int64_t parent, token;

  bool operator<(const Candidate& other) const {  // the better one comes first
    if (total != other.total) return total > other.total;
    return std::tie(parent, token) < std::tie(other.parent, other.token);
  }
};

// The best `size` candidates seen, best first. Beams are narrow: insertion beats a heap.
template <typename S>
class Best {
 public:
  void clear(int64_t size) {
    kept_.resize(size);
    count_ = 0;
  }
  bool full() const { return count_ == int64_t(kept_.size()); }
  S worst() const { return full() ? kept_[count_ - 1].total : -std::numeric_limits<S>::infinity(); }
  Candidate<S>* begin() { return kept_.data(); }
  Candidate<S>* end() { return kept_.data() + count_; }

  void offer(const Candidate<S>& candidate) {
    if (full()) {
      if (!(candidate < kept_[count_ - 1])) return;
      --count_;
    }
    int64_t i = count_++;
    for (; i > 0 && candidate < kept_[i - 1]; --i) kept_[i] = kept_[i - 1];
    kept_[i] = candidate;
  }

 private:
  std::vector<Candidate<S>> kept_;
  int64_t count_ = 0;
};

template <typename T>
inline void convert(const void* from, Number number, int64_t offset, int64_t count, T* to) {
  const auto copy = [&](const auto* source) {
    for (int64_t v = 0; v < count; ++v) to[v] = T(source[offset + v]);
  };
  switch (number) {
    case Number::f32:
      return copy(static_cast<const float*>(from));
    case Number::f64:
      return copy(static_cast<const double*>(from));
    case Number::f16:
      return copy(static_cast<const torch::headeronly::Half*>(from));
    case Number::bf16:
      return copy(static_cast<const torch::headeronly::BFloat16*>(from));
  }
}

template <typename T>
struct Normaliser {
  T high, log_sum;
};

// What a thread keeps between calls: asking for it anew takes as long as a short row.
template <typename T, typename S>
struct Workspace {
  Best<S> best, own;
  std::vector<T> scaled, increment, tops, row, row_logits;
  std::vector<S> weight;
  std::vector<Normaliser<T>> normaliser, row_normaliser;
  std::vector<char> row_is_known;
  std::vector<int64_t> order, found;
};

// Has a row's beginning fetched while something else is computed: the processor follows a row by
// itself, but does not know where the next one lies.
inline void expect(const void* row, int64_t bytes) {
  constexpr int64_t kLine = 64, kMost = 4096;
  for (int64_t at = 0; at < std::min(bytes, kMost); at += kLine) {
    __builtin_prefetch(static_cast<const char*>(row) + at, 0, 2);
  }
}

}  // namespace prunelm
