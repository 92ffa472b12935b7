/* Cross-entropy of a language model's head, fp32: the sum of -log softmax(h W^T)[target], and the gradients of h and W
   in the same pass. The logits of a chunk of tokens are turned into their own gradient and never leave the cache for long.

   Shapes: N tokens, I inputs, O vocabulary (multiples of GRAIN). */

#include "cpu_kernels.h"

#define COLUMNS_A_TASK 256
#define BLOCK 96
#define TOKENS_A_TASK (4 * TILE_ROWS)

struct cross_entropy {
    const float *hidden;           /* [N, I] */
    const float *head;             /* [O, I] */
    const int64_t *targets;        /* [N]; negative: no loss */
    float *grad_hidden, *grad_head; /* as hidden and head, or NULL */
    int64_t tokens, inputs, vocabulary, num_threads;
    double loss; /* the result */
    /* inside */
    float *head_T, *head_panels, *logits, *losses;
    long from, to; /* the chunk */
};

static long parts(long whole, long size) { return (whole + size - 1) / size; }

static void pack_task(void *what, long task) {
    const struct cross_entropy *c = what;
    long first = task * COLUMNS_A_TASK, columns = least(COLUMNS_A_TASK, c->vocabulary - first);
    pack_transposed(c->inputs, columns, c->head + first * c->inputs, c->inputs, c->head_T + first * c->inputs, 0);
}

/* Logits become softmax - one-hot. Returns the loss. Without a target: zeros and 0. */
static float softmax_gradient(long count, float *logits, int64_t target) {
    if (target < 0) {
        memset(logits, 0, (size_t)count * 4);
        return 0;
    }
    float wanted = logits[target];
    vec top = load(logits), sum = {0};
    for (long j = LANES; j < count; j += LANES) top = larger(load(logits + j), top);
    float largest = largest_of(top);
    for (long j = 0; j < count; j += LANES) {
        vec p = exp_of(load(logits + j) - largest);
        store(logits + j, p);
        sum += p;
    }
    float total = sum_of(sum), inverse = 1.0f / total;
    for (long j = 0; j < count; j += LANES) store(logits + j, load(logits + j) * inverse);
    logits[target] -= 1.0f;
    return logf(total) + largest - wanted;
}

static void tokens_task(void *what, long task) {
    const struct cross_entropy *c = what;
    long from = c->from + task * TOKENS_A_TASK, rows = least(TOKENS_A_TASK, c->to - from), row = c->vocabulary + 16;
    float *logits = c->grad_head ? c->logits + (from - c->from) * row : scratch(SCRATCH_TASK, TOKENS_A_TASK * row);
    product(rows, c->vocabulary, c->inputs, c->hidden + from * c->inputs, c->inputs, 1, c->head_T, logits, row, 0);
    for (long i = 0; i < rows; i++)
        c->losses[from + i] = softmax_gradient(c->vocabulary, logits + i * row, c->targets[from + i]);
    if (c->grad_hidden)
        product(rows, c->inputs, c->vocabulary, logits, row, 1, c->head_panels, c->grad_hidden + from * c->inputs,
                c->inputs, 0);
}

/* C [rows x columns] (+)= sum over n < count of a_n x_n^T. `work` holds BLOCK * (rows + 16 + columns) floats. */
static void outer_sums(long rows, long columns, long count, const float *a, long a_row, const float *x, long x_row,
                       float *c, int add, float *work) {
    float *panels = work + BLOCK * (rows + 16);
    for (long n = 0; n < count; n += BLOCK) {
        long depth = least(BLOCK, count - n);
        for (long i = 0; i < depth; i++) memcpy(work + i * (rows + 16), a + (n + i) * a_row, (size_t)rows * 4);
        pack_panels(depth, columns, x + n * x_row, x_row, panels);
        product(rows, columns, depth, work, 1, rows + 16, panels, c, columns, add || n > 0);
    }
}

static void vocabulary_task(void *what, long task) {
    const struct cross_entropy *c = what;
    long first = task * BLOCK, rows = least(BLOCK, c->vocabulary - first);
    outer_sums(rows, c->inputs, c->to - c->from, c->logits + first, c->vocabulary + 16, c->hidden + c->from * c->inputs,
               c->inputs, c->grad_head + first * c->inputs, c->from > 0,
               scratch(SCRATCH_TASK, BLOCK * (rows + 16 + c->inputs)));
}

EXPORT int moonbase_cross_entropy(struct cross_entropy *c) {
    long size = c->vocabulary * c->inputs, chunk = (1 << 20) / c->vocabulary / BLOCK * BLOCK;
    chunk = least(c->tokens, chunk > BLOCK ? chunk : BLOCK);
    for (long n = 0; n < c->tokens; n++)
        if (c->targets[n] >= c->vocabulary) return -1;
    c->head_T = scratch(SCRATCH_CALL, 2 * size + chunk * (c->vocabulary + 16) + c->tokens);
    c->head_panels = c->head_T + size, c->logits = c->head_panels + size;
    c->losses = c->logits + chunk * (c->vocabulary + 16);
    for_each_task(c->num_threads, parts(c->vocabulary, COLUMNS_A_TASK), pack_task, c);
    if (c->grad_hidden) pack_panels(c->vocabulary, c->inputs, c->head, c->inputs, c->head_panels);
    for (c->from = 0; c->from < c->tokens; c->from = c->to) {
        c->to = least(c->tokens, c->from + chunk);
        for_each_task(c->num_threads, parts(c->to - c->from, TOKENS_A_TASK), tokens_task, c);
        if (c->grad_head) for_each_task(c->num_threads, parts(c->vocabulary, BLOCK), vocabulary_task, c);
    }
    c->loss = 0;
    for (long n = 0; n < c->tokens; n++) c->loss += c->losses[n];
    release_large_scratch();
    return 0;
}
