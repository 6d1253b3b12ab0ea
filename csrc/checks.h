// Checks of arguments, with messages that name operator, argument, value and remedy; and the few
// calls of torch's stable ABI that every operator makes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

#include "fail.h"

namespace torch_plugins {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

// `what` is "operator: argument" in all of these.
inline void check_dtype(const Tensor& tensor, const char* what,
                        std::initializer_list<ScalarType> allowed) {
  for (ScalarType type : allowed)
    if (tensor.scalar_type() == type) return;
  std::ostringstream names;
  for (ScalarType type : allowed) names << (names.tellp() > 0 ? " or " : "") << name_of(type);
  fail(what, " is ", name_of(tensor.scalar_type()), ": must be ", names.str());
}

inline void check_cpu(const Tensor& tensor, const char* what) {
  if (!tensor.is_cpu()) fail(what, " is not on the CPU, as the first argument is: move it");
}

inline void check_dim(const Tensor& tensor, const char* what, int64_t dim) {
  if (tensor.dim() != dim)
    fail(what, " has the shape ", shape_of(tensor), ": must have ", dim, " dimensions");
}

inline void check_size(const Tensor& tensor, const char* what, int64_t dim, int64_t size) {
  if (tensor.dim() <= dim || tensor.size(dim) != size)
    fail(what, " has the shape ", shape_of(tensor), ": its dimension ", dim, " must be ", size);
}

inline void check_same_shape(const Tensor& tensor, const char* what, const Tensor& like) {
  bool same = tensor.dim() == like.dim();
  for (int64_t i = 0; same && i < like.dim(); ++i) same = tensor.size(i) == like.size(i);
  if (!same) fail(what, " has the shape ", shape_of(tensor), ": must be ", shape_of(like));
}

// The tensor itself where it is contiguous already.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Fresh memory like `like`, of this shape; nothing is written into it.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace torch_plugins
