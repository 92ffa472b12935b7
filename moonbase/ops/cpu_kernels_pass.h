/* What the parts of a forward pass share (cpu_kernels_pass.c): its description, the product with weights as they lie,
   and attention.

   Routed experts are floats, or INT4 as stored (ops/int4_packed.py): words of eight numbers q + 8, the first in the
   lowest bits, and a bf16 scale for every INT4_GROUP of a row.

   Shapes: N rows of the pass, D hidden, H heads, C kv latent, R rope dims, X = C + R, V value dims per head, E experts,
   K choices per row, I expert width, P pages of Z slots, M pages of the longest sequence. */

#ifndef MOONBASE_CPU_KERNELS_PASS_H
#define MOONBASE_CPU_KERNELS_PASS_H

#include "cpu_kernels.h"

#define INT4_GROUP 32

struct stack { /* one matrix [out, in] per expert: floats, or (NULL) words and scales */
    const float *floats;
    const uint32_t *words;  /* [E, out, in / 8] */
    const uint16_t *scales; /* [E, out, in / INT4_GROUP] */
};

struct pass_layer { /* weights [out, in] */
    const float *input_norm, *q_a, *q_a_norm, *q_b; /* q_a NULL: q_b is the plain projection */
    const float *kv_a, *kv_a_norm, *kv_b, *o, *post_norm;
    const float *gate, *up, *down;     /* of the dense layer, or of the shared experts; NULL: there are none */
    const float *router, *bias;        /* [E, D], [E]; NULL in a dense layer */
    struct stack expert_gate_up, expert_down; /* [E, 2 I, D], [E, D, I] */
    float *store;                      /* [P, Z, X] */
    int64_t width;                     /* of gate and up */
};

struct pass {
    const struct pass_layer *layers;
    const float *embedding, *norm;
    const float *cosine, *sine;                   /* [positions, R / 2] */
    const int32_t *token, *sequence, *position;   /* [N] */
    const int32_t *tables;                        /* [sequences, M] */
    float *out;                                   /* [N, D] */
    int64_t num_layers, rows, hidden, heads, q_rank, rank, nope, rope, value;
    int64_t num_experts, choices, groups, kept_groups, expert_width, normalise, page, pages, num_threads;
    float scale, eps, latent_eps, routed_scale;
    /* inside */
    const struct pass_layer *layer;
    int64_t block, inner_threads; /* rows that a task takes; threads within a task */
    float *x, *normed;            /* [N, D]: residual stream, and input of the feed-forward part */
    float *query, *read;          /* [N, H, X], [N, H, C] */
    float *weights, *routed;      /* [N, K], [N K, D]: the latter sorted by expert */
    int32_t *chosen, *order, *inverse; /* [N, K]; [N K]: place of sorted row, and sorted row of place */
    int32_t *ends, *work;              /* [E]; [tasks, 3]: expert, first and last sorted row */
    int64_t pending;                   /* the last layer's routed outputs are not in x yet */
};

/* Fewer multiplications than this are done before another thread has woken up. */
#define WORTH_WAKING (1L << 18)

INLINE long threads_for(long num_threads, long multiplications) {
    return multiplications < WORTH_WAKING ? 1 : num_threads;
}

/* C [rows x columns] (+)= A W^T with W [columns x depth] read where it lies; depth a multiple of GRAIN. A sum's order
   depends on the depth alone: every lane adds up its own places, then neighbours are added, so that one row and many
   give the same bits. */
void dots(long num_threads, long rows, long columns, long depth, const float *a, long a_row, const float *w, float *c,
          long c_row, int add);

/* Reads [N, H, C] of the current layer, whose latents are stored already. */
void attend(const struct pass *p);

#endif
