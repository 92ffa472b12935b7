/* Muon for many small matrices, fp32: momentum, Newton-Schulz (`newton_schulz.py` has the mathematics) and the weights'
   update. A task is one matrix, which stays in the cache from the first pass to the last; the largest come first, so that
   threads end together.

   Shapes: a stack is [count, R, C], R and C multiples of GRAIN; m the smaller, n the larger of R and C. Wide matrices
   are contracted from the left, tall ones from the right: none is turned over. */

#include "cpu_kernels.h"

struct muon_stack {
    const float *gradient;
    float *momentum; /* NULL: the gradient itself is orthogonalised */
    float *weight;   /* NULL: the result goes to `out` */
    float *out;      /* may be the gradient */
    const float (*polynomials)[3];
    int64_t count, rows, columns, num_polynomials, nesterov;
    int64_t run; /* polynomials per run of the Gram form; 1 for the plain form */
    float mu, keep, rate; /* weight <- keep * weight - rate * result */
    float safety, smallest_norm;
    double square; /* the result: sum of squares of all matrices of the stack after orthogonalisation */
};

struct muon {
    struct muon_stack *stacks;
    int64_t num_stacks, num_threads;
    float *squares; /* inside; of all matrices */
};

/* out = alpha A B + beta D, all [m, m]. D may be `out`. */
static void combine(long m, const float *a, const float *b, float alpha, const float *d, float beta, float *out,
                    float *work) {
    float *panels = work, *found = work + m * m;
    if (m > PANEL) pack_panels(m, m, b, m, panels);
    product(m, m, m, a, m, 1, m > PANEL ? panels : b, found, m, 0);
    for (long i = 0; i < m * m; i += LANES) store(out + i, load(found + i) * alpha + load(d + i) * beta);
}

/* The smaller Gram matrix [m, m]. */
static void gram(long rows, long columns, const float *x, float *square, float *panels) {
    if (rows <= columns) {
        pack_transposed(columns, rows, x, columns, panels, 0);
        product(rows, rows, columns, x, columns, 1, panels, square, rows, 0);
    } else {
        if (columns > PANEL) pack_panels(rows, columns, x, columns, panels);
        product(columns, columns, rows, x, 1, columns, columns > PANEL ? panels : x, square, columns, 0);
    }
}

/* out = a X + P X, or a X + X P where X is tall. */
static void apply(long rows, long columns, const float *p, const float *x, float a, float *out, float *panels) {
    long m = least(rows, columns);
    const float *right = rows <= columns ? x : p;
    if (a != 0)
        for (long i = 0; i < rows * columns; i += LANES) store(out + i, load(x + i) * a);
    if (columns > PANEL) {
        pack_panels(m, columns, right, columns, panels);
        right = panels;
    }
    product(rows, columns, m, rows <= columns ? p : x, m, 1, right, out, columns, a != 0);
}

/* One run of polynomials on X; the result goes to `out`. */
static void run_of(long rows, long columns, long steps, const float (*polynomials)[3], const float *x, float *out,
                   float *work) {
    long m = least(rows, columns);
    float *square = work, *bend = square + m * m, *half = bend + m * m, *total = half + m * m, *rest = total + m * m;
    gram(rows, columns, x, square, rest);
    for (long step = 0; step < steps; step++) {
        float a = polynomials[step][0], b = polynomials[step][1], c = polynomials[step][2];
        combine(m, square, square, c, square, b, bend, rest); /* the step is a I + bend */
        if (steps == 1) {
            apply(rows, columns, bend, x, a, out, rest);
            return;
        }
        if (step + 1 < steps) { /* polynomials of one symmetric matrix commute: the next square is step^2 times this */
            combine(m, bend, square, 1, square, a, half, rest);
            combine(m, bend, half, 1, half, a, square, rest);
        }
        if (step == 0) {
            memcpy(total, bend, (size_t)(m * m) * 4);
            for (long i = 0; i < m; i++) total[i * m + i] += a;
        } else
            combine(m, bend, total, 1, total, a, total, rest);
    }
    apply(rows, columns, total, x, 0, out, rest);
}

/* x = momentum, or what takes its place, divided by its norm. */
static void direction(const struct muon_stack *s, long size, const float *gradient, float *momentum, float *x) {
    vec sum[2] = {{0}, {0}};
    for (long i = 0; i < size; i += LANES) {
        vec g = load(gradient + i), value = g;
        if (momentum) {
            vec kept = load(momentum + i) * s->mu + g;
            store(momentum + i, kept);
            value = kept;
            if (s->nesterov) value = kept * s->mu + g;
        }
        store(x + i, value);
        sum[i / LANES % 2] += value * value;
    }
    float norm = sqrtf(sum_of(sum[0] + sum[1])) * s->safety;
    float inverse = 1.0f / (norm < s->smallest_norm ? s->smallest_norm : norm);
    for (long i = 0; i < size; i += LANES) store(x + i, load(x + i) * inverse);
}

static void matrix_task(void *what, long task) {
    const struct muon *muon = what;
    const struct muon_stack *s = muon->stacks;
    float *squares = muon->squares + task;
    for (; task >= s->count; s++) task -= s->count;
    long size = s->rows * s->columns, m = least(s->rows, s->columns), start = task * size;
    float *x = scratch(SCRATCH_TASK, 3 * size + 7 * m * m), *spare = x + size, *work = spare + size;
    direction(s, size, s->gradient + start, s->momentum ? s->momentum + start : NULL, x);
    for (long step = 0; step < s->num_polynomials; step += s->run) {
        run_of(s->rows, s->columns, least(s->run, s->num_polynomials - step), s->polynomials + step, x, spare, work);
        float *result = spare;
        spare = x, x = result;
    }
    vec square = {0};
    for (long i = 0; i < size; i += LANES) {
        vec update = load(x + i);
        square += update * update;
        if (s->weight)
            store(s->weight + start + i, load(s->weight + start + i) * s->keep - update * s->rate);
        else
            store(s->out + start + i, update);
    }
    *squares = sum_of(square);
}

EXPORT int moonbase_muon(struct muon *muon) {
    long tasks = 0;
    for (long i = 0; i < muon->num_stacks; i++) tasks += muon->stacks[i].count;
    muon->squares = scratch(SCRATCH_CALL, tasks);
    for_each_task(muon->num_threads, tasks, matrix_task, muon);
    const float *square = muon->squares;
    for (struct muon_stack *s = muon->stacks; s < muon->stacks + muon->num_stacks; s++) {
        s->square = 0;
        for (long i = 0; i < s->count; i++) s->square += *square++;
    }
    return 0;
}
