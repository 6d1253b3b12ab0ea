#include "cuda_emulator/serve.h"

#include "cuda/sparse_moe.cuh"

using namespace torch_plugins::cuda;

namespace {

// An allocator whose memory lives as long as it.
struct Memory {
  std::vector<std::unique_ptr<char[]>> all;

  void* operator()(int64_t bytes) {
    all.emplace_back(new char[bytes]);
    emulator::rubbish(all.back().get(), bytes);
    return all.back().get();
  }
};

// Buffers x, scores, kept and last y; numbers begin with the kinds of x and scores, sizes, gated
// and the activation.
Mixture mixture(emulator::Case& c) {
  const auto& n = c.numbers;
  Mixture p{};
  p.x = {c.buffer<char>(0), static_cast<Kind>(n.at(0))};
  p.scores = {c.buffer<char>(1), static_cast<Kind>(n.at(1))};
  p.kept = c.buffer<bool>(2);
  p.tokens = n.at(2), p.hidden = n.at(3), p.experts = n.at(4), p.width = n.at(5);
  p.outputs = n.at(6), p.gated = n.at(7), p.activation = static_cast<Activation>(n.at(8));
  p.y = {c.buffer<char>(c.buffers.size() - 1), static_cast<Kind>(n.at(0))};
  return p;
}

// gate, up, down; then the strides of down.
void run_sparse_moe(emulator::Case& c) {
  const Mixture p = mixture(c);
  by_kind(p.x.kind, [&](auto t) {
    using T = decltype(t);
    const int64_t rows = p.width * p.hidden;
    const DenseExperts<T> experts{c.buffer<T>(3),   c.buffer<T>(4),
                                  c.buffer<T>(5),   {rows, p.hidden},
                                  {rows, p.hidden}, {c.numbers.at(9), c.numbers.at(10)}};
    Memory memory;
    sparse_moe<T>(p, experts, [&](int64_t bytes) { return memory(bytes); }, nullptr);
  });
}

// gate_up, its scale, down, its scale; the kind of scales, both numbers of groups, bits, int4 or
// not.
void run_w4a4_sparse_moe(emulator::Case& c) {
  const Mixture p = mixture(c);
  const auto& n = c.numbers;
  const Kind kind = static_cast<Kind>(n.at(9));
  const Int4Experts experts{c.buffer<uint8_t>(3),
                            c.buffer<uint8_t>(5),
                            {c.buffer<char>(4), kind},
                            {c.buffer<char>(6), kind},
                            n.at(10),
                            n.at(11),
                            int(n.at(12)),
                            n.at(13) == 4};
  Memory memory;
  w4a4_sparse_moe(p, experts, [&](int64_t bytes) { return memory(bytes); }, nullptr);
}

}  // namespace

int main() {
  return emulator::serve(
      {{"sparse_moe", run_sparse_moe}, {"w4a4_sparse_moe", run_w4a4_sparse_moe}});
}
