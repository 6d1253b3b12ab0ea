// Numbers of the dtypes that operators take, and sums and maxima over a block.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "portability.cuh"

namespace torch_plugins::cuda {

using bf16 = c10::BFloat16;
using half = c10::Half;

enum class Kind : int32_t { f32, f64, f16, bf16 };

// A read-only array whose dtype is known at run time; null where there is none.
struct Floats {
  const void* data = nullptr;
  Kind kind = Kind::f32;

  template <class T>
  __device__ T get(int64_t i) const {
    switch (kind) {
      case Kind::f64:
        return static_cast<T>(static_cast<const double*>(data)[i]);
      case Kind::f16:
        return static_cast<float>(static_cast<const half*>(data)[i]);
      case Kind::bf16:
        return static_cast<float>(static_cast<const cuda::bf16*>(data)[i]);
      default:
        return static_cast<const float*>(data)[i];
    }
  }

  __device__ float operator[](int64_t i) const { return get<float>(i); }
};

struct Output {
  void* data;
  Kind kind;

  template <class T>
  __device__ void set(int64_t i, T value) const {
    switch (kind) {
      case Kind::f64:
        static_cast<double*>(data)[i] = value;
        break;
      case Kind::f16:
        static_cast<half*>(data)[i] = static_cast<float>(value);
        break;
      case Kind::bf16:
        static_cast<cuda::bf16*>(data)[i] = static_cast<float>(value);
        break;
      default:
        static_cast<float*>(data)[i] = static_cast<float>(value);
    }
  }
};

// fp32, or fp64 where the dtype is: what an operator computes in.
template <class T>
struct Wide {
  using type = float;
};

template <>
struct Wide<double> {
  using type = double;
};

// f(T()) with the type of the kind.
template <class F>
void by_kind(Kind kind, F f) {
  switch (kind) {
    case Kind::f64:
      return f(double());
    case Kind::f16:
      return f(half());
    case Kind::bf16:
      return f(bf16());
    default:
      return f(float());
  }
}

constexpr int WARP = 32;

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Larger {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// `value` of all THREADS of the block put together, in every one of them; always in the same order.
// May be called again at once, with other `memory` or the same.
template <int THREADS, class T, class Join>
__device__ T over_block(T value, T* memory, Join join) {
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    value = join(value, __shfl_xor_sync(0xffffffffu, value, distance));
  if (threadIdx.x % WARP == 0) memory[threadIdx.x / WARP] = value;
  __syncthreads();
  value = memory[0];
  for (int warp = 1; warp < THREADS / WARP; ++warp) value = join(value, memory[warp]);
  __syncthreads();
  return value;
}

// To the nearest whole number, ties to even.
__device__ inline float nearest(float x) { return rintf(x); }
__device__ inline double nearest(double x) { return rint(x); }

__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }

inline __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace torch_plugins::cuda
