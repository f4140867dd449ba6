// Contract in prunelm/decoding/prefix_tree.py.
#include "prefix_tree.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace prunelm {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();
// A prefix that leaves the beam often comes back within a few frames; its rows wait that long.
constexpr int64_t kLinger = 8;

uint64_t edge(int32_t parent, int32_t token) {
  return uint64_t(uint32_t(parent)) << 32 | uint32_t(token);
}

// Of a beam's state, and of the paths that one call lays out, 8 bytes each: what asks for more is
// a mistake, and would take the machine's memory.
constexpr int64_t kMostNumbers = int64_t{1} << 28;

std::string range_text(const std::string& name, int64_t least, int64_t most, int64_t found) {
  return name + ": expected " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
         std::to_string(found);
}

void expect_between(const char* name, int64_t found, int64_t least, int64_t most) {
  if (found < least || found > most) {
    throw std::invalid_argument(range_text(name, least, most, found));
  }
}

void expect_index(const char* name, int64_t found, int64_t count) {
  if (found >= 0 && found < count) return;
  throw std::out_of_range(count > 0 ? range_text(name, 0, count - 1, found)
                                    : std::string(name) + ": expected none, got " +
                                          std::to_string(found));
}

// Lays out [count, P] numbers of `rows.path`.
void make_path(PrefixTree::Rows& rows, size_t count) {
  if (rows.P > 0 && int64_t(count) > kMostNumbers / rows.P) {
    throw std::invalid_argument("path: expected at most " + std::to_string(kMostNumbers) +
                                " numbers, got " + std::to_string(count) + " rows of " +
                                std::to_string(rows.P));
  }
  rows.path.assign(count * rows.P, 0);
}

double log_add(double a, double b) {
  const double high = std::max(a, b);
  return high + std::log1p(std::exp(std::min(a, b) - high));
}

}  // namespace

PrefixTree::PrefixTree(int64_t B, int64_t W, int64_t terms, int64_t vocabulary,
                       const std::vector<int64_t>& silent, int64_t most)
    : B_(B), W_(W), terms_(terms), most_(most) {
  expect_between("utterances", B, 0, kMostNumbers);
  expect_between("beam", W, 1, kMostNumbers);
  expect_between("terms", terms, 0, kMostNumbers);
  expect_between("vocabulary", vocabulary, 1, INT32_MAX);
  expect_between("most", most, 1, INT32_MAX);
  const int64_t P = 1 + terms;
  if (W > kMostNumbers / P || B > kMostNumbers / (W * P)) {
    throw std::invalid_argument("utterances x beam x (1 + terms): expected at most " +
                                std::to_string(kMostNumbers) + ", got " + std::to_string(B) +
                                " x " + std::to_string(W) + " x " + std::to_string(P));
  }
  for (const int64_t token : silent) expect_between("silent", token, 0, vocabulary - 1);
  silent_.resize(vocabulary);
  for (const int64_t token : silent) silent_[token] = true;
  nodes_.resize(1);
  fresh_.push_back(0);
  hypotheses_.resize(B * W);
  next_.resize(W);
  score_.resize(B * W, kNone);
  parts_.resize(B * W * P);
  next_score_.resize(W);
  next_parts_.resize(W * P);
  node_.resize(B * W);
  row_.resize(B * W);
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

void PrefixTree::check_step(int64_t n, const int64_t* parent, const int64_t* token,
                            const double* score) const {
  if (n < 0 || n > B_) throw std::invalid_argument(range_text("utterances", 0, B_, n));
  for (int64_t i = 0; i < n * W_; ++i) {
    if (score[i] == kNone) continue;
    const auto named = [&](const char* name) {
      return std::string(name) + " of utterance " + std::to_string(i / W_) + ", slot " +
             std::to_string(i % W_);
    };
    if (parent[i] < 0 || parent[i] >= W_) {
      throw std::out_of_range(range_text(named("parent"), 0, W_ - 1, parent[i]));
    }
    if (token[i] < 0 || token[i] >= vocabulary()) {
      throw std::out_of_range(range_text(named("token"), 0, vocabulary() - 1, token[i]));
    }
    if (hypotheses_[i / W_ * W_ + parent[i]].node < 0) {
      throw std::invalid_argument(named("parent") + ": expected a live hypothesis, got slot " +
                                  std::to_string(parent[i]) + ", which is dead");
    }
  }
}

class PrefixTree::Wanted {
 public:
  explicit Wanted(std::vector<Node>& nodes) : nodes_(nodes) {}
  Wanted(const Wanted&) = delete;
  ~Wanted() {  // where rows were not given, as before
    for (const int32_t node : order) {
      if (nodes_[node].row == kMarked) nodes_[node].row = kNoRow;
    }
  }

  void add(int32_t node) {
    // As a rule ancestors have their rows, since a child was made from them.
    const auto first = int64_t(order.size());
    for (; node >= 0 && nodes_[node].row == kNoRow; node = nodes_[node].parent) {
      order.push_back(node);
      nodes_[node].row = kMarked;
    }
    std::reverse(order.begin() + first, order.end());
  }

  std::vector<int32_t> order;

 private:
  static constexpr int32_t kNoRow = -1, kMarked = -2;
  std::vector<Node>& nodes_;
};

void PrefixTree::give_rows(const std::vector<int32_t>& order, Rows& rows) {
  for (const int32_t node : order) rows.P = std::max<int64_t>(rows.P, nodes_[node].depth + 1);
  make_path(rows, order.size());
  for (std::vector<int64_t>* list : {&rows.index, &rows.tokens, &rows.length}) {
    list->reserve(order.size());
  }
  for (const int32_t node : order) {  // nothing throws from here on
    Node& here = nodes_[node];
    if (free_rows_.empty()) {
      here.row = int32_t(rows_used_++);
    } else {
      here.row = free_rows_.back();
      free_rows_.pop_back();
    }
    rows.index.push_back(here.row);
    rows.tokens.push_back(here.token);
    rows.length.push_back(here.depth + 1);
  }
  for (size_t r = 0; r < order.size(); ++r) {
    for (int32_t node = order[r]; node >= 0; node = nodes_[node].parent) {
      rows.path[r * rows.P + nodes_[node].depth] = nodes_[node].row;
    }
  }
}

bool PrefixTree::plan(int64_t n, const int64_t* parent, const int64_t* token, const double* score,
                      int64_t* flat, Rows& rows) {
  check_step(n, parent, token, score);
  const auto from = [&](int64_t i) { return hypotheses_[i / W_ * W_ + parent[i]].node; };
  const auto emits = [&](int64_t i) { return score[i] != kNone && !silent_[token[i]]; };
  Wanted wanted(nodes_);
  for (int64_t i = 0; i < n * W_; ++i) {
    if (emits(i)) wanted.add(from(i));
  }
  give_rows(wanted.order, rows);
  bool any = false;
  for (int64_t i = 0; i < n * W_; ++i) {
    flat[i] = emits(i) ? nodes_[from(i)].row * vocabulary() + token[i] : -1;
    any |= emits(i);
  }
  return any;
}

void PrefixTree::plan_live(int64_t begin, int64_t end, Rows& rows) {
  if (begin < 0 || begin > B_) throw std::out_of_range(range_text("begin", 0, B_, begin));
  if (end < begin || end > B_) throw std::out_of_range(range_text("end", begin, B_, end));
  Wanted wanted(nodes_);
  for (int64_t i = begin * W_; i < end * W_; ++i) wanted.add(hypotheses_[i].node);
  give_rows(wanted.order, rows);
  for (int64_t i = begin * W_; i < end * W_; ++i) {
    if (hypotheses_[i].node >= 0) row_[i] = nodes_[hypotheses_[i].node].row;
  }
}

void PrefixTree::make_room(int64_t emissions) {
  const auto check = [&](const char* name, int64_t count) {
    if (count + emissions <= most_) return;
    throw std::invalid_argument(std::string(name) + ": expected at most " + std::to_string(most_) +
                                ", got " + std::to_string(count) + " and up to " +
                                std::to_string(emissions) + " more");
  };
  check("nodes", live_nodes());
  check("emissions", int64_t(traces_.size()));
}

int64_t PrefixTree::advance(int64_t n, int64_t time, const int64_t* parent, const int64_t* token,
                            const double* score, const double* parts, int64_t width,
                            const double* values) {
  const int64_t P = 1 + terms_;
  check_step(n, parent, token, score);
  expect_between("time", time, 0, INT32_MAX);
  expect_between("parts: numbers of each extension", width, 1, P);
  make_room(n * W_);
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
  expect_between("context", context, 0, kMostNumbers);
  int64_t deepest = 0;
  try {
    for (const int32_t node : fresh_) {  // twice where its number was used again
      if (nodes_[node].handed_out) continue;
      rows.index.push_back(node);
      nodes_[node].handed_out = true;
      rows.length.push_back(nodes_[node].depth + 1);
      deepest = std::max<int64_t>(deepest, nodes_[node].depth + 1);
    }
    rows.P = context > 0 ? context : deepest;
    make_path(rows, rows.index.size());
  } catch (...) {
    for (const int64_t node : rows.index) nodes_[node].handed_out = false;
    throw;
  }
  fresh_.clear();
  for (size_t r = 0; r < rows.index.size(); ++r) {
    int64_t at = rows.P - 1;
    for (int32_t node = int32_t(rows.index[r]); node > 0 && at >= 0; node = nodes_[node].parent) {
      rows.path[r * rows.P + at--] = nodes_[node].token;
    }
  }
}

std::vector<PrefixTree::Emission> PrefixTree::emissions(int64_t b, int64_t w) const {
  expect_index("utterance", b, B_);
  expect_index("slot", w, W_);
  std::vector<Emission> result;
  for (int32_t i = hypotheses_[b * W_ + w].trace; i >= 0; i = traces_[i].previous) {
    result.push_back({traces_[i].token, traces_[i].time, traces_[i].log_prob});
  }
  std::reverse(result.begin(), result.end());
  return result;
}

void PrefixTree::release(int64_t b) {
  expect_index("utterance", b, B_);
  for (int64_t i = b * W_; i < (b + 1) * W_; ++i) {
    if (hypotheses_[i].node >= 0) drop(hypotheses_[i].node);
    hypotheses_[i] = {};
    score_[i] = kNone;
    node_[i] = 0;
  }
}

}  // namespace prunelm
