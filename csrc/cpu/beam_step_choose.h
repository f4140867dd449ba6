// What beam_step's entries read, for the search of every utterance.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "cpu/number.h"

namespace prunelm {

struct BeamTerm {
  const void* rows;  // [L, V]
  Number number;
  int64_t L;
  const int64_t* row;  // [B, W]
  const void* weight;  // [B], as the scores
};

struct BeamOptions {
  std::vector<int64_t> silent;  // blank first
  double temperature, blank_penalty;
  Prune prune;
  bool weigh_blank;
  bool normalise;  // rows hold logits

  int64_t blank() const { return silent[0]; }
  // Lists of silent tokens are short.
  bool is_silent(int64_t v) const {
    return std::find(silent.begin(), silent.end(), v) != silent.end();
  }
};

// float32, or float64 where it is wide; no slot: all expand; no reward: 0.
struct BeamInput {
  BeamShape shape;
  bool wide_logits, wide_score;
  const void *logits, *score;
  const int64_t* slot;
  const void* reward;
  std::vector<BeamTerm> terms;
  BeamOptions options;
};

struct BeamOutput {
  void* score;
  int64_t *parent, *token;
  void* parts;
  bool* bad;
};

// Throws where a slot or row number is not as it may be.
void choose_extensions(const BeamInput& in, const BeamOutput& out);

}  // namespace prunelm
