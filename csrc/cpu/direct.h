// Calls of the CPU kernels from Python past torch's dispatcher, which takes as long as the smallest
// products.
//
// Only without gradients, where nothing but the numbers is asked of a call, and only where nobody
// listens in: no autocast, no tracing, no mode or transform that would see the op. What is not as
// the kernels read it goes through the dispatcher too, which copies it or says what is wrong: then
// these calls answer None. Nothing is kept from one call to the next, so that a weight may change
// in any way. Python asks first whether a compiler is at work, which follows no call into here.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <memory>
#include <optional>

#include "cpu/block_sparse_linear.h"
#include "cpu/dlpack.h"
#include "cpu/number.h"

namespace prunelm {

// Whether this thread's calls may go past the dispatcher, and memory holds what these tensors say;
// None is no tensor. Asked before anything is read, since the answer may run Python.
bool unwatched(PyObject* const* numbers, size_t count);
inline bool unwatched(std::initializer_list<PyObject*> numbers) {
  return unwatched(numbers.begin(), numbers.size());
}

// What follows is false where the call must go through the dispatcher. What has been read is good
// until Python runs again.

struct DirectWeight {
  BlockSparseView view;
  int64_t nnz;

  // values, crow, col, (N, K); what stands in crow and col is not looked at.
  bool read(PyObject* const* given);
};

struct DirectRows {
  dlpack::Tensor tensor;
  MatrixView view;

  // For a weight of K columns and this dtype.
  bool read(PyObject* x, int64_t K, Number weight);
};

class DirectResult {
 public:
  // Finds memory for [..., N].
  bool prepare(const DirectRows& x, int64_t N, Number weight, PyObject* bias, PyObject* activation);
  const LinearResult& view() const { return view_; }
  PyObject* tensor() &&;

 private:
  struct Block;
  struct Delete {
    void operator()(Block* block) const;
  };
  std::unique_ptr<Block, Delete> block_;
  LinearResult view_;
};

// One number after the other.
struct DirectArray {
  dlpack::Tensor tensor;

  bool read(PyObject* given, int32_t ndim);
  bool has(dlpack::Code code, uint8_t bits) const {
    return tensor.code == code && tensor.bits == bits;
  }
  bool has_shape(std::initializer_list<int64_t> shape) const {
    return std::equal(shape.begin(), shape.end(), tensor.shape, tensor.shape + tensor.ndim);
  }
  bool number(Number& number) const;
};

// Several results in one piece of memory, which the last of them lets go.
class DirectResults {
 public:
  struct Array {
    uint8_t code, bits;
    std::initializer_list<int64_t> shape;  // up to 4 sizes
  };

  DirectResults(std::initializer_list<Array> arrays);
  DirectResults(const DirectResults&) = delete;
  ~DirectResults();
  void* operator[](size_t i) const;
  PyObject* tuple();

 private:
  struct Block;
  static void let_go(Block* block);
  Block* block_;
  size_t count_, handed_ = 0;
};

// Lets other Python threads run beside a product that takes longer than handing over does.
class OthersRun {
 public:
  explicit OthersRun(double multiply_adds) {
    if (multiply_adds > 300e3) released_.emplace();
  }

 private:
  std::optional<pybind11::gil_scoped_release> released_;
};

// The answer of call(), or None where that threw: the dispatcher comes to the same and says it.
template <typename Call>
PyObject* direct(Py_ssize_t expected, Py_ssize_t found, Call call) {
  if (found != expected) {
    return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, found);
  }
  try {
    if (PyObject* const made = call()) return made;
  } catch (const std::exception&) {
  }
  PyErr_Clear();
  Py_RETURN_NONE;
}

// readable(*tensors): whether all of them (None is none) are plain tensors of one device whose
// memory holds what they say. False also where there is no telling.
void bind_readable(pybind11::module_& m);

// Once, before any call: it may run Python, which a call must not do inside a lock.
void look_up_torch();

// Adds a function to the module. pybind11 would take as long to read its arguments as the smallest
// products.
using DirectFunction = PyObject* (*)(PyObject* module, PyObject* const* given, Py_ssize_t count);
void bind_direct(pybind11::module_& m, const char* name, DirectFunction function);

}  // namespace prunelm
