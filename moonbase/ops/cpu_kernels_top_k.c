/* The places of the K largest of every row, fp32: the largest first, of equal ones the first first. NaN counts as larger
   than everything. For few choices among few values, as a router makes them. */

#include "cpu_kernels.h"

#define ROWS_A_TASK 256

struct top_k {
    const float *values; /* [N, E], E a multiple of GRAIN */
    int64_t *indices;    /* [N, K], K <= E */
    int64_t rows, count, choices, num_threads;
};

static void rows_task(void *what, long task) {
    const struct top_k *t = what;
    int32_t *keys = (int32_t *)scratch(SCRATCH_TASK, t->count);
    for (long n = task * ROWS_A_TASK; n < least(t->rows, (task + 1) * ROWS_A_TASK); n++) {
        for (long e = 0; e < t->count; e += LANES) { /* integers in the order of the values; the least is "taken" */
            ivec bits = *(const ivec *)(t->values + n * t->count + e), not_a_number = (bits & 0x7fffffff) > 0x7f800000;
            bits = bits ^ ((bits >> 31) & 0x7fffffff);
            *(ivec *)(keys + e) = (not_a_number & 0x7fffffff) | (~not_a_number & bits);
        }
        for (long k = 0; k < t->choices; k++) {
            ivec top = *(const ivec *)keys;
            for (long e = LANES; e < t->count; e += LANES) {
                ivec key = *(const ivec *)(keys + e), more = key > top;
                top = (more & key) | (~more & top);
            }
            int32_t lanes[LANES], largest;
            memcpy(lanes, &top, sizeof lanes);
            largest = lanes[0];
            for (int i = 1; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
            long place = 0;
            while (keys[place] != largest) place++;
            keys[place] = INT32_MIN;
            t->indices[n * t->choices + k] = place;
        }
    }
}

EXPORT int moonbase_top_k(struct top_k *t) {
    for_each_task(t->num_threads, (t->rows + ROWS_A_TASK - 1) / ROWS_A_TASK, rows_task, t);
    return 0;
}
