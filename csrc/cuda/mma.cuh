// Products of small matrices by a warp, D += A B, in int32 or fp32: what PTX calls mma.sync with
// the shapes m16n8k32 (s8), m16n8k64 (s4, two's complement) and m16n8k16 (bf16, fp16).
//
// The lane l holds, with r = l / 4 and c = l % 4, words of 4 (s8), 8 (s4) or 2 neighbouring k:
//
//   a[0], a[1]   rows r, r + 8, word c of the row      a[2], a[3]   the same rows, word 4 + c
//   b[0], b[1]   column r, words c and 4 + c
//   d[0], d[1]   row r, columns 2c, 2c + 1             d[2], d[3]   row r + 8, the same columns
//
// From sm_90 on, int4 has no hardware: the compiler would make hundreds of instructions of it. It
// is therefore left out there, and never launched (see w4a4_linear.cu).
#pragma once

#include "portability.cuh"

#if !defined(__CUDACC__)
#include "cuda_emulator/mma.h"
#endif

namespace torch_plugins::cuda {

#if defined(__CUDACC__)

__device__ inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_s4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ < 900
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

#define MMA_OF_FLOATS(name, type)                                                              \
  __device__ inline void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                        \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));          \
  }

MMA_OF_FLOATS(mma_bf16, "bf16")
MMA_OF_FLOATS(mma_f16, "f16")

#else

using emulator::mma_bf16;
using emulator::mma_f16;
using emulator::mma_s4;
using emulator::mma_s8;

#endif

}  // namespace torch_plugins::cuda
