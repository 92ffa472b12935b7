/* Attention of a forward pass over paged latents, fp32: queries of one sequence against stretches of its keys.

   A cached token is one row of X numbers, shared by all heads: queries score whole rows and read their first C numbers.
   The context is cut at multiples of STRETCH positions. A query's result for a stretch depends on the two alone, and
   the stretches' results are joined in their order; so threads may share the stretches of one long context, and a
   query's bits are the same whoever computes beside it. Keys are the lanes of the vectors: the fewest queries fill
   them too.

   Shapes as in cpu_kernels_pass.h; Q queries (tokens times heads) of a group. */

#include "cpu_kernels_pass.h"

#define STRETCH 512
#define LOGITS_ROW (STRETCH + 16) /* a row length that is a power of two would put whole columns into one cache set */
#define QUERIES (4 * TILE_ROWS)
#define SLOTS GRAIN /* keys that are turned over at once: a page, or an even part of one */

struct group {
    int32_t first, last, head, last_head, slots; /* tokens; heads; keys that the last query sees */
};

struct attention {
    const struct pass *pass;
    struct group *groups;
    float *parts; /* [tasks, QUERIES, C + 2]: sums, maximum and total of a stretch */
    int32_t (*work)[2]; /* group and stretch of a task where stretches are divided up */
};

/* Where the slots from `slot` on lie; how many of the next `wanted` lie together. */
static const float *keys_at(const struct pass *p, const int32_t *table, long slot, long wanted, long *together) {
    long page = slot / p->page, place = slot % p->page, count = p->page - place;
    for (long next = page; count < wanted && table[next + 1] == table[next] + 1; next++) count += p->page;
    *together = least(count, wanted);
    return p->layer->store + (table[page] * p->page + place) * (p->rank + p->rope);
}

/* `visible` logits of `count` become exp(scale * logit - maximum), the others 0. Sums go by lanes, then as a tree. */
static void softmax_row(float *logits, long visible, long count, float scale, float *maximum, float *total) {
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    vec top = splat(-INFINITY), sum = {0};
    for (long k = 0; k < visible; k += LANES)
        top = larger(choose(lane < (int32_t)(visible - k), load(logits + k) * scale, top), top);
    float largest = largest_of(top);
    for (long k = 0; k < count; k += LANES) {
        vec p = choose(lane < (int32_t)(visible - k), exp_of(load(logits + k) * scale - largest), (vec){0});
        store(logits + k, p);
        sum += p;
    }
    *maximum = largest;
    *total = sum_of(sum);
}

static long part_size(const struct pass *p) { return QUERIES * (p->rank + 2); }
static long memory_size(const struct pass *p) { return 2 * SLOTS * (p->rank + p->rope) + QUERIES * LOGITS_ROW; }

/* One stretch for all queries of a group: sums [Q, C], then maximum and total of each, in `part`. */
static void stretch_of(const struct pass *p, const struct group *g, long stretch, float *part, float *memory) {
    long heads = g->last_head - g->head, queries = (g->last - g->first) * heads, X = p->rank + p->rope, C = p->rank;
    long first = stretch * STRETCH, count = least(STRETCH, g->slots - first), together;
    const int32_t *table = p->tables + p->sequence[g->first] * p->pages;
    const float *query = p->query + (g->first * p->heads + g->head) * X, *keys;
    float *panels = memory, *copied = panels + SLOTS * X, *logits = copied + SLOTS * X;
    /* Whole pages are scored, though their end may not have been written: softmax_row looks at what is visible. */
    for (long k = 0; k < count; k += together) {
        keys = keys_at(p, table, first + k, SLOTS, &together);
        memcpy(copied, keys, (size_t)(together * X) * 4); /* in order, so that memory streams */
        pack_transposed(X, together, copied, X, panels, 0);
        product(queries, together, X, query, X, 1, panels, logits + k, LOGITS_ROW, 0);
    }
    for (long q = 0; q < queries; q++)
        softmax_row(logits + q * LOGITS_ROW, least(count, p->position[g->first + q / heads] + 1 - first), count,
                    p->scale, part + queries * C + 2 * q, part + queries * C + 2 * q + 1);
    memset(part, 0, (size_t)(queries * C) * 4);
    for (long k = 0; k < count; k += together) {
        keys = keys_at(p, table, first + k, count - k, &together);
        for (long c = 0; c < C; c += PANEL)
            for (long q = 0; q < queries; q += TILE_ROWS)
                tile((int)least(TILE_ROWS, queries - q), (int)(least(PANEL, C - c) / LANES), together,
                     logits + q * LOGITS_ROW + k, LOGITS_ROW, 1, keys + c, X, part + q * C + c, C, 1);
    }
}

/* Sums, maxima and totals of one more stretch join those of the ones before it, which begin as 0, -infinity and 0. */
static __attribute__((noinline)) void join(long queries, long C, const float *part, float *all) {
    for (long q = 0; q < queries; q++) {
        const float *new = part + queries * C + 2 * q;
        float *old = all + queries * C + 2 * q, top = new[0] > old[0] ? new[0] : old[0];
        if (new[0] == -INFINITY) continue; /* it sees nothing of this stretch */
        float keep = exp_of(splat(old[0] - top))[0], gain = exp_of(splat(new[0] - top))[0];
        for (long c = 0; c < C; c += LANES)
            store(all + q * C + c, load(all + q * C + c) * keep + load(part + q * C + c) * gain);
        old[1] = old[1] * keep + new[1] * gain;
        old[0] = top;
    }
}

static long stretches_of(const struct group *g) { return (g->slots + STRETCH - 1) / STRETCH; }

/* The group's results from its stretches: computed here, or found in `parts`. */
static void finish(const struct pass *p, const struct group *g, const float *parts) {
    long heads = g->last_head - g->head, queries = (g->last - g->first) * heads, C = p->rank;
    float *memory = scratch(SCRATCH_TASK, memory_size(p) + 2 * part_size(p));
    float *all = memory + memory_size(p), *part = all + part_size(p);
    memset(all, 0, (size_t)(queries * (C + 2)) * 4);
    for (long q = 0; q < queries; q++) all[queries * C + 2 * q] = -INFINITY;
    for (long stretch = 0; stretch < stretches_of(g); stretch++) {
        if (!parts) stretch_of(p, g, stretch, part, memory);
        join(queries, C, parts ? parts + stretch * part_size(p) : part, all);
    }
    float *out = p->read + (g->first * p->heads + g->head) * C;
    for (long q = 0; q < queries; q++)
        for (long c = 0; c < C; c++) out[q * C + c] = all[q * C + c] / all[queries * C + 2 * q + 1];
}

static void group_task(void *what, long task) {
    const struct attention *a = what;
    finish(a->pass, a->groups + task, NULL);
}

static void stretch_task(void *what, long task) {
    const struct attention *a = what;
    stretch_of(a->pass, a->groups + a->work[task][0], a->work[task][1], a->parts + task * part_size(a->pass),
               scratch(SCRATCH_TASK, memory_size(a->pass)));
}

/* Neighbouring tokens of one sequence, all heads, at most QUERIES queries; or one token and part of its heads. */
static long make_groups(const struct pass *p, struct group *groups) {
    long count = 0, most = p->heads < QUERIES ? QUERIES / p->heads : 1;
    for (long from = 0, to; from < p->rows; from = to) {
        for (to = from + 1; to < p->rows && to - from < most && p->sequence[to] == p->sequence[from]
                            && p->position[to] > p->position[to - 1]; to++) {}
        for (long head = 0; head < p->heads; head += QUERIES)
            groups[count++] = (struct group){(int32_t)from, (int32_t)to, (int32_t)head,
                                             (int32_t)least(p->heads, head + QUERIES), p->position[to - 1] + 1};
    }
    return count;
}

void attend(const struct pass *p) {
    struct attention a = {.pass = p};
    long slices = (p->heads + QUERIES - 1) / QUERIES, stretches = 0, multiplications = 0, size = part_size(p);
    a.groups = (struct group *)scratch(SCRATCH_PART, 5 * p->rows * slices);
    long groups = make_groups(p, a.groups);
    for (long i = 0; i < groups; i++) {
        const struct group *g = a.groups + i;
        stretches += stretches_of(g);
        multiplications += (long)g->slots * (g->last - g->first) * (g->last_head - g->head) * (2 * p->rank + p->rope);
    }
    long threads = threads_for(p->num_threads, multiplications);
    if (threads == 1 || groups >= 4 * threads || stretches < 2 * groups || stretches * size > 16 << 20) {
        for_each_task(threads, groups, group_task, &a);
        return;
    }
    a.groups = (struct group *)scratch(SCRATCH_PART, 5 * p->rows * slices + stretches * (2 + size));
    groups = make_groups(p, a.groups);
    a.work = (int32_t (*)[2])(a.groups + groups);
    a.parts = (float *)(a.work + stretches);
    long task = 0;
    for (int32_t i = 0; i < groups; i++)
        for (int32_t stretch = 0; stretch < stretches_of(a.groups + i); stretch++, task++)
            a.work[task][0] = i, a.work[task][1] = stretch;
    for_each_task(threads, task, stretch_task, &a);
    const float *parts = a.parts;
    for (long i = 0; i < groups; parts += stretches_of(a.groups + i++) * size) finish(p, a.groups + i, parts);
}
