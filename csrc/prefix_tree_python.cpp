// prefix_tree.h for Python, over numpy arrays; contract in prunelm/decoding/prefix_tree.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "prefix_tree.h"

namespace py = pybind11;

namespace prunelm {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// A view on a vector that lives as long as the tree.
template <typename T>
Array<T> view(py::object tree, std::vector<T>& values, std::vector<py::ssize_t> shape) {
  return Array<T>(std::move(shape), values.data(), std::move(tree));
}

template <typename T>
Array<T> moved(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
  auto* owned = new std::vector<T>(std::move(values));
  py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return Array<T>(std::move(shape), owned->data(), std::move(owner));
}

py::tuple rows_tuple(PrefixTree::Rows&& rows) {
  const auto R = py::ssize_t(rows.index.size());
  rows.tokens.resize(R);  // the predictor takes none
  return py::make_tuple(moved(std::move(rows.index), {R}), moved(std::move(rows.tokens), {R}),
                        moved(std::move(rows.path), {R, rows.P}),
                        moved(std::move(rows.length), {R}));
}

template <typename T>
Array<T> numbers(const char* name, const py::object& given) {
  auto array = Array<T>::ensure(given);
  if (!array) {
    PyErr_Clear();
    const py::object dtype = py::getattr(given, "dtype", py::type::of(given));
    throw std::invalid_argument(std::string(name) + ": expected " +
                                py::str(py::dtype::of<T>()).template cast<std::string>() +
                                " numbers, got " + py::str(dtype).template cast<std::string>());
  }
  return array;
}

template <typename T>
void expect_size(const char* name, const Array<T>& array, int64_t size) {
  if (array.size() != size) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(size) +
                                " elements, got " + std::to_string(array.size()));
  }
}

template <typename T>
void expect_shape(const char* name, const Array<T>& array, const std::vector<int64_t>& shape) {
  const std::vector<int64_t> found(array.shape(), array.shape() + array.ndim());
  if (found == shape) return;
  const auto text = [](const std::vector<int64_t>& sizes) {
    std::string out = "[";
    for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
    return out + "]";
  };
  throw std::invalid_argument(std::string(name) + ": expected " + text(shape) + ", got " +
                              text(found));
}

// The extensions of the first n utterances, [n, W] each.
struct Step {
  Array<int64_t> parent, token;
  Array<double> score;
  int64_t n;

  Step(const PrefixTree& tree, const py::object& given_parent, const py::object& given_token,
       const py::object& given_score)
      : parent(numbers<int64_t>("parent", given_parent)),
        token(numbers<int64_t>("token", given_token)),
        score(numbers<double>("score", given_score)),
        n(parent.ndim() > 0 ? parent.shape(0) : 0) {
    const int64_t B = tree.utterances(), W = tree.beam();
    if (n > B) {
      throw std::invalid_argument("parent: expected at most " + std::to_string(B) +
                                  " utterances, got " + std::to_string(n));
    }
    expect_shape("parent", parent, {n, W});
    expect_size("token", token, n * W);
    expect_shape("token", token, {n, W});
    expect_size("score", score, n * W);
    expect_shape("score", score, {n, W});
  }
};

py::object plan(PrefixTree& tree, const py::object& parent, const py::object& token,
                const py::object& score) {
  const Step step(tree, parent, token, score);
  std::vector<int64_t> flat(step.n * tree.beam());
  PrefixTree::Rows rows;
  if (!tree.plan(step.n, step.parent.data(), step.token.data(), step.score.data(), flat.data(),
                 rows)) {
    return py::none();
  }
  return py::make_tuple(rows_tuple(std::move(rows)), moved(std::move(flat), {step.n, tree.beam()}));
}

int64_t advance(PrefixTree& tree, int64_t time, const py::object& parent, const py::object& token,
                const py::object& score, const py::object& given_parts,
                const py::object& given_values) {
  const Step step(tree, parent, token, score);
  const auto parts = numbers<double>("parts", given_parts);
  const int64_t width = parts.ndim() == 3 ? parts.shape(2) : 1;
  expect_shape("parts", parts, {step.n, tree.beam(), width});
  std::optional<Array<double>> values;
  if (!given_values.is_none()) {
    values = numbers<double>("values", given_values);
    expect_size("values", *values, tree.terms() * step.n * tree.beam());
    expect_shape("values", *values, {tree.terms(), step.n, tree.beam()});
  }
  return tree.advance(step.n, time, step.parent.data(), step.token.data(), step.score.data(),
                      parts.data(), width, values ? values->data() : nullptr);
}

py::tuple emissions(const PrefixTree& tree, int64_t b, int64_t w) {
  py::list tokens, times, log_probs;
  for (const auto& [token, time, log_prob] : tree.emissions(b, w)) {
    tokens.append(token);
    times.append(time);
    log_probs.append(log_prob);
  }
  return py::make_tuple(tokens, times, log_probs);
}

}  // namespace

void bind_prefix_tree(py::module_& m) {
  py::class_<PrefixTree>(m, "PrefixTree")
      .def(py::init([](int64_t B, int64_t W, int64_t terms, int64_t vocabulary,
                       const std::vector<int64_t>& silent, int64_t most) {
             return new PrefixTree(B, W, terms, vocabulary, silent, most);
           }),
           py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg("most") = INT32_MAX)
      .def("score",
           [](py::object self) {
             auto& tree = self.cast<PrefixTree&>();
             auto& score = tree.score();
             return view(self, score, {tree.utterances(), tree.beam()});
           })
      .def("parts",
           [](py::object self) {
             auto& tree = self.cast<PrefixTree&>();
             const py::ssize_t width = 1 + tree.terms();
             return view(self, tree.parts(), {tree.utterances(), tree.beam(), width});
           })
      .def("node",
           [](py::object self) {
             auto& tree = self.cast<PrefixTree&>();
             auto& node = tree.node();
             return view(self, node, {tree.utterances(), tree.beam()});
           })
      .def("row",
           [](py::object self) {
             auto& tree = self.cast<PrefixTree&>();
             auto& row = tree.row();
             return view(self, row, {tree.utterances(), tree.beam()});
           })
      .def("node_capacity", &PrefixTree::node_capacity)
      .def("row_capacity", &PrefixTree::row_capacity)
      .def("live_nodes", &PrefixTree::live_nodes)
      .def("plan", plan)
      .def("plan_live",
           [](PrefixTree& tree, int64_t begin, int64_t end) {
             PrefixTree::Rows rows;
             tree.plan_live(begin, end, rows);
             return rows_tuple(std::move(rows));
           })
      .def("advance", advance)
      .def("take_new",
           [](PrefixTree& tree, int64_t context) {
             PrefixTree::Rows rows;
             tree.take_new(context, rows);
             return rows_tuple(std::move(rows));
           })
      .def("emissions", emissions)
      .def("release", &PrefixTree::release);
}

}  // namespace prunelm
