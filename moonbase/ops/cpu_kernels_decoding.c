/* Attention over paged latents, fp32: what decoding and prefilling with multi-head latent attention do.

   A cached token is one row of X numbers, shared by all heads: queries score whole rows and read their first C numbers.
   Rows are taken from their pages in blocks of KEYS that start at multiples of KEYS, with a running maximum per query, so
   that a query's result does not depend on which others are computed beside it: its sums run over the dims, and then over
   the positions, one after the other. Queries (tokens times heads) are the lanes of the vectors.

   Shapes: N tokens, H heads, Z tokens per page, M pages of the longest sequence. */

#include "cpu_kernels.h"

#define QUERIES 48
#define KEYS 128
#define PAD 16 /* rows longer by this: a power of two would put whole columns into one cache set */

struct latent_attention {
    const float *query;      /* [N, H, X] */
    const float *store;      /* [pages, Z, X] */
    const int32_t *tables;   /* [sequences, M] */
    const int32_t *sequence; /* [N]; -1: padding, the result is 0 */
    const int32_t *position; /* [N] */
    float *out;              /* [N, H, C] */
    int64_t tokens, heads, dims, rank, page, pages, num_threads;
    float scale;
    int32_t *groups; /* [groups, 4]: first and last token, first and last head; inside */
};

/* Neighbouring tokens of one sequence, all heads, at most QUERIES queries; or one token and part of its heads. */
static long make_groups(const struct latent_attention *l) {
    long count = 0, most = l->heads < QUERIES ? QUERIES / l->heads : 1;
    for (long from = 0, to; from < l->tokens; from = to) {
        for (to = from + 1; to < l->tokens && to - from < most && l->sequence[to] == l->sequence[from]; to++) {}
        for (long head = 0; head < l->heads; head += QUERIES) {
            int32_t *group = l->groups + 4 * count++;
            group[0] = (int32_t)from, group[1] = (int32_t)to;
            group[2] = (int32_t)head, group[3] = (int32_t)least(l->heads, head + QUERIES);
        }
    }
    return count;
}

static void copy_keys(const struct latent_attention *l, const int32_t *table, long from, long count, float *keys) {
    for (long slot = from; slot < from + count; slot++, keys += l->dims + PAD)
        memcpy(keys, l->store + (table[slot / l->page] * l->page + slot % l->page) * l->dims, (size_t)l->dims * 4);
}

/* Logits [keys x queries] become exp(scale * logit - maximum), 0 where the key lies behind the query's position. */
static void softmax_columns(long keys, long first, long width, float scale, const int32_t *position, float *logits,
                            float *maximum, float *total, float *factor) {
    for (long q = 0; q < width; q += LANES) {
        ivec last = *(const ivec *)(position + q) - (int32_t)first;
        vec before = load(maximum + q), top = before, sum = {0};
        for (long k = 0; k < keys; k++) {
            ivec seen = last >= (int32_t)k;
            top = larger(choose(seen, load(logits + k * QUERIES + q) * scale, top), top);
        }
        for (long k = 0; k < keys; k++) {
            float *logit = logits + k * QUERIES + q;
            vec p = choose(last >= (int32_t)k, exp_of(load(logit) * scale - top), (vec){0});
            store(logit, p);
            sum += p;
        }
        vec shrink = exp_of(before - top);
        store(factor + q, shrink);
        store(total + q, load(total + q) * shrink + sum);
        store(maximum + q, top);
    }
}

static void group_task(void *what, long task) {
    const struct latent_attention *l = what;
    const int32_t *group = l->groups + 4 * task, *table = l->tables + l->sequence[group[0]] * l->pages;
    long heads = group[3] - group[2], queries = (group[1] - group[0]) * heads, X = l->dims, C = l->rank;
    long width = (queries + GRAIN - 1) / GRAIN * GRAIN, slots = 0;
    float *first_out = l->out + (group[0] * l->heads + group[2]) * C;
    if (l->sequence[group[0]] < 0) {
        for (long n = group[0]; n < group[1]; n++)
            memset(first_out + (n - group[0]) * l->heads * C, 0, (size_t)(heads * C) * 4);
        return;
    }
    float *keys = scratch(SCRATCH_TASK, KEYS * (X + PAD) + X * width + KEYS * QUERIES + QUERIES * C);
    float *panels = keys + KEYS * (X + PAD), *logits = panels + X * width, *sums = logits + KEYS * QUERIES;
    float maximum[QUERIES], total[QUERIES], factor[QUERIES], *out[QUERIES];
    int32_t position[QUERIES] = {0};
    memset(sums, 0, (size_t)(queries * C) * 4);
    for (long q = 0; q < QUERIES; q++) maximum[q] = -INFINITY, total[q] = 0;
    for (long q = 0; q < width; q++) { /* into the panels' order; columns that are no query are zeros */
        long start = q / PANEL * PANEL, wide = least(PANEL, width - start), n = group[0] + q / heads;
        const float *query = l->query + (n * l->heads + group[2] + q % heads) * X;
        for (long d = 0; d < X; d++) panels[start * X + d * wide + q - start] = q < queries ? query[d] : 0;
        if (q >= queries) continue;
        position[q] = l->position[n];
        out[q] = l->out + (n * l->heads + group[2] + q % heads) * C;
        if (position[q] >= slots) slots = position[q] + 1;
    }
    for (long first = 0; first < slots; first += KEYS) {
        long count = least(KEYS, slots - first);
        copy_keys(l, table, first, count, keys);
        product(count, width, X, keys, X + PAD, 1, panels, logits, QUERIES, 0);
        softmax_columns(count, first, width, l->scale, position, logits, maximum, total, factor);
        for (long q = 0; first > 0 && q < queries; q++)
            for (long d = 0; d < C; d++) sums[q * C + d] *= factor[q];
        for (long d = 0; d < C; d += PANEL)
            for (long q = 0; q < queries; q += TILE_ROWS)
                tile((int)least(TILE_ROWS, queries - q), (int)(least(PANEL, C - d) / LANES), count, logits + q, 1,
                     QUERIES, keys + d, X + PAD, sums + q * C + d, C, 1);
    }
    for (long q = 0; q < queries; q++)
        for (long d = 0; d < C; d++) out[q][d] = sums[q * C + d] / total[q];
}

EXPORT int moonbase_latent_attention(struct latent_attention *l) {
    long slices = (l->heads + QUERIES - 1) / QUERIES;
    l->groups = (int32_t *)scratch(SCRATCH_CALL, 4 * l->tokens * slices);
    for_each_task(l->num_threads, make_groups(l), group_task, l);
    release_large_scratch();
    return 0;
}
