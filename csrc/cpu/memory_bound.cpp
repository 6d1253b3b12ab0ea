#include "cpu/memory_bound.h"

#include "cpu/level.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torch_plugins {

const MemoryBound& memory_bound(ScalarType type) {
  const MemoryBound* of_dtypes = memory_bound_portable;
#if defined(__x86_64__)
  if (level() >= Level::avx512)
    of_dtypes = memory_bound_avx512;
  else if (level() == Level::avx2)
    of_dtypes = memory_bound_avx2;
#endif
  switch (type) {
    case ScalarType::Float:
      return of_dtypes[0];
    case ScalarType::BFloat16:
      return of_dtypes[1];
    case ScalarType::Half:
      return of_dtypes[2];
    default:
      return of_dtypes[3];
  }
}

ScalarType wide(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_rows(const Tensor& x, const char* what) {
  check_cpu(x, what);
  check_dtype(x, what, FLOATING);
  if (x.dim() < 1) fail(what, " has no dimensions: must be [..., features]");
}

void check_like(const Tensor& tensor, const char* what, const Tensor& x) {
  check_cpu(tensor, what);
  check_dtype(tensor, what, {x.scalar_type()});
  check_same_shape(tensor, what, x);
}

Tensor fresh(const Tensor& x, int64_t dim, ScalarType type) {
  constexpr int64_t most = 16;
  const auto sizes = x.sizes();
  if (dim > most)
    return torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), dim),
                                    type);
  int64_t strides[most], stride = 1;
  for (int64_t i = dim; i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes.data(), strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

Rows rows_of(const Tensor& x) {
  Rows out{1, x.size(x.dim() - 1)};
  for (int64_t i = 0; i + 1 < x.dim(); ++i) out.rows *= x.size(i);
  return out;
}

Tensor fresh_like(const Tensor& tensor) {
  Tensor out = tensor.is_contiguous() ? fresh(tensor, tensor.dim(), tensor.scalar_type())
                                      : torch::stable::empty_like(tensor);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t begin = (uintptr_t)out.mutable_data_ptr();
  const uintptr_t end = begin + out.numel() * out.element_size();
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
  return out;
}

Tensor laid_out_like(const Tensor& tensor, const Tensor& like) {
  bool same = true;
  for (int64_t i = 0; i < like.dim(); ++i)
    same &= tensor.stride(i) == like.stride(i) || like.size(i) == 1;
  if (same) return tensor;
  Tensor out = torch::stable::empty_like(like);
  torch::stable::copy_(out, tensor);
  return out;
}

bool past_caches(const Tensor& output, int64_t d, int64_t least) {
  const int64_t bytes = output.element_size();
  return output.numel() * bytes >= least && d * bytes % 64 == 0 &&
         (uintptr_t)output.const_data_ptr() % 64 == 0;
}

}  // namespace torch_plugins
