/* A whole forward pass over cached sequences, fp32: from tokens to the normalised hidden states that the head reads.

   The model is `Transformer.decode`, operation by operation; what this saves is everything between the operations,
   which for small models and few tokens is nearly all of the time. A row is computed alike whatever stands beside it:
   no sum depends on the number of rows or of threads. Shapes as in cpu_kernels_pass.h. */

#include "cpu_kernels_pass.h"

#define MOST_ROWS 32     /* of a task: their activations stay in the cache of a core */
#define ROWS_A_TASK 64   /* of one expert */
#define COLUMNS_AT_ONCE 16 /* of INT4: their weights, multiplied out, stay in the cache of a core */
#define SMALL (1L << 18) /* weights of a layer that two cores may both read */

/* --- operations on rows ------------------------------------------------------------------------------------------- */

static void norm_rows(long rows, long dims, const float *x, long x_row, const float *gain, float eps, float *out,
                      long out_row) {
    for (long i = 0; i < rows; i++, x += x_row, out += out_row) {
        vec square = {0};
        for (long d = 0; d < dims; d += LANES) square += load(x + d) * load(x + d);
        float scale = 1.0f / sqrtf(sum_of(square) / (float)dims + eps);
        for (long d = 0; d < dims; d += LANES) store(out + d, load(x + d) * scale * load(gain + d));
    }
}

/* Adjacent pairs come out half-split, as `model.rope.rotate` leaves them. */
static void rotate(long dims, const float *x, const float *cosine, const float *sine, float *out) {
    for (long i = 0; i < dims / 2; i++) {
        out[i] = x[2 * i] * cosine[i] - x[2 * i + 1] * sine[i];
        out[dims / 2 + i] = x[2 * i] * sine[i] + x[2 * i + 1] * cosine[i];
    }
}

/* silu(gate) * up * weight in place of the gate. */
static void swiglu(long width, float *gate, const float *up, float weight) {
    for (long j = 0; j < width; j += LANES)
        store(gate + j, load(gate + j) * sigmoid_of(load(gate + j)) * load(up + j) * weight);
}

static void add_routed(const struct pass *p, long row) {
    long D = p->hidden, K = p->choices;
    for (long d = 0; d < D; d += LANES) {
        vec sum = {0};
        for (long k = 0; k < K; k++) sum += load(p->routed + p->inverse[row * K + k] * D + d);
        store(p->x + row * D + d, load(p->x + row * D + d) + sum);
    }
}

/* --- before attention --------------------------------------------------------------------------------------------- */

/* Absorbed queries [rows, H, X] from plain ones [rows, H, nope + rope]: W_UK^T q, then the rotated part. */
static void absorb(const struct pass *p, long from, long rows, const float *plain) {
    long H = p->heads, K = p->nope + p->rope, X = p->rank + p->rope, half = p->rope / 2;
    float *query = p->query + from * H * X;
    for (long h = 0; h < H; h++) {
        const float *weight = p->layer->kv_b + h * (p->nope + p->value) * p->rank;
        for (long i = 0; i < rows; i += TILE_ROWS)
            for (long c = 0; c < p->rank; c += PANEL)
                tile((int)least(TILE_ROWS, rows - i), (int)(least(PANEL, p->rank - c) / LANES), p->nope,
                     plain + (i * H + h) * K, H * K, 1, weight + c, p->rank, query + (i * H + h) * X + c, H * X, 0);
    }
    for (long i = 0; i < rows; i++) {
        const float *cosine = p->cosine + p->position[from + i] * half, *sine = p->sine + p->position[from + i] * half;
        for (long h = 0; h < H; h++)
            rotate(p->rope, plain + (i * H + h) * K + p->nope, cosine, sine, query + (i * H + h) * X + p->rank);
    }
}

static void store_latents(const struct pass *p, long from, long rows, const float *kv) {
    long C = p->rank, X = C + p->rope, half = p->rope / 2;
    for (long i = 0; i < rows; i++, kv += X) {
        long position = p->position[from + i];
        long page = p->tables[p->sequence[from + i] * p->pages + position / p->page];
        float *slot = p->layer->store + (page * p->page + position % p->page) * X;
        norm_rows(1, C, kv, X, p->layer->kv_a_norm, p->latent_eps, slot, X);
        rotate(p->rope, kv + C, p->cosine + position * half, p->sine + position * half, slot + C);
    }
}

static void before_task(void *what, long task) {
    const struct pass *p = what;
    const struct pass_layer *l = p->layer;
    long from = task * p->block, rows = least(p->block, p->rows - from), D = p->hidden, Q = p->q_rank, threads;
    long X = p->rank + p->rope, wide = p->heads * (p->nope + p->rope);
    float *normed = scratch(SCRATCH_TASK, rows * (D + Q + wide + X)), *low = normed + rows * D;
    float *plain = low + rows * Q, *kv = plain + rows * wide, *x = p->x + from * D;
    threads = p->inner_threads;
    for (long i = 0; i < rows; i++)
        if (l == p->layers) memcpy(x + i * D, p->embedding + p->token[from + i] * D, (size_t)D * 4);
        else if (p->pending) add_routed(p, from + i);
    norm_rows(rows, D, x, D, l->input_norm, p->eps, normed, D);
    if (l->q_a) {
        dots(threads, rows, Q, D, normed, D, l->q_a, low, Q, 0);
        norm_rows(rows, Q, low, Q, l->q_a_norm, p->latent_eps, low, Q);
        dots(threads, rows, wide, Q, low, Q, l->q_b, plain, wide, 0);
    } else
        dots(threads, rows, wide, D, normed, D, l->q_b, plain, wide, 0);
    dots(threads, rows, X, D, normed, D, l->kv_a, kv, X, 0);
    absorb(p, from, rows, plain);
    store_latents(p, from, rows, kv);
}

/* --- after attention ---------------------------------------------------------------------------------------------- */

/* The `count` largest of `scores`, the first of equals; `places` and `values` descending. Scores that are NaN are never
   taken. */
static void largest(long count, long length, const float *scores, int32_t *places, float *values) {
    for (long k = 0; k < count; k++) places[k] = (int32_t)k, values[k] = -INFINITY;
    for (long i = 0; i < length; i++) {
        if (!(scores[i] > values[count - 1])) continue;
        long k = count - 1;
        for (; k > 0 && scores[i] > values[k - 1]; k--) places[k] = places[k - 1], values[k] = values[k - 1];
        places[k] = (int32_t)i, values[k] = scores[i];
    }
}

/* Scores [E] become biased scores, -infinity outside the best groups by the sum of each one's best two. */
static void bias_scores(const struct pass *p, float *scores, float *spare, int32_t *places) {
    long E = p->num_experts, G = p->groups, size = E / G;
    for (long e = 0; e < E; e++) scores[e] += p->layer->bias[e];
    if (G == 1) return;
    float best[2], *sums = spare, *values = spare + G;
    for (long g = 0; g < G; g++) {
        largest(2, size, scores + g * size, places, best);
        sums[g] = best[0] + best[1];
    }
    largest(p->kept_groups, G, sums, places, values);
    for (long g = 0; g < G; g++) {
        int kept = 0;
        for (long k = 0; k < p->kept_groups; k++) kept |= places[k] == g;
        for (long e = g * size; !kept && e < (g + 1) * size; e++) scores[e] = -INFINITY;
    }
}

/* Chosen experts and their weights for rows of router logits [rows, wide]. */
static void choose_experts(const struct pass *p, long from, long rows, long wide, float *logits, float *spare,
                           int32_t *places) {
    long K = p->choices;
    float *biased = spare, *values = biased + wide;
    for (long i = 0; i < rows; i++) {
        float *scores = logits + i * wide, *weights = p->weights + (from + i) * K, sum = 1e-20f;
        int32_t *chosen = p->chosen + (from + i) * K;
        for (long e = 0; e < wide; e += LANES) store(scores + e, sigmoid_of(load(scores + e)));
        memcpy(biased, scores, (size_t)wide * 4);
        bias_scores(p, biased, values, places);
        largest(K, p->num_experts, biased, chosen, values);
        for (long k = 0; k < K; k++) sum += weights[k] = scores[chosen[k]];
        float scale = p->normalise ? p->routed_scale / sum : p->routed_scale;
        for (long k = 0; k < K; k++) weights[k] *= scale;
    }
}

static void after_task(void *what, long task) {
    const struct pass *p = what;
    const struct pass_layer *l = p->layer;
    long from = task * p->block, rows = least(p->block, p->rows - from), D = p->hidden, C = p->rank, H = p->heads;
    long V = p->value, I = l->width, E = p->num_experts, wide = (E + GRAIN - 1) / GRAIN * GRAIN;
    float *gate = scratch(SCRATCH_TASK, rows * (H * V + 2 * I + wide) + 5 * wide), *up = gate + rows * I;
    float *logits = up + rows * I, *spare = logits + rows * wide, *values = spare + 5 * wide;
    float *x = p->x + from * D, *normed = p->normed + from * D;
    for (long h = 0; h < H; h++)
        dots(1, rows, V, C, p->read + (from * H + h) * C, H * C, l->kv_b + (h * (p->nope + V) + p->nope) * C,
             values + h * V, H * V, 0);
    dots(p->inner_threads, rows, D, H * V, values, H * V, l->o, x, D, 1);
    norm_rows(rows, D, x, D, l->post_norm, p->eps, normed, D);
    if (l->gate) {
        dots(p->inner_threads, rows, I, D, normed, D, l->gate, gate, I, 0);
        dots(p->inner_threads, rows, I, D, normed, D, l->up, up, I, 0);
        swiglu(rows * I, gate, up, 1.0f);
        dots(p->inner_threads, rows, D, I, gate, I, l->down, x, D, 1);
    }
    if (l->router) {
        memset(logits, 0, (size_t)(rows * wide) * 4);
        dots(p->inner_threads, rows, E, D, normed, D, l->router, logits, wide, 0);
        choose_experts(p, from, rows, wide, logits, spare, (int32_t *)(spare + 4 * wide));
    }
}

static void last_task(void *what, long task) {
    const struct pass *p = what;
    long from = task * p->block, rows = least(p->block, p->rows - from), D = p->hidden;
    for (long i = 0; i < rows && p->pending; i++) add_routed(p, from + i);
    norm_rows(rows, D, p->x + from * D, D, p->norm, p->eps, p->out + from * D, D);
}

/* --- experts ------------------------------------------------------------------------------------------------------ */

/* INT4 as floats, which hold the products exactly. */
static void multiply_out(long groups, const uint32_t *words, const uint16_t *scales, float *out) {
    for (long g = 0; g < groups; g++, out += INT4_GROUP) {
        union { uint32_t bits; float value; } scale = {(uint32_t)scales[g] << 16};
        for (int word = 0; word < INT4_GROUP / 8; word++, words++)
            for (int i = 0; i < 8; i++) out[8 * word + i] = (float)((int)(*words >> 4 * i & 15) - 8) * scale.value;
    }
}

/* C [rows x columns] = A W^T with one expert's matrix W [columns x depth], the same bits from floats and from INT4. */
static void expert_dots(long rows, long columns, long depth, const float *a, long a_row, const struct stack *stack,
                        long expert, float *c, long c_row, float *spare) {
    if (stack->floats) {
        dots(1, rows, columns, depth, a, a_row, stack->floats + expert * columns * depth, c, c_row, 0);
        return;
    }
    for (long j = 0; j < columns; j += COLUMNS_AT_ONCE) {
        long there = least(COLUMNS_AT_ONCE, columns - j), first = (expert * columns + j) * depth;
        multiply_out(there * depth / INT4_GROUP, stack->words + first / 8, stack->scales + first / INT4_GROUP, spare);
        dots(1, rows, there, depth, a, a_row, spare, c + j, c_row, 0);
    }
}

static void expert_task(void *what, long task) {
    const struct pass *p = what;
    const int32_t *work = p->work + 3 * task;
    long D = p->hidden, I = p->expert_width, rows = work[2] - work[1];
    float *x = scratch(SCRATCH_TASK, ROWS_A_TASK * (D + 2 * I) + COLUMNS_AT_ONCE * (D + I));
    float *active = x + ROWS_A_TASK * D, *spare = active + ROWS_A_TASK * 2 * I;
    for (long i = 0; i < rows; i++)
        memcpy(x + i * D, p->normed + p->order[work[1] + i] / p->choices * D, (size_t)D * 4);
    expert_dots(rows, 2 * I, D, x, D, &p->layer->expert_gate_up, work[0], active, 2 * I, spare);
    for (long i = 0; i < rows; i++)
        swiglu(I, active + i * 2 * I, active + i * 2 * I + I, p->weights[p->order[work[1] + i]]);
    expert_dots(rows, D, I, active, 2 * I, &p->layer->expert_down, work[0], p->routed + work[1] * D, D, spare);
}

/* Counting sort of all (row, choice) pairs by expert, cut into tasks; returns their number. */
static long sort_by_expert(const struct pass *p) {
    long places = p->rows * p->choices, count = 0;
    int32_t start = 0;
    memset(p->ends, 0, (size_t)p->num_experts * 4);
    for (long place = 0; place < places; place++) p->ends[p->chosen[place]]++;
    for (int32_t expert = 0; expert < p->num_experts; expert++) {
        int32_t end = start + p->ends[expert];
        p->ends[expert] = start; /* the next free row */
        for (; start < end; start = (int32_t)least(end, start + ROWS_A_TASK)) {
            int32_t *task = p->work + 3 * count++;
            task[0] = expert, task[1] = start, task[2] = (int32_t)least(end, start + ROWS_A_TASK);
        }
    }
    for (long place = 0; place < places; place++) {
        int32_t row = p->ends[p->chosen[place]]++;
        p->order[row] = (int32_t)place;
        p->inverse[place] = row;
    }
    return count;
}

/* --- the pass ----------------------------------------------------------------------------------------------------- */

/* Either the rows are divided up among the threads, a task taking them through several operations; or, where there are
   few rows and large weights, the columns of every operation by itself. */
static void divide_rows(struct pass *p) {
    long D = p->hidden, wide = p->heads * (p->nope + p->rope), width = 0;
    for (long i = 0; i < p->num_layers; i++) width = p->layers[i].width > width ? p->layers[i].width : width;
    long weights = p->q_rank * (D + wide) + (p->rank + p->rope) * D + p->heads * (p->nope + p->value) * p->rank
                   + p->heads * p->value * D + 3 * width * D + (p->q_rank ? 0 : D * wide);
    int divide = p->num_threads > 1 && (p->rows >= 64 || weights < SMALL) && p->rows * weights >= WORTH_WAKING;
    long each = divide ? (p->rows + p->num_threads - 1) / p->num_threads : p->rows;
    p->block = least(MOST_ROWS, (each + 3) / 4 * 4);
    p->inner_threads = divide ? 1 : p->num_threads;
}

static void for_blocks(const struct pass *p, task_fn fn) {
    for_each_task(p->inner_threads == 1 ? p->num_threads : 1, (p->rows + p->block - 1) / p->block, fn, (void *)p);
}

static void take_memory(struct pass *p) {
    long N = p->rows, NK = N * p->choices, D = p->hidden, X = p->rank + p->rope, E = p->num_experts;
    float *x = scratch(SCRATCH_CALL, N * (2 * D + p->heads * (X + p->rank)) + NK * (4 + D) + 4 * E + 3 * NK);
    p->x = x;
    p->normed = p->x + N * D;
    p->query = p->normed + N * D;
    p->read = p->query + N * p->heads * X;
    p->routed = p->read + N * p->heads * p->rank;
    p->weights = p->routed + NK * D;
    p->chosen = (int32_t *)(p->weights + NK);
    p->order = p->chosen + NK;
    p->inverse = p->order + NK;
    p->ends = p->inverse + NK;
    p->work = p->ends + E;
}

EXPORT int moonbase_pass(struct pass *p) {
    take_memory(p);
    divide_rows(p);
    p->pending = 0;
    for (p->layer = p->layers; p->layer < p->layers + p->num_layers; p->layer++) {
        for_blocks(p, before_task);
        attend(p);
        for_blocks(p, after_task);
        p->pending = p->layer->router != NULL;
        if (p->pending) {
            long work = p->rows * p->choices * 3 * p->hidden * p->expert_width;
            for_each_task(threads_for(p->num_threads, work), sort_by_expert(p), expert_task, p);
        }
    }
    for_blocks(p, last_task);
    release_large_scratch();
    return 0;
}
