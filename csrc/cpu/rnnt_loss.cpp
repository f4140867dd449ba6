// RNN-T loss with its gradient in one pass per utterance; contract in prunelm/ops/rnnt_loss.py.
#include "rnnt_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "check.h"

namespace prunelm {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();

template <typename T>
const RnntLoops<T>& loops() {
  if constexpr (std::is_same_v<T, float>) return PRUNELM_CHOSEN(rnnt_loops_float);
  if constexpr (!std::is_same_v<T, float>) return PRUNELM_CHOSEN(rnnt_loops_double);
}

// NaN where a or b is: they are not ordered, so that both branches below must pass NaN on.
double log_add(double a, double b) {
  const bool a_is_higher = a > b;
  const double high = a_is_higher ? a : b, low = a_is_higher ? b : a;
  if (high == kNone) return low;
  const double below = low - high;
  if (below < -40) return high;  // e^-40 is less than half of 1's last bit
  return high + std::log1p(std::exp(below));
}

// One utterance: the lattice in double, because T + U terms of float32 lose what the loss needs.
// `out` holds exp(logits) up to a factor per cell, then the gradient.
template <typename T>
class Lattice {
 public:
  Lattice(const T* logits, const int64_t* targets, T* out, int64_t frames, int64_t tokens,
          int64_t U1, int64_t V, int64_t blank)
      : logits_(logits),
        targets_(targets),
        out_(out),
        frames_(frames),
        tokens_(tokens),
        U1_(U1),
        V_(V),
        blank_(blank),
        loops_(loops<T>()),
        normaliser_(frames * (tokens + 1)),
        alpha_(normaliser_.size(), kNone),
        beta_(normaliser_.size(), kNone) {}

  double loss() {
    for (int64_t t = 0; t < frames_; ++t) {
      for (int64_t u = 0; u <= tokens_; ++u) {
        normaliser_[cell(t, u)] = loops_.exponentials(logits_ + row(t, u), V_, out_ + row(t, u));
      }
    }
    beta_[cell(frames_ - 1, tokens_)] = blank_score(frames_ - 1, tokens_);
    for (int64_t t = frames_ - 1; t >= 0; --t) {
      for (int64_t u = tokens_; u >= 0; --u) {
        double& here = beta_[cell(t, u)];
        if (t + 1 < frames_) here = log_add(here, beta_[cell(t + 1, u)] + blank_score(t, u));
        if (u < tokens_) here = log_add(here, beta_[cell(t, u + 1)] + token_score(t, u));
      }
    }
    return -beta_[0];
  }

  // d loss / d logit[v] = P(cell) softmax[v] - P(arc v out of the cell).
  void gradient() {
    alpha_[0] = 0;
    for (int64_t t = 0; t < frames_; ++t) {
      for (int64_t u = 0; u <= tokens_; ++u) {
        double& here = alpha_[cell(t, u)];
        if (t > 0) here = log_add(here, alpha_[cell(t - 1, u)] + blank_score(t - 1, u));
        if (u > 0) here = log_add(here, alpha_[cell(t, u - 1)] + token_score(t, u - 1));
        fill_row(t, u);
      }
    }
  }

 private:
  int64_t cell(int64_t t, int64_t u) const { return t * (tokens_ + 1) + u; }
  int64_t row(int64_t t, int64_t u) const { return (t * U1_ + u) * V_; }
  double blank_score(int64_t t, int64_t u) const {
    return logits_[row(t, u) + blank_] - normaliser_[cell(t, u)].log_sum;
  }
  double token_score(int64_t t, int64_t u) const {
    return logits_[row(t, u) + targets_[u]] - normaliser_[cell(t, u)].log_sum;
  }

  void fill_row(int64_t t, int64_t u) {
    T* out = out_ + row(t, u);
    const double through = alpha_[cell(t, u)] - beta_[0];
    const double share = std::exp(through + beta_[cell(t, u)]);
    loops_.scale(out, T(share / normaliser_[cell(t, u)].sum), V_);
    const bool last = t + 1 == frames_;
    if (!last || u == tokens_) {
      const double rest = last ? 0 : beta_[cell(t + 1, u)];
      out[blank_] -= T(std::exp(through + blank_score(t, u) + rest));
    }
    if (u < tokens_) {
      out[targets_[u]] -= T(std::exp(through + token_score(t, u) + beta_[cell(t, u + 1)]));
    }
  }

  const T* logits_;
  const int64_t* targets_;
  T* out_;
  const int64_t frames_, tokens_, U1_, V_, blank_;
  const RnntLoops<T>& loops_;
  std::vector<Normaliser> normaliser_;
  std::vector<double> alpha_, beta_;
};

template <typename T>
void run(const RnntShape& s, const Tensor& logits, const Tensor& targets,
         const Tensor& logit_lengths, const Tensor& target_lengths, int64_t blank, Tensor& loss,
         Tensor& gradient) {
  const auto* scores = static_cast<const T*>(logits.data_ptr());
  const auto* tokens = static_cast<const int64_t*>(targets.data_ptr());
  const auto* frame_counts = static_cast<const int64_t*>(logit_lengths.data_ptr());
  const auto* token_counts = static_cast<const int64_t*>(target_lengths.data_ptr());
  auto* losses = static_cast<T*>(loss.data_ptr());
  auto* gradients = static_cast<T*>(gradient.data_ptr());
  const int64_t size = s.T * s.U1 * s.V;
  torch::stable::parallel_for(0, s.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Lattice<T> lattice(scores + b * size, tokens + b * (s.U1 - 1), gradients + b * size,
                         frame_counts[b], token_counts[b], s.U1, s.V, blank);
      losses[b] = T(lattice.loss());
      lattice.gradient();
    }
  });
}

std::tuple<Tensor, Tensor> rnnt_loss_cpu(const Tensor& logits, const Tensor& targets,
                                         const Tensor& logit_lengths, const Tensor& target_lengths,
                                         int64_t blank) {
  const RnntShape s = check_rnnt_loss(logits, targets, logit_lengths, target_lengths, blank);
  Tensor loss = torch::stable::new_empty(logits, {s.B});
  // Zeros: the padding past an utterance's own lengths has no gradient.
  Tensor gradient = torch::stable::new_zeros(logits, {s.B, s.T, s.U1, s.V});
  if (logits.scalar_type() == ScalarType::Float) {
    run<float>(s, logits, targets, logit_lengths, target_lengths, blank, loss, gradient);
  } else if (logits.scalar_type() == ScalarType::Double) {
    run<double>(s, logits, targets, logit_lengths, target_lengths, blank, loss, gradient);
  } else {
    refuse("logits", "float32 or float64", torch::headeronly::toString(logits.scalar_type()));
  }
  return {loss, gradient};
}

}  // namespace
}  // namespace prunelm

STABLE_TORCH_LIBRARY_IMPL(prunelm, CPU, m) {
  m.impl("rnnt_loss", TORCH_BOX(&prunelm::rnnt_loss_cpu));
}
