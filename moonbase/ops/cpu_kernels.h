/* What the CPU kernels share: vectors, threads, scratch memory, and one small matrix product that all of them are made of.

   Portable C11 with the vector extensions of GCC and Clang, no intrinsics and no OpenMP directives: the width of a
   vector follows the instruction set that the compiler was told to use, and threads are those of the OpenMP runtime that
   PyTorch has loaded already, handed in as a function pointer (two runtimes would have two pools that starve each other).

   Every sum runs in one fixed order, which depends on the sizes of the two vectors that are multiplied and on nothing
   else: not on the number of threads, not on how many other rows there are. */

#ifndef MOONBASE_CPU_KERNELS_H
#define MOONBASE_CPU_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define TILE_ROWS 12 /* 12 x 2 sums, 2 vectors of B and a broadcast fit 32 registers */
#elif defined(__AVX__)
#define LANES 8
#define TILE_ROWS 6 /* 16 registers */
#else
#define LANES 4
#define TILE_ROWS 12 /* Arm has 32 registers */
#endif
#define PANEL (2 * LANES) /* columns of B that are multiplied at once */
#define GRAIN 16          /* widths of matrices are multiples of this, whatever the vectors */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }
INLINE long least(long a, long b) { return a < b ? a : b; }

INLINE float sum_of(vec x) { /* halves are added to halves, so that the order is that of a tree */
    float lanes[LANES];
    store(lanes, x);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

INLINE float largest_of(vec x) {
    float lanes[LANES], largest;
    store(lanes, x);
    largest = lanes[0];
    for (int i = 1; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

/* exp(x) for x <= 88 within 2 units in the last place: 2^n times a polynomial on [-ln2/2, ln2/2]. 0 below -87, NaN for
   NaN and infinity. */
INLINE vec exp_of(vec x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which sits in the low bits */
    ivec tiny = x < -87.0f;
    vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = ((ivec)shifted - (int32_t)0x4B400000 + 127) << 23;
    return choose(tiny, (vec){0}, p * (vec)power);
}

INLINE vec sigmoid_of(vec x) { return 1.0f / (1.0f + exp_of(choose(x < -88.0f, splat(88.0f), -x))); }

/* --- threads ------------------------------------------------------------------------------------------------------ */

typedef void (*task_fn)(void *what, long task);

/* Calls fn(what, 0 .. num_tasks-1), each once, on up to num_threads threads of the pool. Tasks write
   disjoint memory. */
void for_each_task(long num_threads, long num_tasks, task_fn fn, void *what);

/* Memory of the calling thread that stays for its next call: fresh pages cost more than the arithmetic on them. */
enum { SCRATCH_CALL, SCRATCH_PART, SCRATCH_TASK, SCRATCH_KINDS };
float *scratch(int kind, long floats);
void release_large_scratch(void);

/* --- the product -------------------------------------------------------------------------------------------------- */

/* C[rows x nv vectors] (+)= A B, kept in registers. A(i, k) = a[i * a_row + k * a_col]; row k of B at b + k * b_row. */
INLINE void tile_of(const int rows, const int nv, long depth, const float *a, long a_row, long a_col, const float *b,
                    long b_row, float *c, long c_row, int add) {
    vec sum[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) sum[i][j] = add ? load(c + i * c_row + j * LANES) : (vec){0};
    for (long k = 0; k < depth; k++) {
        vec row[2];
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) row[j] = load(b + k * b_row + j * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            vec left = splat(a[i * a_row + k * a_col]);
#pragma GCC unroll 2
            for (int j = 0; j < nv; j++) sum[i][j] += left * row[j];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) store(c + i * c_row + j * LANES, sum[i][j]);
}

/* One tile of any height up to TILE_ROWS, `nv` 1 or 2 vectors wide. */
void tile(int rows, int nv, long depth, const float *a, long a_row, long a_col, const float *b, long b_row, float *c,
          long c_row, int add);

/* Panels hold a matrix B [depth x columns] for `product`: PANEL columns of all rows (the last time perhaps fewer) lie
   together, depth * columns floats in all. Columns are a multiple of GRAIN. From B itself: */
void pack_panels(long depth, long columns, const float *b, long b_row, float *panels);

/* From the transpose of B, [columns x depth]. Where `columns` is no multiple of PANEL and `fill` is set, zeros complete
   the last panel and any number of columns will do. */
void pack_transposed(long depth, long columns, const float *b, long b_row, float *panels, int fill);

/* C [rows x columns] (+)= A B with B in panels. */
void product(long rows, long columns, long depth, const float *a, long a_row, long a_col, const float *panels, float *c,
             long c_row, int add);

/* One row of the gradient of silu(gate) * up * weight, given that of its result. `pre`: gate, then up, `width` each;
   grad_pre likewise. Returns the gradient of the weight and makes the activation again, weighted. */
float swiglu_row(long width, const float *pre, const float *grad, float weight, float *grad_pre, float *active);

#endif
