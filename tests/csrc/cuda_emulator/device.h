// In the place of a GPU, for the whole of csrc/cuda as a library: tensors of the CPU. See
// tests/csrc/check_cuda.py.
#pragma once

#include "cuda_emulator/emulator.h"

namespace torch_plugins::cuda {

inline bool on_gpu(const Tensor& tensor) { return tensor.is_cpu(); }

class Device {
 public:
  explicit Device(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  // Either kind, drawn anew for each call.
  bool has_int4() const { return emulator::chance() >> 20 & 1; }
};

inline void check_launches(const char*) {}

}  // namespace torch_plugins::cuda

// Where kernels register themselves: behind torch's headers, which have the name, too.
#define CUDA CPU
