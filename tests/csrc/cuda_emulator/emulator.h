// CUDA kernels on the host: each thread of a block is a fiber, and fibers change at barriers and at
// the collectives of a warp.
//
// Which thread goes on is drawn at random, from a seed, and so is the order of the blocks: threads
// in order would hide a missing barrier. Shared memory is fresh for each block, filled with
// rubbish, and an allocation of its own for each array, so that AddressSanitizer sees its ends. One
// block runs after the other. Not shown: races within what runs between two barriers on one thread,
// asynchronous copies, the memory model of a GPU, and speed.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define threadIdx (emulator::now().index)
#define blockIdx (emulator::block().index)
#define blockDim (emulator::block().size)
#define gridDim (emulator::block().grid)
#define SHARED(type, name, count) type* const name = emulator::shared<type>(#name, __LINE__, count)
#define LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), emulator::launch(grid, block, [=] { (kernel)(__VA_ARGS__); }))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;

namespace emulator {

constexpr int WARP = 32, WORDS = 12;
constexpr size_t STACK = 64 << 10;

[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "emulator: %s\n", why);
  std::abort();
}

struct Thread;

// Where threads meet: when all of `size` have arrived they may go on.
struct Meeting {
  unsigned size = 0, round = 0;
  std::vector<Thread*> waiting;
};

struct Warp {
  Meeting meeting;
  // Of this collective, and of the next one, which a fast lane may be at already.
  uint32_t words[2][WARP][WORDS];
  const char* what[2][WARP];
  uint32_t product[2][16 * 8];
};

struct Thread {
  dim3 index;
  unsigned lane;
  Warp* warp;
  ucontext_t context;
  void* fake = nullptr;
};

struct Block {
  dim3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting barrier;
  std::map<std::pair<const char*, int>, std::unique_ptr<char[]>> shared;
  Thread* current = nullptr;
  std::vector<Thread*> ready;
  unsigned left = 0, patience = 2;
  ucontext_t scheduler;
  const void* bottom = nullptr;
  size_t depth = 0;
  std::function<void()> body;
};

inline std::mt19937_64 chance;
inline Block* running = nullptr;
inline std::vector<std::unique_ptr<char[]>> stacks;

inline void seed(uint64_t value) { chance.seed(value); }
inline Block& block() { return *running; }
inline Thread& now() { return *running->current; }

inline void give_way() {
  Thread& self = now();
  __sanitizer_start_switch_fiber(&self.fake, running->bottom, running->depth);
  swapcontext(&self.context, &running->scheduler);
  __sanitizer_finish_switch_fiber(self.fake, nullptr, nullptr);
}

// They may go on, in an order of its own: of single threads, or of whole warps.
inline void free(std::vector<Thread*>& threads) {
  std::shuffle(threads.begin(), threads.end(), chance);
  if (chance() & 1) {
    const auto salt = chance();
    const auto key = [=](Thread* t) { return reinterpret_cast<uintptr_t>(t->warp) * (salt | 1); };
    std::stable_sort(threads.begin(), threads.end(),
                     [=](auto* a, auto* b) { return key(a) < key(b); });
  }
  running->ready.insert(running->ready.end(), threads.begin(), threads.end());
}

// Waits until all have come; the last one calls last() before.
template <class Last>
void meet(Meeting& meeting, Last last) {
  meeting.waiting.push_back(running->current);
  if (meeting.waiting.size() == meeting.size) {
    last();
    ++meeting.round;
    free(meeting.waiting);
    meeting.waiting.clear();
  }
  give_way();
}

inline void rubbish(void* at, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(at)[i] = chance() | 0x40;
}

template <class T>
T* shared(const char* name, int line, size_t count) {
  auto& memory = running->shared[{name, line}];
  if (!memory) {
    memory.reset(new char[count * sizeof(T)]);
    rubbish(memory.get(), count * sizeof(T));
  }
  return reinterpret_cast<T*>(memory.get());
}

// What each lane of the warp hands in, for all of them; `what` must be the same in all. The last
// one to come calls last(side) before the others go on; returns the side of warp.words that holds
// this collective.
template <class T, class Last>
unsigned exchange(const char* what, const T& mine, Last last) {
  static_assert(sizeof(T) <= 4 * WORDS);
  Thread& self = now();
  Warp& warp = *self.warp;
  const unsigned side = warp.meeting.round & 1;
  std::memcpy(warp.words[side][self.lane], &mine, sizeof(T));
  warp.what[side][self.lane] = what;
  meet(warp.meeting, [&] {
    for (const char* other : warp.what[side])
      if (std::strcmp(what, other)) stop("lanes of a warp are in different collectives");
    last(side);
  });
  return side;
}

template <class T>
T of_lane(unsigned side, unsigned lane) {
  T out;
  std::memcpy(&out, now().warp->words[side][lane], sizeof(T));
  return out;
}

inline void enter() {
  Block& block = *running;
  __sanitizer_finish_switch_fiber(nullptr, &block.bottom, &block.depth);
  block.body();
  --block.left;
  __sanitizer_start_switch_fiber(nullptr, block.bottom, block.depth);
  swapcontext(&block.current->context, &block.scheduler);
}

// Mostly one that came free last, so that some warps run far ahead of others: how often is drawn
// anew for each block.
inline Thread* next(Block& block) {
  std::vector<Thread*>& ready = block.ready;
  if (ready.empty() && block.left) stop("threads wait at a barrier that others never reach");
  if (ready.empty()) return nullptr;
  if (chance() % block.patience == 0) std::swap(ready[chance() % ready.size()], ready.back());
  Thread* chosen = ready.back();
  ready.pop_back();
  return chosen;
}

inline void prepare(ucontext_t& context, char* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
}

inline void run_block(Block& block) {
  running = &block;
  const unsigned count = block.size.x * block.size.y * block.size.z;
  if (count == 0 || count % WARP) stop("a block is not a number of whole warps");
  block.left = block.barrier.size = count;
  block.patience = 2u << 3 * (chance() % 3);
  block.warps.resize(count / WARP);
  block.threads.resize(count);
  for (Warp& warp : block.warps) warp.meeting.size = WARP;
  while (stacks.size() < count) stacks.emplace_back(new char[STACK]);
  std::vector<Thread*> all;
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.index =
        dim3(i % block.size.x, i / block.size.x % block.size.y, i / (block.size.x * block.size.y));
    thread.lane = i % WARP;
    thread.warp = &block.warps[i / WARP];
    prepare(thread.context, stacks[i].get());
    all.push_back(&thread);
  }
  free(all);
  while (Thread* thread = next(block)) {
    block.current = thread;
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, thread->context.uc_stack.ss_sp, STACK);
    swapcontext(&block.scheduler, &thread->context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  }
  running = nullptr;
}

inline void launch(dim3 grid, dim3 size, const std::function<void()>& body) {
  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
  if (order.empty()) stop("a grid without blocks: CUDA refuses it");
  if (grid.y > 65535 || grid.z > 65535) stop("a grid beyond CUDA's limits");
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), chance);
  for (uint64_t i : order) {
    Block block;
    block.index = dim3(i % grid.x, i / grid.x % grid.y, i / (uint64_t(grid.x) * grid.y));
    block.size = size, block.grid = grid, block.body = body;
    run_block(block);
  }
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::meet(emulator::block().barrier, [] {});
}

inline void __syncwarp() {
  emulator::exchange("syncwarp", 0, [](unsigned) {});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  if (mask != 0xffffffffu) emulator::stop("only whole warps");
  const unsigned side = emulator::exchange("shuffle", value, [](unsigned) {});
  return emulator::of_lane<T>(side, emulator::now().lane ^ distance);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  if (mask != 0xffffffffu) emulator::stop("only whole warps");
  const unsigned side = emulator::exchange("shuffle", value, [](unsigned) {});
  const unsigned lane = emulator::now().lane;
  return emulator::of_lane<T>(side, lane < distance ? lane : lane - distance);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  if (mask != 0xffffffffu) emulator::stop("only whole warps");
  const unsigned side = emulator::exchange("ballot", unsigned(vote), [](unsigned) {});
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    votes |= emulator::of_lane<unsigned>(side, lane) << lane;
  return votes;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

// Byte i of the result is the byte of {a: 0 to 3, b: 4 to 7} that the half byte i of `which` names.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t out;
  std::memcpy(&out, &x, 4);
  return out;
}

inline float __uint_as_float(uint32_t x) {
  float out;
  std::memcpy(&out, &x, 4);
  return out;
}
