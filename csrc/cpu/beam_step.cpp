// One step of a beam search for every utterance; contract in prunelm/ops/beam_step.py.
#include "beam_step.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "check.h"

namespace prunelm {
namespace {

template <typename T>
const BeamLoops<T>& loops() {
  if constexpr (std::is_same_v<T, float>) return PRUNELM_CHOSEN(beam_loops_float);
  if constexpr (!std::is_same_v<T, float>) return PRUNELM_CHOSEN(beam_loops_double);
}

struct Term {
  const void* rows;
  ScalarType dtype;
  const int64_t* row;
  const void* weight;
};

struct Options {
  int64_t blank;
  std::vector<int64_t> silent;
  double temperature, blank_penalty;
  Prune prune;
  bool weigh_blank;
};

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
  explicit Best(int64_t size) : kept_(size) {}
  void clear() { count_ = 0; }
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
void convert(const void* from, ScalarType dtype, int64_t offset, int64_t count, T* to) {
  const auto copy = [&](const auto* source) {
    for (int64_t v = 0; v < count; ++v) to[v] = T(source[offset + v]);
  };
  switch (dtype) {
    case ScalarType::Float:
      return copy(static_cast<const float*>(from));
    case ScalarType::Double:
      return copy(static_cast<const double*>(from));
    case ScalarType::Half:
      return copy(static_cast<const torch::headeronly::Half*>(from));
    default:
      return copy(static_cast<const torch::headeronly::BFloat16*>(from));
  }
}

// The search of one utterance. T is the logits' type, S the scores'.
template <typename T, typename S>
class Step {
 public:
  Step(const BeamShape& shape, const Options& options, const std::vector<Term>& terms,
       const T* logits, const S* score, const int64_t* slot, const S* reward)
      : shape_(shape),
        options_(options),
        terms_(terms),
        logits_(logits),
        score_(score),
        slot_(slot),
        reward_(reward),
        loops_(loops<T>()),
        best_(shape.W),
        own_(std::min(shape.W, shape.V)),
        silent_(shape.V, false),
        scaled_(shape.V),
        log_prob_(shape.V),
        increment_(shape.V),
        row_(shape.V),
        weight_(terms.size()) {
    for (const int64_t token : options.silent) silent_[token] = true;
  }

  void run(int64_t b, S* score, int64_t* parent, int64_t* token, S* parts, bool* bad) {
    b_ = b;
    bad_ = false;
    best_.clear();
    for (size_t i = 0; i < terms_.size(); ++i)
      weight_[i] = static_cast<const S*>(terms_[i].weight)[b];
    normaliser_.assign(shape_.W, {0, 0});
    for (int64_t w = 0; w < shape_.W; ++w) expand(w);
    write(score, parent, token, parts);
    *bad = bad_;
  }

 private:
  S old_score(int64_t w) const { return score_[b_ * shape_.W + w]; }
  int64_t slot(int64_t w) const { return slot_ ? slot_[b_ * shape_.W + w] : 0; }
  const T* logits(int64_t w) const { return logits_ + (b_ * shape_.W + w) * shape_.V; }

  // Logits with penalty and temperature; they stay where they are if there is neither.
  const T* scaled(int64_t w) {
    const T* x = logits(w);
    if (options_.temperature == 1.0 && options_.blank_penalty == 0.0) return x;
    for (int64_t v = 0; v < shape_.V; ++v) scaled_[v] = x[v] / T(options_.temperature);
    scaled_[options_.blank] =
        (x[options_.blank] - T(options_.blank_penalty)) / T(options_.temperature);
    return scaled_.data();
  }

  T scaled_one(int64_t w, int64_t v) const {
    T x = logits(w)[v];
    if (v == options_.blank) x -= T(options_.blank_penalty);
    return options_.temperature == 1.0 ? x : x / T(options_.temperature);
  }

  T log_prob(int64_t w, int64_t v) const {
    return (scaled_one(w, v) - normaliser_[w].high) - normaliser_[w].log_sum;
  }

  // log P(not blank), which shares the terms' weight among the tokens (NeMo clamps at 0.01).
  T not_blank(int64_t w) const {
    return std::log(std::max(T(1) - std::exp(log_prob(w, options_.blank)), T(0.01)));
  }

  S term_weights() const {
    S sum = 0;
    for (const S weight : weight_) sum += weight;
    return sum;
  }

  // What term i adds to token v of hypothesis w.
  S part(int64_t i, int64_t w, int64_t v) const {
    if (weight_[i] == 0) return 0;
    if (silent_[v]) {
      const bool weighed = options_.weigh_blank && v == options_.blank;
      return weighed ? weight_[i] * log_prob(w, v) : S(0);
    }
    T value;
    const int64_t row = terms_[i].row[b_ * shape_.W + w];
    convert(terms_[i].rows, terms_[i].dtype, row * shape_.V + v, 1, &value);
    S result = weight_[i] * S(value);
    if (options_.weigh_blank) result += weight_[i] * S(not_blank(w));
    return result;
  }

  void offer(Best<S>& best, S total, int64_t w, int64_t v) {
    if (total != total || total == std::numeric_limits<S>::infinity()) {
      bad_ = true;
    } else if (total != -std::numeric_limits<S>::infinity()) {
      best.offer({total, w, v});
    }
  }

  S with_terms(S total, int64_t w, int64_t v) const {
    for (size_t i = 0; i < terms_.size(); ++i) total += part(i, w, v);
    if (reward_ && !silent_[v]) total += reward_[b_];
    return total;
  }

  // Offers every v in [0, V) whose base + x[v] can still be among the best. A candidate that the
  // audio rules out (-inf log_prob) is dead whatever its terms say.
  void scan(Best<S>& best, S base, const T* x, int64_t w) {
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    const auto bound = [&] {
      const S worst = best.worst();
      // Slack for the rounding of base + x; the exact comparison is offer's.
      const S slack = 8 * S(std::numeric_limits<T>::epsilon()) *
                      (std::abs(worst) + std::abs(base) + std::abs(worst - base));
      return std::isinf(worst) ? kNone : T(worst - base - slack);
    };
    for (int64_t v = loops_.next_above(x, 0, shape_.V, bound()); v < shape_.V;
         v = loops_.next_above(x, v + 1, shape_.V, bound())) {
      if (log_prob_[v] != kNone) offer(best, base + S(x[v]), w, v);
    }
  }

  void expand(int64_t w) {
    const S base = old_score(w);
    if (slot(w) == kDead || base == -std::numeric_limits<S>::infinity()) return;
    if (slot(w) == kKeep || base != base) return offer(best_, base, w, options_.blank);
    const T* x = scaled(w);
    const auto [high, sum, nan] = loops_.statistics(x, shape_.V);
    if (nan || high == std::numeric_limits<T>::infinity()) {
      bad_ = true;
      return;
    }
    if (std::isinf(high)) return;  // no token is possible
    normaliser_[w] = {high, T(std::log(sum))};
    if (slot(w) == kBlankOnly) {
      const S total = base + log_prob(w, options_.blank);
      return offer(best_,
                   options_.prune == Prune::after ? total : with_terms(total, w, options_.blank), w,
                   options_.blank);
    }
    loops_.log_softmax(x, high, normaliser_[w].log_sum, shape_.V, log_prob_.data());
    if (options_.prune == Prune::after) return scan(best_, base, log_prob_.data(), w);
    if (options_.prune == Prune::early) {
      own_.clear();
      scan(own_, 0, log_prob_.data(), w);
      for (const auto& [total, parent, v] : own_)
        offer(best_, with_terms(base + total, w, v), w, v);
      return;
    }
    add_terms(w);
    scan(best_, base, increment_.data(), w);
  }

  // increment_ = log_prob_ with every token's terms.
  void add_terms(int64_t w) {
    std::copy(log_prob_.begin(), log_prob_.end(), increment_.begin());
    for (size_t i = 0; i < terms_.size(); ++i) {
      if (weight_[i] == 0) continue;
      const int64_t offset = terms_[i].row[b_ * shape_.W + w] * shape_.V;
      const T* row = row_.data();
      if (terms_[i].dtype == (std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double)) {
        row = static_cast<const T*>(terms_[i].rows) + offset;
      } else {
        convert(terms_[i].rows, terms_[i].dtype, offset, shape_.V, row_.data());
      }
      loops_.add(row, T(weight_[i]), shape_.V, increment_.data());
    }
    T extra = reward_ ? T(reward_[b_]) : T(0);
    if (options_.weigh_blank) extra += T(term_weights()) * not_blank(w);
    if (extra != 0) {
      for (T& value : increment_) value += extra;
    }
    for (const int64_t v : options_.silent) increment_[v] = log_prob_[v];
    if (options_.weigh_blank) increment_[options_.blank] *= T(1) + T(term_weights());
  }

  void write(S* score, int64_t* parent, int64_t* token, S* parts) {
    const int64_t width = 1 + int64_t(terms_.size());
    int64_t out = 0;
    for (const auto& [total, w, v] : best_) {
      S final_total = total;
      if (options_.prune == Prune::after && slot(w) != kKeep) final_total = with_terms(total, w, v);
      if (final_total != final_total || final_total == std::numeric_limits<S>::infinity())
        bad_ = true;
      if (!std::isfinite(final_total)) continue;
      score[out] = final_total;
      parent[out] = w;
      token[out] = v;
      parts[out * width] = slot(w) == kKeep ? 0 : S(log_prob(w, v));
      for (int64_t i = 1; i < width; ++i) {
        parts[out * width + i] = slot(w) == kKeep ? 0 : part(i - 1, w, v);
      }
      ++out;
    }
    for (; out < shape_.W; ++out) {
      score[out] = -std::numeric_limits<S>::infinity();
      parent[out] = out;
      token[out] = options_.blank;
      std::fill_n(parts + out * width, width, S(0));
    }
  }

  struct Normaliser {
    T high, log_sum;
  };

  const BeamShape& shape_;
  const Options& options_;
  const std::vector<Term>& terms_;
  const T* logits_;
  const S* score_;
  const int64_t* slot_;
  const S* reward_;
  const BeamLoops<T>& loops_;
  Best<S> best_, own_;
  std::vector<bool> silent_;
  std::vector<T> scaled_, log_prob_, increment_, row_;
  std::vector<S> weight_;
  std::vector<Normaliser> normaliser_;
  int64_t b_ = 0;
  bool bad_ = false;
};

template <typename T, typename S>
void run(const BeamShape& shape, const Options& options, const std::vector<Term>& terms,
         const Tensor& am_logits, const Tensor& score, const int64_t* slot,
         const std::optional<Tensor>& reward, std::vector<Tensor>& out) {
  const auto* logits = static_cast<const T*>(am_logits.data_ptr());
  const auto* scores = static_cast<const S*>(score.data_ptr());
  const auto* rewards = reward ? static_cast<const S*>(reward->data_ptr()) : nullptr;
  auto* new_score = static_cast<S*>(out[0].data_ptr());
  auto* parent = static_cast<int64_t*>(out[1].data_ptr());
  auto* token = static_cast<int64_t*>(out[2].data_ptr());
  auto* parts = static_cast<S*>(out[3].data_ptr());
  auto* bad = static_cast<bool*>(out[4].data_ptr());
  const int64_t width = 1 + int64_t(terms.size());
  // A thread is worth its start from about 30,000 logits on.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, shape.W * shape.V));
  torch::stable::parallel_for(0, shape.B, grain, [&](int64_t begin, int64_t end) {
    Step<T, S> step(shape, options, terms, logits, scores, slot, rewards);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * shape.W;
      step.run(b, new_score + at, parent + at, token + at, parts + at * width, bad + b);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> beam_step_cpu(
    const Tensor& score, const Tensor& am_logits, const std::vector<Tensor>& rows,
    const std::vector<Tensor>& row, const std::vector<Tensor>& weight,
    const std::optional<Tensor>& slot, const std::vector<int64_t>& silent,
    const std::optional<Tensor>& token_reward, double temperature, double blank_penalty,
    const std::string& prune, bool weigh_blank) {
  const BeamShape shape =
      check_beam_step(score, am_logits, rows, row, weight, slot, silent, token_reward, temperature);
  const auto* codes = slot ? static_cast<const int64_t*>(slot->data_ptr()) : nullptr;
  check_beam_rows(shape, score, rows, row, slot);
  const Options options{silent[0],     silent,          temperature,
                        blank_penalty, prune_of(prune), weigh_blank};
  std::vector<Term> terms;
  for (size_t i = 0; i < rows.size(); ++i) {
    terms.push_back({rows[i].data_ptr(), rows[i].scalar_type(),
                     static_cast<const int64_t*>(row[i].data_ptr()), weight[i].data_ptr()});
  }
  const auto parts = int64_t(1 + terms.size());
  std::vector<Tensor> out{
      torch::stable::new_empty(score, {shape.B, shape.W}),
      torch::stable::new_empty(score, {shape.B, shape.W}, ScalarType::Long),
      torch::stable::new_empty(score, {shape.B, shape.W}, ScalarType::Long),
      torch::stable::new_empty(score, {shape.B, shape.W, parts}),
      torch::stable::new_empty(score, {shape.B}, ScalarType::Bool),
  };
  const bool wide_logits = am_logits.scalar_type() == ScalarType::Double;
  const bool wide_score = score.scalar_type() == ScalarType::Double;
  const auto search = wide_logits ? (wide_score ? run<double, double> : run<double, float>)
                                  : (wide_score ? run<float, double> : run<float, float>);
  search(shape, options, terms, am_logits, score, codes, token_reward, out);
  return {out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace
}  // namespace prunelm

STABLE_TORCH_LIBRARY_IMPL(prunelm, CPU, m) {
  m.impl("beam_step", TORCH_BOX(&prunelm::beam_step_cpu));
}
