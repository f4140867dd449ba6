// beam_step's entries on CPU: through torch's dispatcher, and past it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/beam_step_choose.h"
#include "cpu/direct.h"
#include "cpu/linear.h"

namespace prunelm {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> beam_step_cpu(
    const Tensor& score, const Tensor& am_logits, const std::vector<Tensor>& rows,
    const std::vector<Tensor>& row, const std::vector<Tensor>& weight,
    const std::optional<Tensor>& slot, const std::vector<int64_t>& silent,
    const std::optional<Tensor>& token_reward, double temperature, double blank_penalty,
    const std::string& prune, bool weigh_blank) {
  const BeamShape shape =
      check_beam_step(score, am_logits, rows, row, weight, slot, silent, token_reward, temperature);
  BeamInput in{shape,
               am_logits.scalar_type() == ScalarType::Double,
               score.scalar_type() == ScalarType::Double,
               am_logits.data_ptr(),
               score.data_ptr(),
               slot ? static_cast<const int64_t*>(slot->data_ptr()) : nullptr,
               token_reward ? token_reward->data_ptr() : nullptr,
               {},
               {silent, temperature, blank_penalty, prune_of(prune), weigh_blank, false}};
  for (size_t i = 0; i < rows.size(); ++i) {
    in.terms.push_back({rows[i].data_ptr(), number_of("rows", rows[i]), rows[i].size(0),
                        static_cast<const int64_t*>(row[i].data_ptr()), weight[i].data_ptr()});
  }
  const auto parts = int64_t(1 + rows.size());
  const Tensor out[] = {
      torch::stable::new_empty(score, {shape.B, shape.W}),
      torch::stable::new_empty(score, {shape.B, shape.W}, ScalarType::Long),
      torch::stable::new_empty(score, {shape.B, shape.W}, ScalarType::Long),
      torch::stable::new_empty(score, {shape.B, shape.W, parts}),
      torch::stable::new_empty(score, {shape.B}, ScalarType::Bool),
  };
  choose_extensions(in, {out[0].data_ptr(), static_cast<int64_t*>(out[1].data_ptr()),
                         static_cast<int64_t*>(out[2].data_ptr()), out[3].data_ptr(),
                         static_cast<bool*>(out[4].data_ptr())});
  return {out[0], out[1], out[2], out[3], out[4]};
}

// What beam_step was given, read past the dispatcher.
class DirectBeam {
 public:
  BeamInput in{};

  // score, am_logits, terms, slot, silent, token_reward, temperature, blank_penalty, prune,
  // weigh_blank, normalise; terms and silent are tuples, so that nobody changes them meanwhile.
  bool read(PyObject* const* given) {
    PyObject *const terms = given[2], *const silent = given[4];
    if (!PyTuple_CheckExact(terms) || !PyTuple_CheckExact(silent)) return false;
    std::vector<PyObject*> tensors{given[0], given[1], given[3]};
    reward_is_tensor_ = given[5] != Py_None && !PyFloat_CheckExact(given[5]);
    if (reward_is_tensor_) tensors.push_back(given[5]);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(terms); ++i) {
      PyObject* const term = PyTuple_GET_ITEM(terms, i);
      if (!PyTuple_CheckExact(term) || PyTuple_GET_SIZE(term) != 3) return false;
      for (Py_ssize_t j = 0; j < 3; ++j) tensors.push_back(PyTuple_GET_ITEM(term, j));
    }
    if (!unwatched(tensors.data(), tensors.size())) return false;
    return read_scores(given[0], given[1]) && read_slot(given[3]) && read_reward(given[5]) &&
           read_terms(terms) && read_silent(silent) && read_options(given + 6);
  }

  std::optional<DirectResults> results;  // score, parent, token, parts, bad
  void make_results() {
    const auto [B, W, V] = in.shape;
    const auto parts = int64_t(1 + in.terms.size());
    const uint8_t bits = in.wide_score ? 64 : 32;
    results.emplace(
        std::initializer_list<DirectResults::Array>{{dlpack::kFloat, bits, {B, W}},
                                                    {dlpack::kInt, 64, {B, W}},
                                                    {dlpack::kInt, 64, {B, W}},
                                                    {dlpack::kFloat, bits, {B, W, parts}},
                                                    {dlpack::kBool, 8, {B}}});
  }

 private:
  bool read_scores(PyObject* given_score, PyObject* given_logits) {
    DirectArray logits, score;
    Number logits_number, score_number;
    if (!logits.read(given_logits, 3) || !score.read(given_score, 2)) return false;
    if (!logits.number(logits_number) || !score.number(score_number)) return false;
    const auto wide = [](Number number) { return number == Number::f64; };
    if (!wide(logits_number) && logits_number != Number::f32) return false;
    if (!wide(score_number) && score_number != Number::f32) return false;
    const int64_t* const shape = logits.tensor.shape;
    in.shape = {shape[0], shape[1], shape[2]};
    in.wide_logits = wide(logits_number);
    in.wide_score = wide(score_number);
    in.logits = logits.tensor.data;
    in.score = score.tensor.data;
    return in.shape.B > 0 && in.shape.W > 0 && in.shape.V > 0 &&
           score.has_shape({in.shape.B, in.shape.W});
  }

  // [B, W] int64.
  bool read_codes(PyObject* given, const int64_t** codes) const {
    DirectArray array;
    if (!array.read(given, 2) || !array.has(dlpack::kInt, 64)) return false;
    *codes = static_cast<const int64_t*>(array.tensor.data);
    return array.has_shape({in.shape.B, in.shape.W});
  }

  // [B], as the scores.
  bool read_per_utterance(PyObject* given, const void** numbers) const {
    DirectArray array;
    if (!array.read(given, 1) || !array.has(dlpack::kFloat, in.wide_score ? 64 : 32)) return false;
    *numbers = array.tensor.data;
    return array.has_shape({in.shape.B});
  }

  bool read_slot(PyObject* given) { return given == Py_None || read_codes(given, &in.slot); }

  bool read_reward(PyObject* given) {
    if (reward_is_tensor_) return read_per_utterance(given, &in.reward);
    const double reward = given == Py_None ? 0 : PyFloat_AS_DOUBLE(given);
    if (reward == 0) return true;
    if (in.wide_score) {
      wide_reward_.assign(in.shape.B, reward);
      in.reward = wide_reward_.data();
    } else {
      reward_.assign(in.shape.B, float(reward));
      in.reward = reward_.data();
    }
    return true;
  }

  bool read_terms(PyObject* terms) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(terms); ++i) {
      PyObject* const given = PyTuple_GET_ITEM(terms, i);
      DirectArray rows;
      BeamTerm term;
      if (!rows.read(PyTuple_GET_ITEM(given, 0), 2) || !rows.number(term.number)) return false;
      if (rows.tensor.shape[1] != in.shape.V) return false;
      term.rows = rows.tensor.data;
      term.L = rows.tensor.shape[0];
      if (!read_codes(PyTuple_GET_ITEM(given, 1), &term.row)) return false;
      if (!read_per_utterance(PyTuple_GET_ITEM(given, 2), &term.weight)) return false;
      in.terms.push_back(term);
    }
    return true;
  }

  bool read_silent(PyObject* given) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i) {
      PyObject* const token = PyTuple_GET_ITEM(given, i);
      if (!PyLong_CheckExact(token)) return false;
      int overflow = 0;
      const long long value = PyLong_AsLongLongAndOverflow(token, &overflow);
      if (overflow || value < 0 || value >= in.shape.V) return false;
      in.options.silent.push_back(value);
    }
    return !in.options.silent.empty();
  }

  // temperature, blank_penalty, prune, weigh_blank, normalise.
  bool read_options(PyObject* const* given) {
    if (!PyFloat_CheckExact(given[0]) || !PyFloat_CheckExact(given[1])) return false;
    if (!PyUnicode_CheckExact(given[2]) || !PyBool_Check(given[3])) return false;
    if (!PyBool_Check(given[4])) return false;
    in.options.temperature = PyFloat_AS_DOUBLE(given[0]);
    in.options.blank_penalty = PyFloat_AS_DOUBLE(given[1]);
    in.options.weigh_blank = given[3] == Py_True;
    in.options.normalise = given[4] == Py_True;
    for (const Prune prune : {Prune::late, Prune::early, Prune::after}) {
      if (PyUnicode_CompareWithASCIIString(given[2], prune_name(prune)) == 0) {
        in.options.prune = prune;
        return in.options.temperature > 0;
      }
    }
    return false;
  }

  bool reward_is_tensor_ = false;
  std::vector<float> reward_;
  std::vector<double> wide_reward_;
};

PyObject* beam_step_direct(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return direct(11, count, [&]() -> PyObject* {
    DirectBeam beam;
    if (!beam.read(given)) return nullptr;
    const BeamShape& shape = beam.in.shape;
    beam.make_results();
    const DirectResults& out = *beam.results;
    {
      const OthersRun others(10.0 * double(shape.B) * double(shape.W) * double(shape.V));
      choose_extensions(
          beam.in, {out[0], static_cast<int64_t*>(out[1]), static_cast<int64_t*>(out[2]), out[3],
                    static_cast<bool*>(out[4])});
    }
    return beam.results->tuple();
  });
}

}  // namespace

void bind_beam_step(pybind11::module_& m) { bind_direct(m, "beam_step", &beam_step_direct); }

}  // namespace prunelm

STABLE_TORCH_LIBRARY_IMPL(prunelm, CPU, m) {
  m.impl("beam_step", TORCH_BOX(&prunelm::beam_step_cpu));
}
