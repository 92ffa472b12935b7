/* Threads, scratch memory and the matrix product behind the CPU kernels; see cpu_kernels.h. */

#include "cpu_kernels.h"

/* --- threads ------------------------------------------------------------------------------------------------------ */

typedef void (*parallel_fn)(void (*fn)(void *), void *what, unsigned num_threads, unsigned flags);

static parallel_fn run_parallel; /* GOMP_parallel of the runtime that PyTorch uses, or NULL */

EXPORT void moonbase_set_parallel(parallel_fn fn) { run_parallel = fn; }

struct tasks {
    long next, end;
    task_fn fn;
    void *what;
};

static void take_tasks(void *data) {
    struct tasks *tasks = data;
    for (;;) { /* whoever is free takes the next one: threads may be slowed down by other programs */
        long task = __atomic_fetch_add(&tasks->next, 1, __ATOMIC_RELAXED);
        if (task >= tasks->end) return;
        tasks->fn(tasks->what, task);
    }
}

void for_each_task(long num_threads, long num_tasks, task_fn fn, void *what) {
    struct tasks tasks = {0, num_tasks, fn, what};
    if (run_parallel && num_threads > 1 && num_tasks > 1)
        run_parallel(take_tasks, &tasks, (unsigned)least(num_threads, num_tasks), 0);
    else
        take_tasks(&tasks);
}

/* --- scratch memory ----------------------------------------------------------------------------------------------- */

static _Thread_local struct {
    float *memory;
    long floats;
} kept[SCRATCH_KINDS];

float *scratch(int kind, long floats) {
    if (kept[kind].floats < floats) {
        free(kept[kind].memory);
        kept[kind].floats = floats;
        kept[kind].memory = aligned_alloc(64, (size_t)(floats * 4 + 63) / 64 * 64);
        if (!kept[kind].memory) abort(); /* PyTorch, too, ends the process when memory is out at this place */
    }
    return kept[kind].memory;
}

void release_large_scratch(void) {
    for (int kind = 0; kind < SCRATCH_KINDS; kind++)
        if (kept[kind].floats > 16 << 20) { /* 64 MB: at such sizes fresh pages are a small part of the work */
            free(kept[kind].memory);
            kept[kind].memory = NULL;
            kept[kind].floats = 0;
        }
}

/* --- the product -------------------------------------------------------------------------------------------------- */

void tile(int rows, int nv, long depth, const float *a, long a_row, long a_col, const float *b, long b_row, float *c,
          long c_row, int add) {
#define CASE(R)                                                                             \
    case R:                                                                                 \
        if (nv == 2) tile_of(R, 2, depth, a, a_row, a_col, b, b_row, c, c_row, add);        \
        else tile_of(R, 1, depth, a, a_row, a_col, b, b_row, c, c_row, add);                \
        return;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

void pack_panels(long depth, long columns, const float *b, long b_row, float *panels) {
    for (long start = 0; start < columns; start += PANEL) {
        long width = least(PANEL, columns - start);
        for (long k = 0; k < depth; k++)
            for (long j = 0; j < width; j += LANES) store(panels + k * width + j, load(b + k * b_row + start + j));
        panels += depth * width;
    }
}

#if defined(__clang__)
#define WEAVE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define WEAVE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#if LANES == 16
#define LOWER_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LOWER_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOWER_HALVES 0, 4, 1, 5
#define UPPER_HALVES 2, 6, 3, 7
#endif

/* LANES x LANES floats: log2(LANES) times the upper half of the rows is woven into the lower half. */
static void transpose_square(const float *from, long from_row, float *to, long to_row) {
    vec rows[LANES], woven[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = load(from + i * from_row);
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            woven[2 * i] = WEAVE(rows[i], rows[i + LANES / 2], LOWER_HALVES);
            woven[2 * i + 1] = WEAVE(rows[i], rows[i + LANES / 2], UPPER_HALVES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = woven[i];
    }
    for (int i = 0; i < LANES; i++) store(to + i * to_row, rows[i]);
}

void pack_transposed(long depth, long columns, const float *b, long b_row, float *panels, int fill) {
    for (long start = 0; start < columns; start += PANEL) {
        long there = least(PANEL, columns - start), width = fill ? PANEL : there;
        if (there < width) memset(panels, 0, (size_t)(depth * width) * 4);
        for (long j = 0; j < there; j += LANES)
            for (long k = 0; k < depth; k += LANES) {
                const float *from = b + (start + j) * b_row + k;
                float *to = panels + k * width + j;
                if (j + LANES <= there && k + LANES <= depth) {
                    transpose_square(from, b_row, to, width);
                    continue;
                }
                for (long i = 0; i < least(LANES, there - j); i++)
                    for (long l = 0; l < least(LANES, depth - k); l++) to[l * width + i] = from[i * b_row + l];
            }
        panels += depth * width;
    }
}

void product(long rows, long columns, long depth, const float *a, long a_row, long a_col, const float *panels, float *c,
             long c_row, int add) {
    if (rows <= 0) return;
    long tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (long start = 0; start < columns; start += PANEL) {
        long width = least(PANEL, columns - start);
        for (long t = 0; t < tiles; t++) { /* of nearly equal height: a tile of one row alone would be slow */
            long from = rows * t / tiles, to = rows * (t + 1) / tiles;
            tile((int)(to - from), (int)(width / LANES), depth, a + from * a_row, a_row, a_col, panels, width,
                 c + from * c_row + start, c_row, add);
        }
        panels += depth * width;
    }
}
