// Hypotheses of a beam search as nodes of one prefix tree; contract in
// prunelm/decoding/prefix_tree.py. Host only, plain C++.
//
// Whatever does not fit throws before anything changes: std::out_of_range for an index of an
// utterance or slot, std::invalid_argument for the rest.
#pragma once

#include <cstdint>
#include <deque>
#include <unordered_map>
#include <utility>
#include <vector>

namespace prunelm {

class PrefixTree {
 public:
  struct Hypothesis {
    int32_t node = -1;  // -1: dead
    int32_t trace = -1;
  };

  // Nodes whose rows are to be computed: of the language models, or of the predictor.
  struct Rows {
    std::vector<int64_t> index;   // [R] where the row goes
    std::vector<int64_t> tokens;  // [R]
    std::vector<int64_t> path;    // [R, P] language model slots from the root, 0 past length
    std::vector<int64_t> length;  // [R]
    int64_t P = 0;
  };

  struct Emission {
    int64_t token;
    int64_t time;
    double log_prob;
  };

  // most: how many nodes and emissions there may be, INT32_MAX at most.
  PrefixTree(int64_t B, int64_t W, int64_t terms, int64_t vocabulary,
             const std::vector<int64_t>& silent, int64_t most);

  int64_t utterances() const { return B_; }
  int64_t beam() const { return W_; }
  int64_t terms() const { return terms_; }
  int64_t vocabulary() const { return int64_t(silent_.size()); }

  // Live state, [B, W] each; score and parts [B, W, 1 + terms] in the order of the utterances.
  std::vector<double>& score() { return score_; }
  std::vector<double>& parts() { return parts_; }
  std::vector<int64_t>& node() { return node_; }
  std::vector<int64_t>& row() { return row_; }

  // Upper bounds of what node() and the language models' rows may index from now on.
  int64_t node_capacity() const { return int64_t(nodes_.size()); }
  int64_t row_capacity() const { return rows_used_; }
  int64_t live_nodes() const { return int64_t(nodes_.size() - free_nodes_.size()); }

  // The nodes without a language model row among those that the candidates extend; `flat` [n, W]
  // becomes row * V + token for a candidate with terms, -1 for the others. False: none has terms.
  bool plan(int64_t n, const int64_t* parent, const int64_t* token, const double* score,
            int64_t* flat, Rows& rows);
  // The same for every live hypothesis of utterances begin to end.
  void plan_live(int64_t begin, int64_t end, Rows& rows);

  // Moves the first n utterances to the chosen candidates and merges equal prefixes. values
  // [terms, n, W] are what the terms add (null: they are in score and parts already); parts
  // [n, W, width]. Returns the first utterance with a candidate that is no number, or -1.
  int64_t advance(int64_t n, int64_t time, const int64_t* parent, const int64_t* token,
                  const double* score, const double* parts, int64_t width, const double* values);

  // Live nodes that have not been handed out yet, with their last `context` tokens (0: all of
  // them behind one start token), oldest first, filled up with 0 at the left; path is [R, P].
  void take_new(int64_t context, Rows& rows);

  std::vector<Emission> emissions(int64_t b, int64_t w) const;
  // Lets go of an utterance's nodes.
  void release(int64_t b);

 private:
  struct Node {
    int32_t parent = -1;
    int32_t token = 0;
    int32_t depth = 0;
    int32_t row = -1;           // language model slot
    int32_t refs = 0;           // children and live hypotheses
    int64_t unused_since = -1;  // when a hypothesis last left it
    bool handed_out = false;
  };
  struct Trace {
    int32_t previous;
    int32_t time;
    int32_t token;
    double log_prob;
  };

  int32_t child(int32_t parent, int32_t token);
  void hold(int32_t node) { ++nodes_[node].refs; }
  void drop(int32_t node);
  void sweep();
  // The chosen extensions name live hypotheses and tokens of the vocabulary.
  void check_step(int64_t n, const int64_t* parent, const int64_t* token,
                  const double* score) const;
  // Refuses more nodes and emissions than there may be.
  void make_room(int64_t emissions);
  // Nodes that lack a row, an ancestor before its descendants; they are marked until give_rows.
  class Wanted;
  void give_rows(const std::vector<int32_t>& order, Rows& rows);

  int64_t B_, W_, terms_, most_;
  std::vector<bool> silent_;
  std::vector<Node> nodes_;
  std::vector<int32_t> free_nodes_, free_rows_, fresh_;
  int64_t rows_used_ = 0;
  int64_t now_ = 0;
  std::unordered_map<uint64_t, int32_t> children_;
  std::deque<std::pair<int32_t, int64_t>> unused_;
  std::vector<Trace> traces_;
  std::vector<Hypothesis> hypotheses_, next_;
  std::vector<double> score_, parts_, next_score_, next_parts_;
  std::vector<int64_t> node_, row_;
};

}  // namespace prunelm
