/* Causal attention within documents, fp32: forward with the log-sum-exp of every row, and backward.

   The scheme is FlashAttention's (Dao et al. 2022): blocks of queries against blocks of keys, with a running maximum, so
   that no more than QUERIES x KEYS logits exist at once; the backward pass makes the probabilities again from the
   log-sum-exp. One task is one head of one document. Logits that the mask hides are neither computed, except inside a
   tile on the diagonal, nor ever read.

   Shapes: B batch, T time, H heads, K query/key dims, V value dims (K and V multiples of GRAIN). */

#include "cpu_kernels.h"

#define QUERIES (4 * TILE_ROWS)
#define KEYS 512
#define LOGITS_ROW (KEYS + 16) /* a row length that is a power of two would put whole columns into one cache set */

struct view { /* of [B, T, H, dims], the dims side by side */
    float *data;
    int64_t batch, time, head;
};

struct attention {
    struct view query, key, value, output;
    float *logsumexp;              /* [B, H, T] */
    const int64_t (*segments)[3];  /* (row, start, stop) of every document */
    int64_t num_segments, heads, time, key_dims, value_dims, num_threads;
    float scale;
    /* backward only */
    struct view grad_output, grad_query, grad_key, grad_value;
};

static float *at(const struct view *x, const int64_t *segment, long head) {
    return x->data + segment[0] * x->batch + segment[1] * x->time + head * x->head;
}

static long padded(long length) { return (length + PANEL - 1) / PANEL * PANEL; }

/* out[i, j] = a_i · b_(first + j) for j < keys; tiles that nobody on the diagonal or below sees are left as they are.
   Query i of the block sees the keys j <= i + ahead. */
static void dot_products(long rows, long keys, long dims, long ahead, const float *a, long a_row,
                         const float *panels, float *out) {
    for (long j = 0; j < keys; j += PANEL)
        for (long i = 0; i < rows; i += TILE_ROWS) {
            long height = least(TILE_ROWS, rows - i);
            if (j <= i + height - 1 + ahead)
                tile((int)height, 2, dims, a + i * a_row, a_row, 1, panels + j * dims, PANEL,
                     out + i * LOGITS_ROW + j, LOGITS_ROW, 0);
        }
}

/* out[i, :] += sum over the keys j that query i sees of weights[i, j] * x_(first + j). Panels hold `length` rows. */
static void weighted_sums(long rows, long keys, long dims, long ahead, const float *weights, const float *panels,
                          long length, long first, float *out) {
    for (long d = 0; d < dims; d += PANEL) {
        long width = least(PANEL, dims - d);
        for (long i = 0; i < rows; i += TILE_ROWS) {
            long height = least(TILE_ROWS, rows - i), depth = least(keys, i + height + ahead);
            if (depth > 0)
                tile((int)height, (int)(width / LANES), depth, weights + i * LOGITS_ROW, LOGITS_ROW, 1,
                     panels + d * length + first * width, width, out + i * dims + d, dims, 1);
        }
    }
}

/* out[first + j, :] += sum over the queries i that see key j of weights[i, j] * x_i. Panels hold `rows` rows. */
static void transposed_sums(long rows, long keys, long dims, long ahead, const float *weights, const float *panels,
                            long first, float *out) {
    for (long d = 0; d < dims; d += PANEL) {
        long width = least(PANEL, dims - d);
        for (long j = 0; j < keys; j += TILE_ROWS) {
            long height = least(TILE_ROWS, keys - j), from = j > ahead ? j - ahead : 0;
            if (from < rows)
                tile((int)height, (int)(width / LANES), rows - from, weights + from * LOGITS_ROW + j, 1, LOGITS_ROW,
                     panels + d * rows + from * width, width, out + (first + j) * dims + d, dims, 1);
        }
    }
}

/* All ones in the first `count` lanes. */
INLINE ivec first_lanes(long count) {
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane < (int32_t)count;
}

static void fill_zeros(float *row, long from, long to) {
    for (long j = (from > 0 ? from + LANES - 1 : 0) / LANES * LANES; j < to; j += LANES) store(row + j, (vec){0});
}

/* One row of logits becomes exp(scale * logit - maximum) in place, zeros behind the `visible` ones. Updates the running
   maximum and sum; returns what older sums must be multiplied by. */
static float softmax_row(float *logits, long visible, long keys, float scale, float *maximum, float *total) {
    long whole = visible > 0 ? visible / LANES * LANES : 0;
    ivec rest = first_lanes(visible - whole);
    vec top = splat(*maximum), sum = {0};
    for (long j = 0; j < whole; j += LANES) top = larger(load(logits + j) * scale, top);
    if (whole < visible) top = larger(choose(rest, load(logits + whole) * scale, top), top);
    float largest = largest_of(top);
    for (long j = 0; j < whole; j += LANES) {
        vec p = exp_of(load(logits + j) * scale - largest);
        store(logits + j, p);
        sum += p;
    }
    if (whole < visible) {
        vec p = choose(rest, exp_of(load(logits + whole) * scale - largest), (vec){0});
        store(logits + whole, p);
        sum += p;
    }
    fill_zeros(logits, visible, keys);
    float factor = exp_of(splat(*maximum - largest))[0];
    *total = *total * factor + sum_of(sum);
    *maximum = largest;
    return factor;
}

static void forward_task(void *what, long task) {
    const struct attention *a = what;
    const int64_t *segment = a->segments[task / a->heads];
    long head = task % a->heads, length = segment[2] - segment[1], K = a->key_dims, V = a->value_dims;
    const float *query = at(&a->query, segment, head);
    float *output = at(&a->output, segment, head);
    float *logsumexp = a->logsumexp + (segment[0] * a->heads + head) * a->time + segment[1];
    float *keys_T = scratch(SCRATCH_TASK, padded(length) * K + length * V + QUERIES * (LOGITS_ROW + V));
    float *values = keys_T + padded(length) * K, *logits = values + length * V, *sums = logits + QUERIES * LOGITS_ROW;
    pack_transposed(K, length, at(&a->key, segment, head), a->key.time, keys_T, 1);
    pack_panels(length, V, at(&a->value, segment, head), a->value.time, values);
    for (long q = 0; q < length; q += QUERIES) {
        long rows = least(QUERIES, length - q);
        float maximum[QUERIES], total[QUERIES];
        for (long i = 0; i < rows; i++) maximum[i] = -INFINITY, total[i] = 0;
        memset(sums, 0, (size_t)(rows * V) * 4);
        for (long k = 0; k < q + rows; k += KEYS) {
            long keys = least(KEYS, q + rows - k), ahead = q - k;
            dot_products(rows, keys, K, ahead, query + q * a->query.time, a->query.time, keys_T + k * K, logits);
            for (long i = 0; i < rows; i++) {
                float factor = softmax_row(logits + i * LOGITS_ROW, least(keys, i + 1 + ahead), keys, a->scale,
                                           &maximum[i], &total[i]);
                if (k > 0)
                    for (long d = 0; d < V; d++) sums[i * V + d] *= factor;
            }
            weighted_sums(rows, keys, V, ahead, logits, values, length, k, sums);
        }
        for (long i = 0; i < rows; i++) {
            float *out = output + (q + i) * a->output.time, inverse = 1.0f / total[i];
            for (long d = 0; d < V; d++) out[d] = sums[i * V + d] * inverse;
            logsumexp[q + i] = maximum[i] + logf(total[i]);
        }
    }
}

/* From logits and the products of output gradients with values: probabilities in place of the logits, and gradients of
   the logits, times scale, in place of the products. */
static void gradient_row(float *logits, float *products, long visible, long keys, float scale, float logsumexp,
                         float delta) {
    long whole = visible > 0 ? visible / LANES * LANES : 0;
    for (long j = 0; j < whole; j += LANES) {
        vec p = exp_of(load(logits + j) * scale - logsumexp);
        store(logits + j, p);
        store(products + j, p * (load(products + j) - delta) * scale);
    }
    if (whole < visible) {
        ivec rest = first_lanes(visible - whole);
        vec p = choose(rest, exp_of(load(logits + whole) * scale - logsumexp), (vec){0});
        vec gradient = choose(rest, p * (load(products + whole) - delta) * scale, (vec){0});
        store(logits + whole, p);
        store(products + whole, gradient);
    }
    fill_zeros(logits, visible, keys);
    fill_zeros(products, visible, keys);
}

static void copy_rows(long rows, long dims, const float *from, float *to, long to_row) {
    for (long i = 0; i < rows; i++) memcpy(to + i * to_row, from + i * dims, (size_t)dims * 4);
}

static void backward_task(void *what, long task) {
    const struct attention *a = what;
    const int64_t *segment = a->segments[task / a->heads];
    long head = task % a->heads, length = segment[2] - segment[1], K = a->key_dims, V = a->value_dims;
    const float *query = at(&a->query, segment, head), *key = at(&a->key, segment, head);
    const float *value = at(&a->value, segment, head), *output = at(&a->output, segment, head);
    const float *grad = at(&a->grad_output, segment, head);
    const float *logsumexp = a->logsumexp + (segment[0] * a->heads + head) * a->time + segment[1];
    float *keys_T = scratch(SCRATCH_TASK, padded(length) * (K + V) + length * (2 * K + V) +
                                              2 * QUERIES * (LOGITS_ROW + K + V));
    float *values_T = keys_T + padded(length) * K, *keys_ = values_T + padded(length) * V;
    float *grad_key = keys_ + length * K, *grad_value = grad_key + length * K, *logits = grad_value + length * V;
    float *products = logits + QUERIES * LOGITS_ROW, *grad_query = products + QUERIES * LOGITS_ROW;
    float *queries = grad_query + QUERIES * K, *grads = queries + QUERIES * K;
    pack_transposed(K, length, key, a->key.time, keys_T, 1);
    pack_transposed(V, length, value, a->value.time, values_T, 1);
    pack_panels(length, K, key, a->key.time, keys_);
    memset(grad_key, 0, (size_t)(length * (K + V)) * 4);
    for (long q = 0; q < length; q += QUERIES) {
        long rows = least(QUERIES, length - q);
        const float *block = query + q * a->query.time, *grad_block = grad + q * a->grad_output.time;
        float delta[QUERIES];
        for (long i = 0; i < rows; i++) {
            vec sum = {0};
            for (long d = 0; d < V; d += LANES)
                sum += load(grad_block + i * a->grad_output.time + d) * load(output + (q + i) * a->output.time + d);
            delta[i] = sum_of(sum);
        }
        pack_panels(rows, K, block, a->query.time, queries);
        pack_panels(rows, V, grad_block, a->grad_output.time, grads);
        memset(grad_query, 0, (size_t)(rows * K) * 4);
        for (long k = 0; k < q + rows; k += KEYS) {
            long keys = least(KEYS, q + rows - k), ahead = q - k;
            dot_products(rows, keys, K, ahead, block, a->query.time, keys_T + k * K, logits);
            dot_products(rows, keys, V, ahead, grad_block, a->grad_output.time, values_T + k * V, products);
            for (long i = 0; i < rows; i++)
                gradient_row(logits + i * LOGITS_ROW, products + i * LOGITS_ROW, least(keys, i + 1 + ahead), keys,
                             a->scale, logsumexp[q + i], delta[i]);
            transposed_sums(rows, keys, V, ahead, logits, grads, k, grad_value);
            transposed_sums(rows, keys, K, ahead, products, queries, k, grad_key);
            weighted_sums(rows, keys, K, ahead, products, keys_, length, k, grad_query);
        }
        copy_rows(rows, K, grad_query, at(&a->grad_query, segment, head) + q * a->grad_query.time, a->grad_query.time);
    }
    copy_rows(length, K, grad_key, at(&a->grad_key, segment, head), a->grad_key.time);
    copy_rows(length, V, grad_value, at(&a->grad_value, segment, head), a->grad_value.time);
}

EXPORT void moonbase_attention(struct attention *attention) {
    for_each_task(attention->num_threads, attention->num_segments * attention->heads, forward_task, attention);
    release_large_scratch();
}

EXPORT void moonbase_attention_backward(struct attention *attention) {
    for_each_task(attention->num_threads, attention->num_segments * attention->heads, backward_task, attention);
    release_large_scratch();
}
