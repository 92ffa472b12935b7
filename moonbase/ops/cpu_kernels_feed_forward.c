/* A dense SwiGLU feed-forward part, fp32: y = W_down( silu(W_gate x) * W_up x ), forward and backward in one call each. A
   block of rows goes through all of it in the cache; only the pre-activations are kept for the backward pass.

   Shapes: N rows, D hidden, I width; D and I multiples of GRAIN. */

#include "cpu_kernels.h"

#define BLOCK (8 * TILE_ROWS)
#define PAD 16 /* rows longer by this: a power of two would put whole columns into one cache set */
#define SUMS_A_TASK 4096

struct feed_forward {
    const float *x, *gate, *up, *down;      /* [N, D], [I, D], [I, D], [D, I] */
    float *pre_activation;                  /* [N, 2 I]: gate, then up */
    float *y;                               /* [N, D] */
    const float *grad_y;                    /* [N, D] */
    float *grad_x;                          /* [N, D] */
    float *grad_gate, *grad_up, *grad_down; /* as the weights */
    int64_t rows, hidden, width, blocks_a_task, num_threads;
    float *panels, *partial; /* inside */
};

static long tasks_of(const struct feed_forward *f) {
    return (f->rows + f->blocks_a_task * BLOCK - 1) / (f->blocks_a_task * BLOCK);
}

static void forward_task(void *what, long task) {
    const struct feed_forward *f = what;
    long D = f->hidden, I = f->width, first = task * f->blocks_a_task * BLOCK;
    float *active = scratch(SCRATCH_TASK, BLOCK * (I + PAD));
    for (long n = first; n < least(f->rows, first + f->blocks_a_task * BLOCK); n += BLOCK) {
        long rows = least(BLOCK, f->rows - n);
        float *pre = f->pre_activation + n * 2 * I;
        product(rows, I, D, f->x + n * D, D, 1, f->panels, pre, 2 * I, 0);
        product(rows, I, D, f->x + n * D, D, 1, f->panels + D * I, pre + I, 2 * I, 0);
        for (long i = 0; i < rows; i++)
            for (long j = 0; j < I; j += LANES) {
                vec gate = load(pre + i * 2 * I + j);
                store(active + i * (I + PAD) + j, gate * sigmoid_of(gate) * load(pre + i * 2 * I + I + j));
            }
        product(rows, D, I, active, I + PAD, 1, f->panels + 2 * D * I, f->y + n * D, D, 0);
    }
}

static void backward_task(void *what, long task) {
    const struct feed_forward *f = what;
    long D = f->hidden, I = f->width, first = task * f->blocks_a_task * BLOCK;
    float *grad = scratch(SCRATCH_TASK, BLOCK * (2 * D + PAD + 2 * I + PAD + 3 * I)), *panels = grad + BLOCK * (D + PAD);
    float *grad_pre = panels + BLOCK * D, *grad_active = grad_pre + BLOCK * (2 * I + PAD);
    float *active = grad_active + BLOCK * I, *active_panels = active + BLOCK * I;
    float *grad_gate_up = f->partial + task * 3 * D * I, *grad_down = grad_gate_up + 2 * D * I;
    for (long n = first; n < least(f->rows, first + f->blocks_a_task * BLOCK); n += BLOCK) {
        long rows = least(BLOCK, f->rows - n);
        for (long i = 0; i < rows; i++) memcpy(grad + i * (D + PAD), f->grad_y + (n + i) * D, (size_t)D * 4);
        product(rows, I, D, grad, D + PAD, 1, f->panels + 2 * D * I, grad_active, I, 0);
        for (long i = 0; i < rows; i++)
            swiglu_row(I, f->pre_activation + (n + i) * 2 * I, grad_active + i * I, 1, grad_pre + i * (2 * I + PAD),
                       active + i * I);
        product(rows, D, I, grad_pre, 2 * I + PAD, 1, f->panels, f->grad_x + n * D, D, 0);
        product(rows, D, I, grad_pre + I, 2 * I + PAD, 1, f->panels + D * I, f->grad_x + n * D, D, 1);
        pack_panels(rows, I, active, I, active_panels);
        product(D, I, rows, grad, 1, D + PAD, active_panels, grad_down, I, n > first);
        pack_panels(rows, D, f->x + n * D, D, panels);
        product(2 * I, D, rows, grad_pre, 1, 2 * I + PAD, panels, grad_gate_up, D, n > first);
    }
}

static void sum_task(void *what, long task) {
    const struct feed_forward *f = what;
    long size = f->hidden * f->width, tasks = tasks_of(f);
    float *sums[] = {f->grad_gate, f->grad_up, f->grad_down};
    for (long i = task * SUMS_A_TASK; i < least(3 * size, (task + 1) * SUMS_A_TASK); i += LANES) {
        vec sum = load(f->partial + i);
        for (long part = 1; part < tasks; part++) sum += load(f->partial + part * 3 * size + i);
        store(sums[i / size] + i % size, sum);
    }
}

EXPORT int moonbase_feed_forward(struct feed_forward *f) {
    long D = f->hidden, I = f->width;
    f->panels = scratch(SCRATCH_CALL, 3 * D * I);
    pack_transposed(D, I, f->gate, D, f->panels, 0);
    pack_transposed(D, I, f->up, D, f->panels + D * I, 0);
    pack_transposed(I, D, f->down, I, f->panels + 2 * D * I, 0);
    for_each_task(f->num_threads, tasks_of(f), forward_task, f);
    return 0;
}

EXPORT int moonbase_feed_forward_backward(struct feed_forward *f) {
    long D = f->hidden, I = f->width;
    f->panels = scratch(SCRATCH_CALL, 3 * D * I * (1 + tasks_of(f)));
    f->partial = f->panels + 3 * D * I;
    pack_panels(I, D, f->gate, D, f->panels);
    pack_panels(I, D, f->up, D, f->panels + D * I);
    pack_panels(D, I, f->down, I, f->panels + 2 * D * I);
    for_each_task(f->num_threads, tasks_of(f), backward_task, f);
    for_each_task(f->num_threads, (3 * D * I + SUMS_A_TASK - 1) / SUMS_A_TASK, sum_task, f);
    release_large_scratch();
    return 0;
}
