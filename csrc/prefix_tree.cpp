// Contract in prunelm/decoding/prefix_tree.py.
#include "prefix_tree.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace prunelm {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();
// A prefix that leaves the beam often comes back within a few frames; its rows wait that long.
constexpr int64_t kLinger = 8;

uint64_t edge(int32_t parent, int32_t token) {
  return uint64_t(uint32_t(parent)) << 32 | uint32_t(token);
}

double log_add(double a, double b) {
  const double high = std::max(a, b);
  return high + std::log1p(std::exp(std::min(a, b) - high));
}

}  // namespace

PrefixTree::PrefixTree(int64_t B, int64_t W, int64_t terms, std::vector<bool> silent)
    : B_(B),
      W_(W),
      terms_(terms),
      silent_(std::move(silent)),
      nodes_(1),
      fresh_{0},
      hypotheses_(B * W),
      next_(W),
      score_(B * W, kNone),
      parts_(B * W * (1 + terms), 0.0),
      next_score_(W),
      next_parts_(W * (1 + terms)),
      node_(B * W, 0),
      row_(B * W, 0) {
  for (int64_t b = 0; b < B; ++b) {
    hypotheses_[b * W].node = 0;
    score_[b * W] = 0;
  }
  nodes_[0].refs = int32_t(B) + 1;  // the root stays
}

int32_t PrefixTree::child(int32_t parent, int32_t token) {
  const auto [entry, added] = children_.try_emplace(edge(parent, token), 0);
  if (!added) return entry->second;
  int32_t node;
  if (free_nodes_.empty()) {
    node = int32_t(nodes_.size());
    nodes_.emplace_back();
  } else {
    node = free_nodes_.back();
    free_nodes_.pop_back();
  }
  entry->second = node;
  nodes_[node] = Node{parent, token, nodes_[parent].depth + 1, -1, 0, -1, false};
  hold(parent);
  fresh_.push_back(node);
  return node;
}

void PrefixTree::drop(int32_t node) {
  nodes_[node].unused_since = now_;
  if (--nodes_[node].refs == 0) unused_.emplace_back(node, now_);
}

void PrefixTree::sweep() {
  while (!unused_.empty() && unused_.front().second + kLinger <= now_) {
    auto [node, since] = unused_.front();
    unused_.pop_front();
    // Held again, or freed by an earlier entry, or left anew: then a later entry has it.
    if (nodes_[node].refs > 0 || nodes_[node].unused_since != since) continue;
    // Upwards as long as nothing else holds the parent and no hypothesis left it just now.
    do {
      Node& dead = nodes_[node];
      children_.erase(edge(dead.parent, dead.token));
      if (dead.row >= 0) free_rows_.push_back(dead.row);
      free_nodes_.push_back(node);
      const int32_t parent = dead.parent;
      dead = Node{};
      node = parent;
      --nodes_[node].refs;
    } while (nodes_[node].refs == 0 && nodes_[node].unused_since + kLinger <= now_);
    if (nodes_[node].refs == 0) unused_.emplace_back(node, nodes_[node].unused_since = now_);
  }
}

void PrefixTree::add_row(int32_t node, Rows& rows, std::vector<int32_t>& order) {
  Node& here = nodes_[node];
  if (here.row >= 0) return;
  // Ancestors come first; as a rule they have their rows, since a child was made from them.
  if (here.parent >= 0) add_row(here.parent, rows, order);
  if (free_rows_.empty()) {
    here.row = int32_t(rows_used_++);
  } else {
    here.row = free_rows_.back();
    free_rows_.pop_back();
  }
  order.push_back(node);
  rows.index.push_back(here.row);
  rows.tokens.push_back(here.token);
  rows.length.push_back(here.depth + 1);
  rows.P = std::max<int64_t>(rows.P, here.depth + 1);
}

void PrefixTree::lay_out(const std::vector<int32_t>& order, Rows& rows) {
  rows.path.assign(order.size() * rows.P, 0);
  for (size_t r = 0; r < order.size(); ++r) {
    for (int32_t node = order[r]; node >= 0; node = nodes_[node].parent) {
      rows.path[r * rows.P + nodes_[node].depth] = nodes_[node].row;
    }
  }
}

bool PrefixTree::plan(int64_t n, const int64_t* parent, const int64_t* token, const double* score,
                      int64_t* flat, Rows& rows) {
  std::vector<int32_t> order;
  bool any = false;
  for (int64_t b = 0; b < n; ++b) {
    for (int64_t w = 0; w < W_; ++w) {
      const int64_t i = b * W_ + w;
      flat[i] = -1;
      if (score[i] == kNone || silent_[token[i]]) continue;
      const int32_t node = hypotheses_[b * W_ + parent[i]].node;
      add_row(node, rows, order);
      flat[i] = nodes_[node].row * vocabulary() + token[i];
      any = true;
    }
  }
  lay_out(order, rows);
  return any;
}

void PrefixTree::plan_live(int64_t begin, int64_t n, Rows& rows) {
  std::vector<int32_t> order;
  for (int64_t i = begin * W_; i < n * W_; ++i) {
    const int32_t node = hypotheses_[i].node;
    if (node < 0) continue;
    add_row(node, rows, order);
    row_[i] = nodes_[node].row;
  }
  lay_out(order, rows);
}

int64_t PrefixTree::advance(int64_t n, int64_t time, const int64_t* parent, const int64_t* token,
                            const double* score, const double* parts, int64_t width,
                            const double* values) {
  const int64_t P = 1 + terms_;
  int64_t bad = -1;
  ++now_;
  for (int64_t b = 0; b < n; ++b) {
    Hypothesis* old = &hypotheses_[b * W_];
    int64_t count = 0;
    for (int64_t w = 0; w < W_; ++w) {
      const int64_t i = b * W_ + w;
      if (score[i] == kNone) continue;
      const Hypothesis& from = old[parent[i]];
      const bool emits = !silent_[token[i]];
      double total = score[i];
      for (int64_t k = 0; values && emits && k < terms_; ++k) total += values[(k * n + b) * W_ + w];
      if (total == kNone) continue;
      if (!std::isfinite(total)) {
        if (bad < 0) bad = b;
        continue;
      }
      const int32_t node = emits ? child(from.node, int32_t(token[i])) : from.node;
      int64_t j = 0;
      while (j < count && next_[j].node != node) ++j;
      if (j < count) {  // the first entry keeps its times; only the acoustic part can differ
        const double merged = log_add(next_score_[j], total);
        next_parts_[j * P] += merged - next_score_[j];
        next_score_[j] = merged;
        continue;
      }
      ++count;
      next_[j] = {node, from.trace};
      if (emits) {
        traces_.push_back({from.trace, int32_t(time), int32_t(token[i]), parts[i * width]});
        next_[j].trace = int32_t(traces_.size() - 1);
      }
      next_score_[j] = total;
      const double* before = &parts_[(b * W_ + parent[i]) * P];
      for (int64_t k = 0; k < P; ++k) {
        next_parts_[j * P + k] = before[k] + (k < width ? parts[i * width + k] : 0.0);
        if (k > 0 && values && emits) next_parts_[j * P + k] += values[((k - 1) * n + b) * W_ + w];
      }
    }
    for (int64_t j = 0; j < count; ++j) hold(next_[j].node);
    for (int64_t w = 0; w < W_; ++w) {
      if (old[w].node >= 0) drop(old[w].node);
      const bool live = w < count;
      old[w] = live ? next_[w] : Hypothesis{};
      score_[b * W_ + w] = live ? next_score_[w] : kNone;
      node_[b * W_ + w] = live ? next_[w].node : 0;
    }
    std::copy_n(next_parts_.begin(), count * P, parts_.begin() + b * W_ * P);
  }
  sweep();
  return bad;
}

void PrefixTree::take_new(int64_t context, Rows& rows) {
  for (const int32_t node : fresh_) {
    if (nodes_[node].handed_out) continue;
    nodes_[node].handed_out = true;
    rows.index.push_back(node);
    rows.length.push_back(nodes_[node].depth + 1);
    rows.P = std::max<int64_t>(rows.P, nodes_[node].depth + 1);
  }
  fresh_.clear();
  if (context > 0) rows.P = context;
  rows.path.assign(rows.index.size() * rows.P, 0);
  for (size_t r = 0; r < rows.index.size(); ++r) {
    int64_t at = rows.P - 1;
    for (int32_t node = int32_t(rows.index[r]); node > 0 && at >= 0; node = nodes_[node].parent) {
      rows.path[r * rows.P + at--] = nodes_[node].token;
    }
  }
}

std::vector<PrefixTree::Emission> PrefixTree::emissions(int64_t b, int64_t w) const {
  std::vector<Emission> result;
  for (int32_t i = hypotheses_[b * W_ + w].trace; i >= 0; i = traces_[i].previous) {
    result.push_back({traces_[i].token, traces_[i].time, traces_[i].log_prob});
  }
  std::reverse(result.begin(), result.end());
  return result;
}

void PrefixTree::release(int64_t b) {
  for (int64_t i = b * W_; i < (b + 1) * W_; ++i) {
    if (hypotheses_[i].node >= 0) drop(hypotheses_[i].node);
    hypotheses_[i] = {};
    score_[i] = kNone;
    node_[i] = 0;
  }
}

}  // namespace prunelm
