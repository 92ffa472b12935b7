/* The product with a matrix whose rows are weights of one output each, for one row as for many: see cpu_kernels_pass.h.

   The packed product of cpu_kernels.h is the faster one for many rows, but packing costs more than a few rows' whole
   work, and its sums run in another order. */

#include "cpu_kernels_pass.h"

#define COLUMNS_A_TASK 64

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#if LANES == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif LANES == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif

/* Sums of neighbours; applied log2(LANES) times to LANES vectors, lane i has the sum of vector i. */
INLINE vec sum_2(vec a, vec b) { return PICK(a, b, EVEN) + PICK(a, b, ODD); }
INLINE vec sum_4(const vec *x) { return sum_2(sum_2(x[0], x[1]), sum_2(x[2], x[3])); }
#if LANES == 16
INLINE vec sum_8(const vec *x) { return sum_2(sum_4(x), sum_4(x + 4)); }
INLINE vec sums_of(const vec *x) { return sum_2(sum_8(x), sum_8(x + 8)); }
#elif LANES == 8
INLINE vec sums_of(const vec *x) { return sum_2(sum_4(x), sum_4(x + 4)); }
#else
INLINE vec sums_of(const vec *x) { return sum_4(x); }
#endif

/* `rows` rows times LANES / rows columns, of which `there` exist. */
INLINE void dots_tile(const int rows, long there, long depth, const float *a, long a_row, const float *w, float *c,
                      long c_row, int add) {
    const int wide = LANES / rows;
    const float *column[LANES];
    vec sum[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) sum[i] = (vec){0};
#pragma GCC unroll 16
    for (int j = 0; j < wide; j++) column[j] = w + least(j, there - 1) * depth;
    for (long k = 0; k < depth; k += LANES) {
        vec left[4];
        /* The next tile's weights in the order of their addresses: as rows side by side they come half as fast. */
#pragma GCC unroll 16
        for (int j = 0; j < wide; j++) __builtin_prefetch(w + wide * (depth + k) + j * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) left[i] = load(a + i * a_row + k);
#pragma GCC unroll 16
        for (int j = 0; j < wide; j++) {
            vec right = load(column[j] + k);
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) sum[i * wide + j] += left[i] * right;
        }
    }
    float sums[LANES];
    store(sums, sums_of(sum));
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        float *to = c + i * c_row, *from = sums + i * wide;
        if (add)
            for (int j = 0; j < least(wide, there); j++) to[j] += from[j];
        else if (there >= wide)
            memcpy(to, from, (size_t)wide * 4);
        else
            memcpy(to, from, (size_t)there * 4);
    }
}

struct dots {
    long rows, columns, depth, a_row, c_row;
    const float *a, *w;
    float *c;
    int add;
};

static void dots_task(void *what, long task) {
    const struct dots *d = what;
    long last = least(d->columns, (task + 1) * COLUMNS_A_TASK);
    for (long first = task * COLUMNS_A_TASK; first < last; first += LANES) /* so many columns stay in the cache */
        for (long i = 0, height; i < d->rows; i += height) {
            height = d->rows - i >= 4 ? 4 : d->rows - i >= 2 ? 2 : 1;
            for (long j = first; j < least(last, first + LANES); j += LANES / height) {
                const float *a = d->a + i * d->a_row, *w = d->w + j * d->depth;
                float *c = d->c + i * d->c_row + j;
                if (height == 4) dots_tile(4, last - j, d->depth, a, d->a_row, w, c, d->c_row, d->add);
                else if (height == 2) dots_tile(2, last - j, d->depth, a, d->a_row, w, c, d->c_row, d->add);
                else dots_tile(1, last - j, d->depth, a, d->a_row, w, c, d->c_row, d->add);
            }
        }
}

void dots(long num_threads, long rows, long columns, long depth, const float *a, long a_row, const float *w, float *c,
          long c_row, int add) {
    struct dots d = {rows, columns, depth, a_row, c_row, a, w, c, add};
    long tasks = (columns + COLUMNS_A_TASK - 1) / COLUMNS_A_TASK;
    for_each_task(threads_for(num_threads, rows * columns * depth), tasks, dots_task, &d);
}

/* The head at some rows: out [count, columns] = x [rows[i]] W^T. */
struct head {
    const float *x, *weight;
    const int32_t *rows;
    float *out;
    int64_t count, columns, depth, num_threads;
};

EXPORT int moonbase_head(struct head *h) {
    float *x = scratch(SCRATCH_CALL, h->count * h->depth);
    for (long i = 0; i < h->count; i++)
        memcpy(x + i * h->depth, h->x + h->rows[i] * h->depth, (size_t)h->depth * 4);
    dots(h->num_threads, h->count, h->columns, h->depth, x, h->depth, h->weight, h->out, h->columns, 0);
    release_large_scratch();
    return 0;
}
