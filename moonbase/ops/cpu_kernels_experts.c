/* A layer of routed experts, fp32: y_t = sum_k w_tk E_(i_tk)(x_t),  E(x) = W_down( silu(W_gate x) * W_up x ).

   The (token, choice) pairs are sorted by expert. A task is one expert (forward: at most ROWS_A_TASK of its rows), which
   goes through its rows in blocks that stay in the cache from the gathered inputs to the outputs. These lie in the sorted
   order until the choices of every token are added up, k = 0, 1, ...: no two tasks write to one place, and no sum
   depends on which other tokens there are.

   Shapes: T tokens, K choices, N = T K rows, D hidden, E experts, I expert width, F = 2 I (gate rows, then up rows). D
   and I are multiples of GRAIN. */

#include "cpu_kernels.h"

#define BLOCK (8 * TILE_ROWS) /* rows: their inputs, pre-activations and activations fit the cache of a core */
#define ROWS_A_TASK 1024      /* against one expert that has most of the tokens */
#define PAD 16                /* rows longer by this: a power of two would put whole columns into one cache set */

struct experts {
    const float *x;         /* [T, D] */
    const int64_t *indices; /* [T, K]; read by the sort */
    const float *weights;   /* [T, K] */
    const float *gate_up;   /* [E, F, D] */
    const float *down;      /* [E, D, I] */
    int32_t *order;         /* [N]: place t K + k of sorted row n */
    int32_t *ends;          /* [E]: where each expert's rows end */
    float *pre_activation;  /* [N, F]; forward: NULL where no backward pass follows */
    float *y;               /* [T, D] */
    int64_t tokens, choices, num_experts, hidden, width, num_threads;
    /* backward only */
    const float *grad_y;                        /* [T, D] */
    float *grad_x, *grad_weights;               /* [T, D], [T, K] */
    float *grad_gate_up, *grad_down;            /* as the weights */
    /* inside */
    float *rows;         /* [N, D]: outputs, or gradients of inputs, in sorted order */
    int32_t *inverse;    /* [N]: the sorted row of place t K + k */
    const int32_t *work; /* [tasks, 3]: expert, first and last row */
};

/* Stable counting sort. Returns 0, or -1 for an index that is no expert's. */
static int sort_by_expert(struct experts *e) {
    long rows = e->tokens * e->choices;
    memset(e->ends, 0, (size_t)e->num_experts * 4);
    for (long place = 0; place < rows; place++) {
        if (e->indices[place] < 0 || e->indices[place] >= e->num_experts) return -1;
        e->ends[e->indices[place]]++;
    }
    int32_t start = 0;
    for (long expert = 0; expert < e->num_experts; expert++) {
        int32_t count = e->ends[expert];
        e->ends[expert] = start; /* the next free row; in the end the row after the last */
        start += count;
    }
    for (long place = 0; place < rows; place++) e->order[e->ends[e->indices[place]]++] = (int32_t)place;
    return 0;
}

/* Tasks of at most `limit` rows, written to `work`; returns their number. Experts without rows get one where `empty`. */
static long divide(const struct experts *e, long limit, int empty, int32_t *work) {
    long count = 0, start = 0;
    for (int32_t expert = 0; expert < e->num_experts; start = e->ends[expert++]) {
        long end = e->ends[expert];
        for (long from = start; from < end || (empty && start == end && from == start); from += limit) {
            int32_t *task = work + 3 * count++;
            task[0] = expert, task[1] = (int32_t)from, task[2] = (int32_t)least(end, from + limit);
        }
    }
    return count;
}

static void gather(const struct experts *e, const float *x, long from, long to, float *block) {
    for (long n = from; n < to; n++)
        memcpy(block + (n - from) * (e->hidden + PAD), x + e->order[n] / e->choices * e->hidden, (size_t)e->hidden * 4);
}

static void forward_task(void *what, long task) {
    const struct experts *e = what;
    const int32_t *work = e->work + 3 * task;
    long D = e->hidden, I = e->width, F = 2 * I;
    float *gate_up = scratch(SCRATCH_TASK, F * D + D * I + BLOCK * (D + PAD + F + I + PAD));
    float *down = gate_up + F * D, *x = down + D * I, *own = x + BLOCK * (D + PAD), *active = own + BLOCK * F;
    pack_transposed(D, F, e->gate_up + work[0] * F * D, D, gate_up, 0);
    pack_transposed(I, D, e->down + work[0] * D * I, I, down, 0);
    for (long from = work[1]; from < work[2]; from += BLOCK) {
        long to = least(work[2], from + BLOCK), rows = to - from;
        float *pre = e->pre_activation ? e->pre_activation + from * F : own;
        gather(e, e->x, from, to, x);
        product(rows, F, D, x, D + PAD, 1, gate_up, pre, F, 0);
        for (long i = 0; i < rows; i++) {
            float weight = e->weights[e->order[from + i]];
            const float *gate = pre + i * F, *up = gate + I;
            for (long j = 0; j < I; j += LANES)
                store(active + i * (I + PAD) + j,
                      load(gate + j) * sigmoid_of(load(gate + j)) * load(up + j) * weight);
        }
        product(rows, D, I, active, I + PAD, 1, down, e->rows + from * D, D, 0);
    }
}

float swiglu_row(long width, const float *pre, const float *grad, float weight, float *grad_pre, float *active) {
    vec sum = {0};
    for (long j = 0; j < width; j += LANES) {
        vec gate = load(pre + j), up = load(pre + width + j), found = load(grad + j);
        vec sigmoid = sigmoid_of(gate), silu = gate * sigmoid, product = silu * up;
        sum += found * product;
        found *= weight;
        store(active + j, product * weight);
        store(grad_pre + width + j, found * silu);
        store(grad_pre + j, found * up * (sigmoid * (1.0f + gate * (1.0f - sigmoid))));
    }
    return sum_of(sum);
}

static void backward_task(void *what, long task) {
    const struct experts *e = what;
    const int32_t *work = e->work + 3 * task;
    long D = e->hidden, I = e->width, F = 2 * I;
    float *gate_up = scratch(SCRATCH_TASK, F * D + D * I + BLOCK * (2 * (D + PAD) + D + F + PAD + 3 * I));
    float *down = gate_up + F * D, *x = down + D * I, *grad = x + BLOCK * (D + PAD), *panels = grad + BLOCK * (D + PAD);
    float *grad_pre = panels + BLOCK * D, *grad_active = grad_pre + BLOCK * (F + PAD);
    float *active = grad_active + BLOCK * I, *active_panels = active + BLOCK * I;
    float *grad_gate_up = e->grad_gate_up + work[0] * F * D, *grad_down = e->grad_down + work[0] * D * I;
    if (work[1] == work[2]) {
        memset(grad_gate_up, 0, (size_t)(F * D) * 4);
        memset(grad_down, 0, (size_t)(D * I) * 4);
        return;
    }
    pack_panels(F, D, e->gate_up + work[0] * F * D, D, gate_up);
    pack_panels(D, I, e->down + work[0] * D * I, I, down);
    for (long from = work[1]; from < work[2]; from += BLOCK) {
        long to = least(work[2], from + BLOCK), rows = to - from;
        gather(e, e->grad_y, from, to, grad);
        gather(e, e->x, from, to, x);
        product(rows, I, D, grad, D + PAD, 1, down, grad_active, I, 0);
        for (long i = 0; i < rows; i++) {
            long place = e->order[from + i];
            e->grad_weights[place] = swiglu_row(I, e->pre_activation + (from + i) * F, grad_active + i * I,
                                                e->weights[place], grad_pre + i * (F + PAD), active + i * I);
        }
        product(rows, D, F, grad_pre, F + PAD, 1, gate_up, e->rows + from * D, D, 0);
        pack_panels(rows, I, active, I, active_panels);
        product(D, I, rows, grad, 1, D + PAD, active_panels, grad_down, I, from > work[1]);
        pack_panels(rows, D, x, D + PAD, panels);
        product(F, D, rows, grad_pre, 1, F + PAD, panels, grad_gate_up, D, from > work[1]);
    }
}

#define TOKENS_A_TASK 256

struct sums {
    const struct experts *experts;
    float *out;
};

static void sum_task(void *what, long task) {
    const struct sums *sums = what;
    const struct experts *e = sums->experts;
    long D = e->hidden;
    for (long t = task * TOKENS_A_TASK; t < least(e->tokens, (task + 1) * TOKENS_A_TASK); t++)
        for (long d = 0; d < D; d += LANES) {
            vec sum = {0};
            for (long k = 0; k < e->choices; k++) sum += load(e->rows + e->inverse[t * e->choices + k] * D + d);
            store(sums->out + t * D + d, sum);
        }
}

static void run(struct experts *e, task_fn fn, long limit, int empty, float *out) {
    long rows = e->tokens * e->choices, tasks = e->num_experts + rows / limit + 1;
    e->rows = scratch(SCRATCH_CALL, rows * e->hidden + rows + 3 * tasks);
    e->inverse = (int32_t *)(e->rows + rows * e->hidden);
    int32_t *work = e->inverse + rows;
    e->work = work;
    for (long n = 0; n < rows; n++) e->inverse[e->order[n]] = (int32_t)n;
    for_each_task(e->num_threads, divide(e, limit, empty, work), fn, e);
    struct sums sums = {e, out};
    for_each_task(e->num_threads, (e->tokens + TOKENS_A_TASK - 1) / TOKENS_A_TASK, sum_task, &sums);
    release_large_scratch();
}

EXPORT int moonbase_experts(struct experts *e) {
    if (sort_by_expert(e)) return -1;
    run(e, forward_task, ROWS_A_TASK, 0, e->y);
    return 0;
}

EXPORT int moonbase_experts_backward(struct experts *e) {
    run(e, backward_task, e->tokens * e->choices, 1, e->grad_x);
    return 0;
}
