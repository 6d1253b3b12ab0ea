// A program that runs kernels for the tests: cases come in by stdin and results go out by stdout,
// as tests/csrc/cuda_emulation.py writes and reads them. Every buffer is an allocation of its own
// size.
#pragma once

#include "emulator.h"

namespace emulator {

struct Case {
  std::string name;
  std::vector<std::unique_ptr<char[]>> buffers;  // null: the argument is None
  std::vector<std::pair<size_t, size_t>> outputs;
  std::vector<int64_t> numbers;
  std::vector<double> reals;

  template <class T>
  T* buffer(size_t i) {
    return reinterpret_cast<T*>(buffers.at(i).get());
  }
};

inline bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

template <class T>
T read() {
  T value;
  if (!read(&value, sizeof value)) stop("the case ends early");
  return value;
}

inline bool next(Case& one) {
  uint32_t length;
  if (!read(&length, sizeof length)) return false;
  one.name.resize(length);
  read(one.name.data(), length);
  seed(read<uint64_t>());
  for (uint32_t left = read<uint32_t>(); left > 0; --left) {
    const char kind = read<char>();
    if (kind == 'i') {
      one.numbers.push_back(read<int64_t>());
    } else if (kind == 'f') {
      one.reals.push_back(read<double>());
    } else {
      const int64_t bytes = read<int64_t>();
      std::unique_ptr<char[]> memory(bytes < 0 ? nullptr : new char[bytes]);
      if (kind == 'b' && bytes > 0) read(memory.get(), bytes);
      if (kind == 'o') {
        rubbish(memory.get(), bytes);
        one.outputs.emplace_back(one.buffers.size(), bytes);
      }
      one.buffers.push_back(std::move(memory));
    }
  }
  return true;
}

inline int serve(const std::map<std::string, void (*)(Case&)>& kernels) {
  for (Case one; next(one); one = Case()) {
    const auto found = kernels.find(one.name);
    if (found == kernels.end()) stop("no such kernel");
    found->second(one);
    for (const auto& [index, bytes] : one.outputs)
      std::fwrite(one.buffer<char>(index), 1, bytes, stdout);
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace emulator
