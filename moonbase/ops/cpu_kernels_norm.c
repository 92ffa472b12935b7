/* Operations that pass over memory once, fp32: root-mean-square norm and rotary positions, forward and backward. */

#include "cpu_kernels.h"

#define ROWS_A_TASK 128

struct rms_norm {
    const float *x, *gain, *grad;  /* rows of x lie x_row apart; grad [N, D] */
    float *out, *scale;            /* [N, D]; [N]: 1 / sqrt(mean(x^2) + eps) */
    float *grad_x, *grad_gain;     /* [N, D]; [D] */
    int64_t rows, dims, x_row, num_threads;
    float eps;
    float *partial; /* inside */
};

static void norm_task(void *what, long task) {
    const struct rms_norm *r = what;
    for (long n = task * ROWS_A_TASK; n < least(r->rows, (task + 1) * ROWS_A_TASK); n++) {
        const float *x = r->x + n * r->x_row;
        vec square = {0};
        for (long d = 0; d < r->dims; d += LANES) square += load(x + d) * load(x + d);
        float scale = 1.0f / sqrtf(sum_of(square) / (float)r->dims + r->eps);
        r->scale[n] = scale;
        for (long d = 0; d < r->dims; d += LANES)
            store(r->out + n * r->dims + d, load(x + d) * scale * load(r->gain + d));
    }
}

static void norm_backward_task(void *what, long task) {
    const struct rms_norm *r = what;
    long D = r->dims;
    float *grad_gain = r->partial + task * D;
    memset(grad_gain, 0, (size_t)D * 4);
    for (long n = task * ROWS_A_TASK; n < least(r->rows, (task + 1) * ROWS_A_TASK); n++) {
        const float *x = r->x + n * r->x_row, *grad = r->grad + n * D;
        float scale = r->scale[n], *grad_x = r->grad_x + n * D;
        vec shared = {0};
        for (long d = 0; d < D; d += LANES) {
            vec product = load(grad + d) * load(x + d) * scale;
            store(grad_gain + d, load(grad_gain + d) + product);
            shared += product * load(r->gain + d);
        }
        float mean = sum_of(shared) / (float)D;
        for (long d = 0; d < D; d += LANES)
            store(grad_x + d, (load(grad + d) * load(r->gain + d) - load(x + d) * scale * mean) * scale);
    }
}

EXPORT int moonbase_rms_norm(struct rms_norm *r) {
    for_each_task(r->num_threads, (r->rows + ROWS_A_TASK - 1) / ROWS_A_TASK, norm_task, r);
    return 0;
}

EXPORT int moonbase_rms_norm_backward(struct rms_norm *r) {
    long tasks = (r->rows + ROWS_A_TASK - 1) / ROWS_A_TASK;
    r->partial = scratch(SCRATCH_CALL, tasks * r->dims);
    for_each_task(r->num_threads, tasks, norm_backward_task, r);
    memcpy(r->grad_gain, r->partial, (size_t)r->dims * 4);
    for (long task = 1; task < tasks; task++)
        for (long d = 0; d < r->dims; d++) r->grad_gain[d] += r->partial[task * r->dims + d];
    release_large_scratch();
    return 0;
}

/* Adjacent pairs (2i, 2i + 1) of x are rotated and come out half-split: first members, then second members. Backward, the
   halves of the gradient are rotated back and woven together. cos and sin [C, R / 2] serve the rows of token t, H each,
   at t modulo C. */
struct rotation {
    const float *x, *cosine, *sine;
    float *out;
    int64_t tokens, heads, dims, x_token, x_head, num_rotations, num_threads, backward;
};

static void rotation_task(void *what, long task) {
    const struct rotation *r = what;
    long half = r->dims / 2;
    for (long t = task * ROWS_A_TASK; t < least(r->tokens, (task + 1) * ROWS_A_TASK); t++) {
        const float *cosine = r->cosine + t % r->num_rotations * half, *sine = r->sine + t % r->num_rotations * half;
        for (long h = 0; h < r->heads; h++) {
            const float *x = r->x + t * r->x_token + h * r->x_head;
            float *out = r->out + (t * r->heads + h) * r->dims;
            if (r->backward)
                for (long i = 0; i < half; i++) {
                    out[2 * i] = x[i] * cosine[i] + x[half + i] * sine[i];
                    out[2 * i + 1] = x[half + i] * cosine[i] - x[i] * sine[i];
                }
            else
                for (long i = 0; i < half; i++) {
                    out[i] = x[2 * i] * cosine[i] - x[2 * i + 1] * sine[i];
                    out[half + i] = x[2 * i] * sine[i] + x[2 * i + 1] * cosine[i];
                }
        }
    }
}

EXPORT int moonbase_rotate(struct rotation *r) {
    for_each_task(r->num_threads, (r->tokens + ROWS_A_TASK - 1) / ROWS_A_TASK, rotation_task, r);
    return 0;
}
