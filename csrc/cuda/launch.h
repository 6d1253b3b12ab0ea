// Between torch and kernels: where arguments must lie, how kernels see them, and on which stream
// they run.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "cuda/numbers.cuh"

#if defined(__CUDACC__)

// Of libtorch_cuda; torch's header declares it only beside the toolkit of torch's own build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace torch_plugins::cuda {

inline bool on_gpu(const Tensor& tensor) { return tensor.is_cuda(); }

// The GPU and the stream that the caller chose, for as long as this lives.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  // Tensor cores with int4: sm_80 to sm_89.
  bool has_int4() const {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_);
    return major == 8;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Raises what the launches before it were refused for.
inline void check_launches(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) fail(what, ": ", cudaGetErrorString(error));
}

}  // namespace torch_plugins::cuda

#else

#include "cuda_emulator/device.h"

#endif

namespace torch_plugins::cuda {

inline void check_device(const Tensor& tensor, const char* what, const Tensor& first) {
  if (!on_gpu(tensor) || tensor.get_device_index() != first.get_device_index())
    fail(what, " is not on the GPU of the first argument: move it");
}

inline void check_floating(const Tensor& tensor, const char* what) {
  check_dtype(tensor, what,
              {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
}

inline Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Kind::f64;
    case ScalarType::Half:
      return Kind::f16;
    case ScalarType::BFloat16:
      return Kind::bf16;
    default:
      return Kind::f32;
  }
}

inline Floats floats(const Tensor& tensor) { return {tensor.const_data_ptr(), kind_of(tensor)}; }

inline Floats floats(const std::optional<Tensor>& tensor) {
  return tensor ? floats(*tensor) : Floats{};
}

// One floating element, beside `first`; nothing where it is not given.
inline void check_one(const std::optional<Tensor>& tensor, const char* what, const Tensor& first) {
  if (!tensor) return;
  check_device(*tensor, what, first);
  check_floating(*tensor, what);
  if (tensor->numel() != 1)
    fail(what, " has the shape ", shape_of(*tensor), ": must be one element");
}

// A result beside x, of its dtype and shape, contiguous.
inline Tensor fresh(const Tensor& x) {
  return torch::stable::new_empty(x, x.sizes(), x.scalar_type());
}

// `result` with the strides that torch's own operators give to what they make of x.
inline Tensor laid_out_as(const Tensor& x, const Tensor& result) {
  if (x.is_contiguous()) return result;
  Tensor out = torch::stable::empty_like(x);
  torch::stable::copy_(out, result);
  return out;
}

inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A block makes a row, or several.
inline void check_rows(const char* what, int64_t rows) {
  if (rows > 0x7fffffff) fail(what, " has ", rows, " rows: must be at most 2147483647");
}

// Rows of d features: all but the last dimension, and the last.
struct Rows {
  int64_t count = 1, d = 1;
  std::vector<int64_t> shape;  // of one number a row

  Rows(const Tensor& x, const char* what) {
    if (x.dim() < 1) fail(what, " has no dimensions: must be [..., d]");
    shape.assign(x.sizes().begin(), x.sizes().end() - 1);
    for (int64_t size : shape) count *= size;
    check_rows(what, count);
    d = x.size(x.dim() - 1);
  }
};

inline void check_row_numbers(const Tensor& tensor, const char* what, const Rows& rows) {
  bool same = tensor.dim() == static_cast<int64_t>(rows.shape.size());
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == rows.shape[i];
  if (!same) fail(what, " has the shape ", shape_of(tensor), ": must be one number for each row");
}

}  // namespace torch_plugins::cuda
