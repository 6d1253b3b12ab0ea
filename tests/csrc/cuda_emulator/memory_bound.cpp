#include "cuda_emulator/serve.h"

#include "cuda/fake_quant_kurtosis.cuh"
#include "cuda/residual_add_rms_norm.cuh"

using namespace torch_plugins::cuda;

namespace {

// Numbers begin with the kinds of x and of the clips.
Kind kind(const emulator::Case& c, size_t i) { return static_cast<Kind>(c.numbers.at(i)); }

// The clips are the buffers `first` and the one behind it.
ClipArguments clips(emulator::Case& c, size_t first, int bits) {
  return {{c.buffer<char>(first), kind(c, 1)}, {c.buffer<char>(first + 1), kind(c, 1)}, bits};
}

// Scratch of its own size, as of the allocator: nothing of it is known.
template <class W>
std::unique_ptr<W[]> scratch(size_t count) {
  std::unique_ptr<W[]> memory(new W[count]);
  emulator::rubbish(memory.get(), count * sizeof(W));
  return memory;
}

// x, high, low, out
void run_fake_quant(emulator::Case& c) {
  by_kind(kind(c, 0), [&](auto t) {
    using T = decltype(t);
    fake_quant(c.buffer<T>(0), c.numbers[2], clips(c, 1, c.numbers[3]), c.buffer<T>(3), nullptr);
  });
}

// gradient, x, high, low, dx, d_high, d_low
void run_fake_quant_backward(emulator::Case& c) {
  by_kind(kind(c, 0), [&](auto t) {
    using T = decltype(t);
    const auto partial = scratch<typename Wide<T>::type>(3 * fake_quant_blocks(c.numbers[2]));
    fake_quant_backward(c.buffer<T>(0), c.buffer<T>(1), c.numbers[2], clips(c, 2, c.numbers[3]),
                        c.buffer<T>(4), {c.buffer<char>(5), kind(c, 1)},
                        {c.buffer<char>(6), kind(c, 1)}, partial.get(), nullptr);
  });
}

// y, out
void run_kurtosis(emulator::Case& c) {
  by_kind(kind(c, 0), [&](auto t) {
    using T = decltype(t);
    using W = typename Wide<T>::type;
    kurtosis<T>(c.buffer<T>(0), c.numbers[2], c.numbers[3], c.reals[0], c.buffer<W>(1), nullptr);
  });
}

// gradient, y, dy
void run_kurtosis_backward(emulator::Case& c) {
  by_kind(kind(c, 0), [&](auto t) {
    using T = decltype(t);
    using W = typename Wide<T>::type;
    kurtosis_backward<T>(c.buffer<W>(0), c.buffer<T>(1), c.numbers[2], c.numbers[3], c.reals[0],
                         c.buffer<T>(2), nullptr);
  });
}

// x, high, low, quantized, out
void run_both(emulator::Case& c) {
  by_kind(kind(c, 0), [&](auto t) {
    using T = decltype(t);
    using W = typename Wide<T>::type;
    fake_quant_kurtosis<T>(c.buffer<T>(0), c.numbers[2], c.numbers[3], clips(c, 1, c.numbers[4]),
                           c.reals[0], c.buffer<T>(3), c.buffer<W>(4), nullptr);
  });
}

// g_quantized, g_kurtosis, x, high, low, dx, d_high, d_low
void run_both_backward(emulator::Case& c) {
  by_kind(kind(c, 0), [&](auto t) {
    using T = decltype(t);
    using W = typename Wide<T>::type;
    const auto partial = scratch<W>(3 * blocks_for(c.numbers[2]));
    fake_quant_kurtosis_backward<T>(c.buffer<T>(0), c.buffer<W>(1), c.buffer<T>(2), c.numbers[2],
                                    c.numbers[3], clips(c, 3, c.numbers[4]), c.reals[0],
                                    c.buffer<T>(5), {c.buffer<char>(6), kind(c, 1)},
                                    {c.buffer<char>(7), kind(c, 1)}, partial.get(), nullptr);
  });
}

// residual, update, weight or None, total, normed, rstd
void run_add_norm(emulator::Case& c) {
  by_kind(kind(c, 0), [&](auto t) {
    using T = decltype(t);
    residual_add_rms_norm<T>(c.buffer<T>(0), c.buffer<T>(1), {c.buffer<char>(2), kind(c, 1)},
                             c.numbers[2], c.numbers[3], c.reals[0], c.buffer<T>(3), c.buffer<T>(4),
                             c.buffer<typename Wide<T>::type>(5), nullptr);
  });
}

// g_sum or None, g_normed, total, rstd, weight or None, dx, d_weight
void run_add_norm_backward(emulator::Case& c) {
  by_kind(kind(c, 0), [&](auto t) {
    using T = decltype(t);
    using W = typename Wide<T>::type;
    const int64_t rows = c.numbers[2], d = c.numbers[3], splits = weight_splits(rows);
    const auto partial = scratch<W>(splits * d);
    const AddNormBackward<T> p{c.buffer<T>(0),
                               c.buffer<T>(1),
                               c.buffer<T>(2),
                               c.buffer<W>(3),
                               {c.buffer<char>(4), kind(c, 1)},
                               rows,
                               d,
                               c.buffer<T>(5),
                               {c.buffer<char>(6), kind(c, 1)},
                               partial.get(),
                               splits};
    residual_add_rms_norm_backward(p, nullptr);
  });
}

}  // namespace

int main() {
  return emulator::serve({{"fake_quant", run_fake_quant},
                          {"fake_quant_backward", run_fake_quant_backward},
                          {"kurtosis", run_kurtosis},
                          {"kurtosis_backward", run_kurtosis_backward},
                          {"fake_quant_kurtosis", run_both},
                          {"fake_quant_kurtosis_backward", run_both_backward},
                          {"residual_add_rms_norm", run_add_norm},
                          {"residual_add_rms_norm_backward", run_add_norm_backward}});
}
