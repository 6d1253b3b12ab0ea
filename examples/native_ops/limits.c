/* What this machine can do at most: bytes read and operations a second, of THREADS threads at once.
 *
 *     cc -O3 -march=native -pthread limits.c -o limits
 *     limits read BYTES THREADS      a set of BYTES, shared by the threads, read again and again
 *     limits copy BYTES THREADS      one half of it written into the other; both count
 *     limits int8 0 THREADS          products and sums of bytes in registers, two operations each
 *     limits bf16 0 THREADS          the same of bfloat16, or of fp32 where there is nothing better
 *
 * Prints the rate, by the CPU time of each thread, best of seven, and the instructions used.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { TIMES = 7, SUMS = 12, STEPS = 20000 };
static const double SECONDS = 0.03;
static volatile double kept; /* so that nothing computed is left out */
static volatile float one = 1;

/* Does some work, and says how much: bytes or operations. */
typedef double (*Work)(const char *set, size_t bytes);

typedef long Line __attribute__((vector_size(64)));

static double read_set(const char *set, size_t bytes) {
  const Line *at = (const Line *)set;
  Line a = {0}, b = {0}, c = {0}, d = {0};
  size_t lines = bytes / sizeof(Line) / 4 * 4;
  for (size_t i = 0; i < lines; i += 4) a += at[i], b += at[i + 1], c += at[i + 2], d += at[i + 3];
  a += b + c + d;
  kept = (double)a[0] + (double)a[7];
  return (double)lines * sizeof(Line);
}

static double copy_set(const char *set, size_t bytes) {
  size_t half = bytes / 2;
  memcpy((char *)set + half, set, half); /* which knows when to write past the caches */
  __asm__ volatile("" ::"r"(set) : "memory");
  return 2.0 * (double)half;
}

/* SUMS independent chains, so that the units are busy whatever the latency of one step. The chains
 * begin with, and end in, what the compiler knows nothing of: it can neither merge nor drop them. */
#define PEAK(NAME, VECTOR, OPERATIONS, STEP)                                         \
  __attribute__((unused)) static double NAME(const char *set, size_t bytes) {        \
    (void)set, (void)bytes;                                                          \
    SETUP;                                                                           \
    VECTOR ends[SUMS], sums[SUMS];                                                   \
    memset(ends, 0, sizeof ends);                                                    \
    __asm__ volatile("" : "+m"(ends));                                               \
    for (int j = 0; j < SUMS; j++) sums[j] = ends[j];                                \
    for (long i = 0; i < STEPS; i++)                                                 \
      for (int j = 0; j < SUMS; j++) { VECTOR s = sums[j]; sums[j] = STEP; }         \
    for (int j = 0; j < SUMS; j++) ends[j] = sums[j];                                \
    __asm__ volatile("" : "+m"(ends));                                               \
    return 1.0 * STEPS * SUMS * (OPERATIONS);                                        \
  }

#if defined(__AVX512F__)
#define SETUP __m512 f = _mm512_set1_ps(one); __m512i v = _mm512_castps_si512(f); (void)v
PEAK(fp32, __m512, 32, _mm512_fmadd_ps(f, f, s))
#define FP32 "AVX512 fp32"
#elif defined(__AVX2__) && defined(__FMA__)
#define SETUP __m256 f = _mm256_set1_ps(one); __m256i v = _mm256_castps_si256(f); (void)v
PEAK(fp32, __m256, 16, _mm256_fmadd_ps(f, f, s))
#define FP32 "AVX2 fp32"
#elif defined(__aarch64__)
#define SETUP float32x4_t f = vdupq_n_f32(one); int8x16_t v = vreinterpretq_s8_f32(f); (void)v
PEAK(fp32, float32x4_t, 8, vfmaq_f32(s, f, f))
#define FP32 "NEON fp32"
#endif

#if defined(__AVX512BF16__)
PEAK(bf16, __m512, 64, _mm512_dpbf16_ps(s, (__m512bh)v, (__m512bh)v))
#define BF16 "AVX512-BF16"
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
PEAK(bf16, float32x4_t, 32, vbfmmlaq_f32(s, vreinterpretq_bf16_s8(v), vreinterpretq_bf16_s8(v)))
#define BF16 "NEON bfmmla"
#elif defined(FP32)
#define bf16 fp32
#define BF16 FP32
#endif

#if defined(__AVX512VNNI__)
PEAK(int8, __m512i, 128, _mm512_dpbusd_epi32(s, v, v))
#define INT8 "AVX512-VNNI"
#elif defined(__AVXVNNI__)
PEAK(int8, __m256i, 64, _mm256_dpbusd_avx_epi32(s, v, v))
#define INT8 "AVX-VNNI"
#elif defined(__AVX2__)
PEAK(int8, __m256i, 64,
     _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(s, v), v)))
#define INT8 "AVX2"
#elif defined(__ARM_FEATURE_MATMUL_INT8)
PEAK(int8, int32x4_t, 64, vmmlaq_s32(s, v, v))
#define INT8 "NEON smmla"
#elif defined(__ARM_FEATURE_DOTPROD)
PEAK(int8, int32x4_t, 32, vdotq_s32(s, v, v))
#define INT8 "NEON sdot"
#endif

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
static int amx_allowed(void) { return !syscall(SYS_arch_prctl, 0x1023, 18); }

/* Four tiles of 16 x 16 sums, each of 64 bytes a row and a column. */
#define TILES(NAME, DOT, OPERATIONS)                                                       \
  static double NAME(const char *set, size_t bytes) {                                      \
    (void)set, (void)bytes;                                                                \
    struct { unsigned char palette, row, zero[14]; unsigned short columns[16];             \
             unsigned char rows[16]; } shape = {.palette = 1};                             \
    for (int t = 0; t < 8; t++) shape.columns[t] = 64, shape.rows[t] = 16;                 \
    __asm__ volatile("" ::"m"(shape) : "memory");                                          \
    _tile_loadconfig(&shape);                                                              \
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);                            \
    _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);                            \
    for (long i = 0; i < STEPS; i++) {                                                     \
      DOT(0, 4, 6); DOT(1, 4, 7); DOT(2, 5, 6); DOT(3, 5, 7);                              \
    }                                                                                      \
    _tile_release();                                                                       \
    return 1.0 * STEPS * 4 * (OPERATIONS);                                                 \
  }
TILES(int8_amx, _tile_dpbssd, 2 * 16 * 16 * 64)
TILES(bf16_amx, _tile_dpbf16ps, 2 * 16 * 16 * 32)
#endif

static pthread_barrier_t start;
static Work work;
typedef struct { size_t bytes; double best[TIMES]; } Thread;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *run(void *given) {
  Thread *thread = given;
  char *set = NULL;
  if (thread->bytes) {
    if (posix_memalign((void **)&set, 1 << 21, thread->bytes)) return NULL;
    madvise(set, thread->bytes, MADV_HUGEPAGE);
    memset(set, 1, thread->bytes);
  }
  work(set, thread->bytes);
  for (int i = 0; i < TIMES; i++) {
    double done = 0, begun, seconds;
    pthread_barrier_wait(&start);
    begun = now();
    do done += work(set, thread->bytes), seconds = now() - begun; while (seconds < SECONDS);
    thread->best[i] = done / seconds;
  }
  free(set);
  return thread;
}

int main(int count, char **given) {
  const char *name = "";
  size_t bytes = count > 2 ? strtoull(given[2], NULL, 10) : 0;
  int threads = count > 3 ? atoi(given[3]) : 1;
  if (count < 2 || threads < 1 || threads > 64) return 2;
  if (!strcmp(given[1], "read")) work = read_set, name = "read";
  if (!strcmp(given[1], "copy")) work = copy_set, name = "copy";
#ifdef INT8
  if (!strcmp(given[1], "int8")) work = int8, name = INT8;
#endif
#ifdef BF16
  if (!strcmp(given[1], "bf16")) work = bf16, name = BF16;
#endif
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
  if (!strcmp(given[1], "int8") && amx_allowed()) work = int8_amx, name = "AMX int8";
  if (!strcmp(given[1], "bf16") && amx_allowed()) work = bf16_amx, name = "AMX bf16";
#endif
  if (!work) return 3;
  pthread_t ids[64];
  Thread each[64];
  pthread_barrier_init(&start, NULL, (unsigned)threads);
  for (int i = 0; i < threads; i++) {
    each[i].bytes = bytes / (size_t)threads;
    if (pthread_create(&ids[i], NULL, run, &each[i])) return 4;
  }
  double best = 0;
  for (int i = 0; i < threads; i++) {
    void *done;
    pthread_join(ids[i], &done);
    if (!done) return 5;
  }
  for (int t = 0; t < TIMES; t++) {
    double all = 0;
    for (int i = 0; i < threads; i++) all += each[i].best[t];
    best = all > best ? all : best;
  }
  printf("%.4g %s\n", best, name);
  return 0;
}
