// prefix_tree.h for Python, over numpy arrays; contract in prunelm/decoding/prefix_tree.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

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
void expect(const char* name, const Array<T>& array, int64_t size) {
  if (array.size() != size) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(size) +
                                " elements, got " + std::to_string(array.size()));
  }
}

std::vector<bool> silent_mask(int64_t vocabulary, const std::vector<int64_t>& tokens) {
  std::vector<bool> silent(vocabulary, false);
  for (const int64_t token : tokens) silent.at(token) = true;
  return silent;
}

py::object plan(PrefixTree& tree, const Array<int64_t>& parent, const Array<int64_t>& token,
                const Array<double>& score) {
  const int64_t n = parent.shape(0);
  expect("token", token, n * tree.beam());
  expect("score", score, n * tree.beam());
  std::vector<int64_t> flat(n * tree.beam());
  PrefixTree::Rows rows;
  if (!tree.plan(n, parent.data(), token.data(), score.data(), flat.data(), rows)) {
    return py::none();
  }
  return py::make_tuple(rows_tuple(std::move(rows)), moved(std::move(flat), {n, tree.beam()}));
}

int64_t advance(PrefixTree& tree, int64_t time, const Array<int64_t>& parent,
                const Array<int64_t>& token, const Array<double>& score, const Array<double>& parts,
                const std::optional<Array<double>>& values) {
  const int64_t n = parent.shape(0);
  expect("token", token, n * tree.beam());
  expect("score", score, n * tree.beam());
  const int64_t width = parts.ndim() == 3 ? parts.shape(2) : 1;
  expect("parts", parts, n * tree.beam() * width);
  if (values) expect("values", *values, tree.terms() * n * tree.beam());
  return tree.advance(n, time, parent.data(), token.data(), score.data(), parts.data(), width,
                      values ? values->data() : nullptr);
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
                       const std::vector<int64_t>& silent) {
        return new PrefixTree(B, W, terms, silent_mask(vocabulary, silent));
      }))
      .def("score",
           [](py::object self) {
             auto& tree = self.cast<PrefixTree&>();
             auto& score = tree.score();
             return view(self, score, {py::ssize_t(score.size()) / tree.beam(), tree.beam()});
           })
      .def("parts",
           [](py::object self) {
             auto& tree = self.cast<PrefixTree&>();
             const py::ssize_t width = 1 + tree.terms();
             const auto B = py::ssize_t(tree.score().size()) / tree.beam();
             return view(self, tree.parts(), {B, tree.beam(), width});
           })
      .def("node",
           [](py::object self) {
             auto& tree = self.cast<PrefixTree&>();
             auto& node = tree.node();
             return view(self, node, {py::ssize_t(node.size()) / tree.beam(), tree.beam()});
           })
      .def("row",
           [](py::object self) {
             auto& tree = self.cast<PrefixTree&>();
             auto& row = tree.row();
             return view(self, row, {py::ssize_t(row.size()) / tree.beam(), tree.beam()});
           })
      .def("node_capacity", &PrefixTree::node_capacity)
      .def("row_capacity", &PrefixTree::row_capacity)
      .def("live_nodes", &PrefixTree::live_nodes)
      .def("plan", plan)
      .def("plan_live",
           [](PrefixTree& tree, int64_t begin, int64_t n) {
             PrefixTree::Rows rows;
             tree.plan_live(begin, n, rows);
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
