// The search behind beam_step; contract in prunelm/ops/beam_step.py.
#include "cpu/beam_step_choose.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/beam_step.h"
#include "cpu/beam_step_workspace.h"

namespace prunelm {
namespace {

template <typename T>
const BeamLoops<T>& loops() {
  if constexpr (std::is_same_v<T, float>) return PRUNELM_CHOSEN(beam_loops_float);
  if constexpr (!std::is_same_v<T, float>) return PRUNELM_CHOSEN(beam_loops_double);
}

// The search of one utterance. T is the logits' type, S the scores'.
template <typename T, typename S>
class Step {
 public:
  Step(const BeamInput& in, Workspace<T, S>& workspace)
      : shape_(in.shape),
        options_(in.options),
        terms_(in.terms),
        logits_(static_cast<const T*>(in.logits)),
        score_(static_cast<const S*>(in.score)),
        slot_(in.slot),
        reward_(static_cast<const S*>(in.reward)),
        loops_(loops<T>()),
        work_(workspace),
        row_length_(std::max(in.shape.V, kLeastRow)),
        copies_(options_.temperature != 1.0 || options_.blank_penalty != 0.0 ||
                shape_.V < kLeastRow),
        fetches_(shape_.B * shape_.W * shape_.V * int64_t(sizeof(T) * (1 + terms_.size())) >
                 kNearCache) {
    const auto size = [&](auto& row, int64_t length, T rest) {
      row.resize(length);
      std::fill(row.begin() + shape_.V, row.end(), rest);
    };
    size(work_.scaled, row_length_, kNone);
    size(work_.row, row_length_, 0);
    size(work_.row_logits, row_length_, kNone);
    size(work_.increment, row_length_ + kIncrementPadding, kNone);
    work_.tops.resize(tops_size(row_length_));
    work_.found.resize(row_length_);
    work_.weight.resize(terms_.size());
    work_.normaliser.resize(shape_.W);
    work_.row_normaliser.resize(shape_.W * terms_.size());
    work_.order.resize(shape_.W);
  }

  void run(int64_t b, S* score, int64_t* parent, int64_t* token, S* parts, bool* bad) {
    b_ = b;
    bad_ = false;
    work_.best.clear(shape_.W);
    work_.row_is_known.assign(work_.row_normaliser.size(), false);
    for (size_t i = 0; i < terms_.size(); ++i)
      work_.weight[i] = static_cast<const S*>(terms_[i].weight)[b];
    // The best hypotheses first: after them few candidates are worth a look. The order shows in
    // nothing else.
    for (int64_t w = 0; w < shape_.W; ++w) {
      int64_t i = w;
      for (; i > 0 && old_score(w) > old_score(work_.order[i - 1]); --i)
        work_.order[i] = work_.order[i - 1];
      work_.order[i] = w;
    }
    for (int64_t i = 0; i < shape_.W; ++i) {
      if (fetches_) expect_rows(work_.order[i], i + 1 < shape_.W ? work_.order[i + 1] : -1);
      expand(work_.order[i]);
    }
    write(score, parent, token, parts);
    *bad = bad_;
  }

 private:
  static Normaliser<T> normaliser_of(T high, double sum) { return {high, T(std::log(sum))}; }

  static constexpr int64_t kNearCache = 1 << 20;  // bytes that are likely to be near anyway
  static constexpr Number kOwn = std::is_same_v<T, float> ? Number::f32 : Number::f64;
  static constexpr T kNone = -std::numeric_limits<T>::infinity();

  S old_score(int64_t w) const { return score_[b_ * shape_.W + w]; }
  int64_t slot(int64_t w) const { return slot_ ? slot_[b_ * shape_.W + w] : 0; }
  const T* logits(int64_t w) const { return logits_ + (b_ * shape_.W + w) * shape_.V; }

  // The terms' rows of hypothesis w, and the logits of the one after it; -1: none.
  void expect_rows(int64_t w, int64_t next) {
    if (next >= 0) expect(logits(next), shape_.V * sizeof(T));
    if (options_.prune != Prune::late || slot(w) != kExpand || !std::isfinite(old_score(w))) return;
    for (size_t i = 0; i < terms_.size(); ++i) {
      if (work_.weight[i] == 0) continue;
      const int64_t bytes = shape_.V * bytes_of(terms_[i].number);
      const int64_t row = terms_[i].row[b_ * shape_.W + w];
      expect(static_cast<const char*>(terms_[i].rows) + row * bytes, bytes);
    }
  }

  // Logits with penalty and temperature, filled up if short; else they stay where they are.
  const T* scaled(int64_t w) {
    const T* x = logits(w);
    if (!copies_) return x;
    T* const y = work_.scaled.data();
    std::copy(x, x + shape_.V, y);
    y[options_.blank()] -= T(options_.blank_penalty);
    if (options_.temperature != 1.0) {
      for (int64_t v = 0; v < shape_.V; ++v) y[v] /= T(options_.temperature);
    }
    return y;
  }

  T scaled_one(int64_t w, int64_t v) const {
    T x = logits(w)[v];
    if (v == options_.blank()) x -= T(options_.blank_penalty);
    return options_.temperature == 1.0 ? x : x / T(options_.temperature);
  }

  T log_prob(int64_t w, int64_t v) const {
    return (scaled_one(w, v) - work_.normaliser[w].high) - work_.normaliser[w].log_sum;
  }

  // log P(not blank), which shares the terms' weight among the tokens (NeMo clamps at 0.01).
  T not_blank(int64_t w) const {
    return std::log(std::max(T(1) - std::exp(log_prob(w, options_.blank())), T(0.01)));
  }

  S term_weights() const {
    S sum = 0;
    for (const S weight : work_.weight) sum += weight;
    return sum;
  }

  // What term i adds to token v of hypothesis w.
  S part(int64_t i, int64_t w, int64_t v) {
    if (work_.weight[i] == 0) return 0;
    if (options_.is_silent(v)) {
      const bool weighed = options_.weigh_blank && v == options_.blank();
      return weighed ? work_.weight[i] * log_prob(w, v) : S(0);
    }
    T value;
    const int64_t row = terms_[i].row[b_ * shape_.W + w];
    convert(terms_[i].rows, terms_[i].number, row * shape_.V + v, 1, &value);
    if (options_.normalise) {
      const Normaliser<T>& row = row_normaliser(i, w);
      value = (value - row.high) - row.log_sum;
    }
    S result = work_.weight[i] * S(value);
    if (options_.weigh_blank) result += work_.weight[i] * S(not_blank(w));
    return result;
  }

  void offer(Best<S>& best, S total, int64_t w, int64_t v) {
    if (total != total || total == std::numeric_limits<S>::infinity()) {
      bad_ = true;
    } else if (total != -std::numeric_limits<S>::infinity()) {
      best.offer({total, w, v});
    }
  }

  S with_terms(S total, int64_t w, int64_t v) {
    for (size_t i = 0; i < terms_.size(); ++i) total += part(i, w, v);
    if (reward_ && !options_.is_silent(v)) total += reward_[b_];
    return total;
  }

  // Offers every v whose base + increment can be among the best.
  void scan(Best<S>& best, S base, int64_t w) {
    const T* x = work_.increment.data();
    S worst = best.worst();
    if (!best.full()) worst = base + S(loops_.reached(work_.tops.data(), row_length_, shape_.W));
    // Slack for the rounding of base + x, and for ties; the exact comparison is offer's. Sums are
    // rounded in S and the bound in T: the coarser of them counts.
    using Coarser = std::conditional_t<(sizeof(T) < sizeof(S)), T, S>;
    const S slack = S(std::numeric_limits<Coarser>::min()) +
                    8 * S(std::numeric_limits<Coarser>::epsilon()) *
                        (std::abs(worst) + std::abs(base) + std::abs(worst - base));
    const T bound = std::isfinite(worst) ? T(worst - base - slack) : kNone;
    const int64_t count =
        loops_.above(x, work_.tops.data(), row_length_, bound, work_.found.data());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t v = work_.found[i];
      offer(best, base + S(x[v]), w, v);
    }
  }

  void expand(int64_t w) {
    const S base = old_score(w);
    if (slot(w) == kDead || base == -std::numeric_limits<S>::infinity()) return;
    if (!std::isfinite(base)) {
      bad_ = true;
      return;
    }
    if (slot(w) == kKeep) return offer(work_.best, base, w, options_.blank());
    const T* x = scaled(w);
    const auto [high, sum, nan] = loops_.statistics(x, row_length_);
    if (nan || high == std::numeric_limits<T>::infinity()) {
      bad_ = true;
      return;
    }
    if (std::isinf(high)) return;  // no token is possible
    work_.normaliser[w] = normaliser_of(high, sum);
    if (slot(w) == kBlankOnly) {
      const S total = base + log_prob(w, options_.blank());
      return offer(work_.best,
                   options_.prune == Prune::after ? total : with_terms(total, w, options_.blank()),
                   w, options_.blank());
    }
    if (options_.prune == Prune::late) {
      combine_terms(x, w);
      return scan(work_.best, base, w);
    }
    combine({x, high, work_.normaliser[w].log_sum, nullptr, Number::f32, 0, 0});
    if (options_.prune == Prune::after) return scan(work_.best, base, w);
    work_.own.clear(std::min(shape_.W, shape_.V));
    scan(work_.own, 0, w);
    for (const auto& [total, parent, v] : work_.own)
      offer(work_.best, with_terms(base + total, w, v), w, v);
  }

  bool combine(const Increments<T>& of) {
    return loops_.combine(of, row_length_, work_.increment.data(), work_.tops.data());
  }

  // Increments are every token's log_prob with its terms.
  void combine_terms(const T* x, int64_t w) {
    T extra = reward_ ? T(reward_[b_]) : T(0);
    if (options_.weigh_blank) extra += T(term_weights()) * not_blank(w);
    T* const increment = work_.increment.data();
    Increments<T> next{
        x, work_.normaliser[w].high, work_.normaliser[w].log_sum, nullptr, Number::f32, 0, 0};
    bool suspect = false;
    for (size_t i = 0; i < terms_.size(); ++i) {
      if (work_.weight[i] == 0) continue;
      if (next.row) {
        suspect |= combine(next);
        next.x = increment;
        next.high = next.log_sum = 0;
      }
      next.row = row_of(terms_[i], w, &next.number);
      next.weight = T(work_.weight[i]);
      if (options_.normalise) {
        const Normaliser<T>& row = row_normaliser(i, w);
        extra -= next.weight * (row.high + row.log_sum);
      }
    }
    next.extra = extra;
    suspect |= combine(next);
    for (const int64_t v : options_.silent) increment[v] = log_prob(w, v);
    if (options_.weigh_blank) increment[options_.blank()] *= T(1) + T(term_weights());
    if (suspect) {
      drop_what_is_no_number(w);
      loops_.renew(increment, 0, row_length_, work_.tops.data());
    } else {
      for (const int64_t v : options_.silent) loops_.renew(increment, v, v + 1, work_.tops.data());
    }
  }

  // A token that the audio rules out is dead, whatever its terms say.
  void drop_what_is_no_number(int64_t w) {
    for (int64_t v = 0; v < shape_.V; ++v) {
      T& increment = work_.increment[v];
      if (increment < std::numeric_limits<T>::infinity()) continue;
      if (log_prob(w, v) != kNone) bad_ = true;
      increment = kNone;
    }
    // What fills a short row up is -inf, and NaN after weights or rewards that are no numbers.
    std::fill(work_.increment.begin() + shape_.V, work_.increment.end(), kNone);
  }

  // Of term i's row for hypothesis w; NaN where there is none.
  const Normaliser<T>& row_normaliser(int64_t i, int64_t w) {
    const int64_t at = w * int64_t(terms_.size()) + i;
    Normaliser<T>& found = work_.row_normaliser[at];
    if (std::exchange(work_.row_is_known[at], true)) return found;
    const BeamTerm& term = terms_[i];
    const int64_t offset = term.row[b_ * shape_.W + w] * shape_.V;
    const T* x = static_cast<const T*>(term.rows) + offset;
    if (term.number != kOwn || shape_.V < kLeastRow) {
      convert(term.rows, term.number, offset, shape_.V, work_.row_logits.data());
      x = work_.row_logits.data();
    }
    const auto [high, sum, nan] = loops_.statistics(x, row_length_);
    constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
    found = nan || std::isinf(high) ? Normaliser<T>{kNaN, kNaN} : normaliser_of(high, sum);
    return found;
  }

  // Where a term's row for hypothesis w lies, converted and filled up if need be.
  const void* row_of(const BeamTerm& term, int64_t w, Number* number) {
    const int64_t offset = term.row[b_ * shape_.W + w] * shape_.V;
    constexpr bool is_float = std::is_same_v<T, float>;
    const bool half = term.number == Number::bf16 || term.number == Number::f16;
    if (shape_.V >= kLeastRow && (term.number == kOwn || (is_float && half))) {
      *number = term.number;
      return static_cast<const char*>(term.rows) + offset * bytes_of(term.number);
    }
    convert(term.rows, term.number, offset, shape_.V, work_.row.data());
    *number = kOwn;
    return work_.row.data();
  }

  void write(S* score, int64_t* parent, int64_t* token, S* parts) {
    const int64_t width = 1 + int64_t(terms_.size());
    int64_t out = 0;
    for (const auto& [total, w, v] : work_.best) {
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
      token[out] = options_.blank();
      std::fill_n(parts + out * width, width, S(0));
    }
  }

  const BeamShape& shape_;
  const BeamOptions& options_;
  const std::vector<BeamTerm>& terms_;
  const T* logits_;
  const S* score_;
  const int64_t* slot_;
  const S* reward_;
  const BeamLoops<T>& loops_;
  Workspace<T, S>& work_;
  const int64_t row_length_;  // V, or what the loops want at least
  const bool copies_;         // logits are changed or filled up
  const bool fetches_;
  int64_t b_ = 0;
  bool bad_ = false;
};

template <typename T, typename S>
void run(const BeamInput& in, const BeamOutput& out) {
  const BeamShape& shape = in.shape;
  const int64_t width = 1 + int64_t(in.terms.size());
  // A thread is worth its start from about 30,000 logits on.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, shape.W * shape.V));
  torch::stable::parallel_for(0, shape.B, grain, [&](int64_t begin, int64_t end) {
    static thread_local Workspace<T, S> workspace;
    Step<T, S> step(in, workspace);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * shape.W;
      step.run(b, static_cast<S*>(out.score) + at, out.parent + at, out.token + at,
               static_cast<S*>(out.parts) + at * width, out.bad + b);
    }
  });
}

// Slot codes, and the row numbers of hypotheses that may be expanded.
template <typename S>
void check_rows(const BeamInput& in) {
  const int64_t slots = in.shape.B * in.shape.W;
  for (int64_t i = 0; in.slot && i < slots; ++i) {
    if (in.slot[i] < kExpand || in.slot[i] > kDead) {
      refuse("slot", "0 to 3", std::to_string(in.slot[i]));
    }
  }
  for (const BeamTerm& term : in.terms) {
    for (int64_t i = 0; i < slots; ++i) {
      if (in.slot && in.slot[i] != kExpand) continue;
      if (static_cast<const S*>(in.score)[i] == -std::numeric_limits<S>::infinity()) continue;
      if (term.row[i] < 0 || term.row[i] >= term.L) {
        refuse("row", "0 to " + std::to_string(term.L - 1), std::to_string(term.row[i]));
      }
    }
  }
}

}  // namespace

void choose_extensions(const BeamInput& in, const BeamOutput& out) {
  in.wide_score ? check_rows<double>(in) : check_rows<float>(in);
  const auto search = in.wide_logits ? (in.wide_score ? run<double, double> : run<double, float>)
                                     : (in.wide_score ? run<float, double> : run<float, float>);
  search(in, out);
}

}  // namespace prunelm
