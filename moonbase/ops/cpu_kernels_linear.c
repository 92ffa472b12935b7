/* y = x W^T without bias, fp32, forward and backward: for layers so small that packing, waiting for the other thread and
   fresh memory cost a general library as much as the products themselves. Tasks are blocks of rows, which whoever is
   free takes; backward, both gradients come from one reading of the block.

   Shapes: N rows, I inputs, O outputs; I and O multiples of GRAIN. */

#include "cpu_kernels.h"

#define BLOCK (8 * TILE_ROWS)
#define BLOCKS_A_TASK 3
#define ROWS_A_TASK (BLOCKS_A_TASK * BLOCK) /* each task has sums of its own for W's gradient, added up in their order */
#define PAD 16
#define SUMS_A_TASK 4096

struct linear {
    const float *x, *weight;       /* [N, I], rows x_row apart; [O, I] */
    float *y;                      /* [N, O] */
    const float *grad;             /* [N, O] */
    float *grad_x, *grad_weight;   /* as x (dense) and weight, or NULL */
    int64_t rows, inputs, outputs, x_row, num_threads;
    float *panels, *partial; /* inside */
};

static long tasks_of(const struct linear *l) { return (l->rows + ROWS_A_TASK - 1) / ROWS_A_TASK; }

static void forward_task(void *what, long task) {
    const struct linear *l = what;
    for (long n = task * ROWS_A_TASK; n < least(l->rows, (task + 1) * ROWS_A_TASK); n += BLOCK)
        product(least(BLOCK, l->rows - n), l->outputs, l->inputs, l->x + n * l->x_row, l->x_row, 1, l->panels,
                l->y + n * l->outputs, l->outputs, 0);
}

static void backward_task(void *what, long task) {
    const struct linear *l = what;
    long I = l->inputs, O = l->outputs, first = task * ROWS_A_TASK, last = least(l->rows, first + ROWS_A_TASK);
    float *block = scratch(SCRATCH_TASK, BLOCK * (O + PAD + I)), *panels = block + BLOCK * (O + PAD);
    for (long n = first; n < last; n += BLOCK) {
        long rows = least(BLOCK, last - n);
        if (l->grad_x) product(rows, I, O, l->grad + n * O, O, 1, l->panels, l->grad_x + n * I, I, 0);
        if (!l->grad_weight) continue;
        /* Read by columns next: a row length that is a power of two would put them into one cache set. */
        for (long i = 0; i < rows; i++) memcpy(block + i * (O + PAD), l->grad + (n + i) * O, (size_t)O * 4);
        pack_panels(rows, I, l->x + n * l->x_row, l->x_row, panels);
        product(O, I, rows, block, 1, O + PAD, panels, l->partial + task * O * I, I, n > first);
    }
}

static void sum_task(void *what, long task) {
    const struct linear *l = what;
    long size = l->inputs * l->outputs, tasks = tasks_of(l);
    for (long i = task * SUMS_A_TASK; i < least(size, (task + 1) * SUMS_A_TASK); i += LANES) {
        vec sum = load(l->partial + i);
        for (long part = 1; part < tasks; part++) sum += load(l->partial + part * size + i);
        store(l->grad_weight + i, sum);
    }
}

EXPORT int moonbase_linear(struct linear *l) {
    l->panels = scratch(SCRATCH_CALL, l->inputs * l->outputs);
    pack_transposed(l->inputs, l->outputs, l->weight, l->inputs, l->panels, 0);
    for_each_task(l->num_threads, tasks_of(l), forward_task, l);
    return 0;
}

EXPORT int moonbase_linear_backward(struct linear *l) {
    long size = l->inputs * l->outputs;
    l->panels = scratch(SCRATCH_CALL, size * (1 + tasks_of(l)));
    l->partial = l->panels + size;
    if (l->grad_x) pack_panels(l->outputs, l->inputs, l->weight, l->inputs, l->panels);
    for_each_task(l->num_threads, tasks_of(l), backward_task, l);
    if (l->grad_weight) for_each_task(l->num_threads, (size + SUMS_A_TASK - 1) / SUMS_A_TASK, sum_task, l);
    release_large_scratch();
    return 0;
}
