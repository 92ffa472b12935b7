// Attention over paged latents for decoding: rows of 512 + 64 bf16 numbers (DeepSeek-V2 §2.1), read once for 64 heads.
// The time is that of reading the rows, so everything else has to hide behind it.
//
// - A block takes one token, 64 heads and one stretch of the context after the other; one block a processor. Of its 16
//   warps four copy rows, 64 at once, as soon as there is room; four multiply them with the query and make weights of
//   the scores, which go through shared memory in bf16; and two times four add weights · rows, each for half of the
//   512 numbers, in registers. They wait for one another by barriers in shared memory alone, so that the scores of the
//   next 64 rows are under way while the last are summed.
// - Scores are four warps' work and not eight's: the tensor core reads both operands from shared memory, and the query
//   would be read twice, which costs half as much again.
// - How a context is cut into stretches follows from its length alone, and so do the bits of a token: four neighbouring
//   stretches are a family, joined from left to right, then families, in groups of `BUNCH`. Whether one block or more
//   did them changes where joining happens, not what is added to what.
// - Blocks get equal runs of stretches, which they work out for themselves from the positions: nothing waits for the
//   host, and a call can be recorded. A block that has a whole family joins it; a second kernel joins the rest.
// - The softmax refers to a maximum that follows the true one only when that is more than 2^8 above, so that sums are
//   rarely scaled anew.
//
// Shapes: N tokens, H heads, B blocks of 64 heads, G stretches at most, P pages of Z slots.
// Where a comment names a section, it is of the PTX manual. Warps of a group: 16 heads each; lane = 4·(head mod 8) +
// quarter (wgmma, "Register Fragments and Shared Memory Matrix Layouts"): accumulators 4j … 4j + 3 of a thread are of
// head `lane / 4`, columns 8j + 2·quarter and the next, and of head `lane / 4 + 8` the same.

#include <cstdint>
#ifndef MOONBASE_ON_CPU  // a test runs this file without a GPU
#include <cuda_runtime.h>
#endif

namespace {

#ifndef SHORTEST_STRETCH  // a test has shorter ones
#define SHORTEST_STRETCH 256
#define LONG_STRETCH 1024
#endif
constexpr int FAMILY = 4;            // neighbouring stretches that are joined first; short contexts are one family
constexpr int BUNCH = 4;             // families that a thread joins
constexpr int MOST_STRETCHES = 128;  // of one context
constexpr int LATENT = 512, WIDTH = 576;
constexpr int HEADS = 64;            // of a block: rows of the tensor core's products
constexpr int SLOTS = 64;            // rows of the cache at once
constexpr int STAGES = 2;
constexpr int CHUNKS = WIDTH / 64;   // a row lies in nine chunks of 128 bytes
constexpr int CHUNK_BYTES = 64 * 128;
constexpr int TILE_BYTES = CHUNKS * CHUNK_BYTES;
constexpr int QUARTERS = 4;          // of a stage, each given back as soon as it is read: 16 rows
constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int SUMMERS = 128, COPIERS = 384;  // the first threads of those who sum and copy; the first 128 weigh
constexpr int PART = HEADS * LATENT / 4;     // float4 of a stretch's sums: [half, j, thread of the four warps]
constexpr int COPY_REGISTERS = 48, WEIGH_REGISTERS = 80, SUM_REGISTERS = 192;  // 512 = 48 + 80 + 2 · 192

struct Arguments {
  const uint16_t* query;    // bf16 [N, H, 576]
  const uint16_t* store;    // bf16 [P, Z, 576]
  const int32_t* tables;    // [sequences, table_width]
  const int32_t* sequence;  // [N], -1 for padding
  const int32_t* position;  // [N]
  float4* parts;            // [N, G, B, PART], sums of stretches or of families (in the place of their first stretch)
  float2* tops;             // [N, G, B, 64]: the maximum that they refer to, and the sum of their weights
  uint8_t* whole;           // [N, G / 4, B]: whether a family's part is there, and not those of its stretches
  uint16_t* out;            // bf16 [N, H, 512]
  int64_t query_token, query_head, store_page, store_slot;  // elements from one to the next
  float scale_log2;
  int tokens, heads, page_slots, table_width, stretches;
};

__host__ __device__ inline int head_blocks(const Arguments& a) { return (a.heads + HEADS - 1) / HEADS; }
__device__ inline int families(const Arguments& a) { return (a.stretches + FAMILY - 1) / FAMILY; }

struct Run { int token, stretch, end_token, end_stretch; };

struct Shared {
  uint8_t query[TILE_BYTES];
  uint8_t stages[STAGES][TILE_BYTES];
  uint8_t weights[HEADS * 128];
  float shrink[HEADS], tops[HEADS], totals[HEADS];
  float2 family_tops[2][HEADS];  // of the stretches joined so far, as in `tops` of the arguments
  uint64_t full[STAGES], empty[STAGES][QUARTERS], query_full, query_empty, weights_full, weights_empty;
  int costs[WARPS], dearest[WARPS];
  Run run;
};
static_assert(sizeof(Shared) <= 232448, "what a block of compute capability 9.0 may have");

// --- what the chip does ----------------------------------------------------------------------------------------------
#ifndef MOONBASE_ON_CPU

__device__ __forceinline__ unsigned address_of(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void barriers_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
      " @!done bra again; }" ::"r"(address_of(barrier)), "r"(parity) : "memory");
}

// What the second cache does with rows ("createpolicy"): those that are read once leave first, and the sums of
// stretches stay.
__device__ __forceinline__ uint64_t cache_policy(bool read_once) {
  uint64_t policy;
  if (read_once) asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// A row's 16 bytes of every chunk, or zeros, into a line of 128 bytes from byte `within` on ("cp.async": what is beyond
// the source's size is filled). One piece of text, so that addresses stand in the instructions and are not added up
// before each.
__device__ __forceinline__ void copy_pieces(void* line, unsigned within, const void* from, bool there,
                                            uint64_t policy) {
#define COPY(to, from) "cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0 + " #to "], [%1 + " #from "], 16, %2, %3; "
  // Not a sum, though that is what it comes to: of a sum nvcc 13.0 takes the part that all threads share into the
  // instruction, where the policy is already, and the chip finds it illegal.
  const unsigned place = address_of(line) ^ within;
  asm volatile(COPY(0, 0) COPY(8192, 128) COPY(16384, 256) COPY(24576, 384) COPY(32768, 512) COPY(40960, 640)
               COPY(49152, 768) COPY(57344, 896) COPY(65536, 1024)
               ::"r"(place), "l"(from), "r"(there ? 16 : 0), "l"(policy) : "memory");
#undef COPY
  static_assert(CHUNKS == 9 && CHUNK_BYTES == 8192, "the distances above");
}

// Nothing that the kernel before has written is read sooner ("griddepcontrol").
__device__ __forceinline__ void kernel_before_has_ended() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Arrives once all copies of this thread so far have ended; noinc: the barrier's count has room for it
// ("cp.async.mbarrier.arrive").
__device__ __forceinline__ void copies_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address_of(barrier)) : "memory");
}

__device__ __forceinline__ void store_operand(void* to, unsigned word) { *static_cast<unsigned*>(to) = word; }

// Between writes to shared memory, cp.async among them, and products that read it ("Async Proxy" of wgmma).
__device__ __forceinline__ void operands_visible() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product, and between other uses of its registers and a product ("wgmma.fence").
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#define FOUR(f, i) "+f"(f[i]), "+f"(f[i + 1]), "+f"(f[i + 2]), "+f"(f[i + 3])
#define SIXTEEN(f, i) FOUR(f, i), FOUR(f, i + 4), FOUR(f, i + 8), FOUR(f, i + 12)

// sums (+)= a · b over 16: 64 heads x 64 rows of the cache; both K-major.
__device__ __forceinline__ void multiply_scores(float (&sums)[32], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred add; setp.ne.b32 add, %34, 0;"
      " wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
      " %32, %33, add, 1, 1, 0, 0; }"
      : SIXTEEN(sums, 0), SIXTEEN(sums, 16) : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// sums (+)= a · b over 16: 64 heads x 128 of a row's numbers; b is N-major, hence the last 1. With 512 threads the
// compiler takes no product with 128 registers, whatever its warps may have.
__device__ __forceinline__ void multiply_values(float (&sums)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred add; setp.ne.b32 add, %66, 0;"
      " wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"
      " %64, %65, add, 1, 1, 0, 1; }"
      : SIXTEEN(sums, 0), SIXTEEN(sums, 16), SIXTEEN(sums, 32), SIXTEEN(sums, 48)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

template <int COUNT>
__device__ __forceinline__ void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
__device__ __forceinline__ void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

__device__ __forceinline__ float exp2_of(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

__device__ __forceinline__ unsigned bf16_pair(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Only where a block's memory begins at a multiple of 1,024 does the tensor core's pattern begin there too.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

#endif  // MOONBASE_ON_CPU
// ---------------------------------------------------------------------------------------------------------------------

// "Matrix Descriptor Format": addresses and distances in units of 16 bytes, 128-byte swizzling (1 in the top bits): the
// 16 bytes p of the 128-byte line l lie at p ^ (l mod 8).
// K-major ("Strides"): `stride` from 8 rows to the next 8, `leading` is not used. N-major: `leading` from 64 columns to
// the next 64, `stride` from 8 rows of the depth to the next 8.
__device__ __forceinline__ uint64_t operand(const void* shared, unsigned leading, unsigned stride) {
  return static_cast<uint64_t>(address_of(shared) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

// How a context is cut: `length` slots a stretch, the last one shorter.
struct Stretches { int length, count; };

__host__ __device__ inline int stretches_wanted(int slots) {
  const int few = (slots + SHORTEST_STRETCH - 1) / SHORTEST_STRETCH, many = slots / LONG_STRETCH;
  const int most = many < MOST_STRETCHES ? many : MOST_STRETCHES;
  return most > FAMILY ? most : few < FAMILY ? few : FAMILY;
}

__host__ __device__ inline Stretches stretches_of(int slots) {
  const int unit = stretches_wanted(slots) * SLOTS, length = (slots + unit - 1) / unit * SLOTS;
  return {length, (slots + length - 1) / length};
}

// A stretch costs its tiles and one more, for its end.
__device__ __forceinline__ int cost_of(int slots, const Stretches& stretches) {
  return (slots + SLOTS - 1) / SLOTS + stretches.count;
}

// The block's share of all stretches. Shares are multiples of the dearest stretch, so that equal stretches fall into
// equal shares, and whole families into one where there are enough.
__device__ void share_out(const Arguments& a, Shared& shared, int share, int shares) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int each = (a.tokens + THREADS - 1) / THREADS, first = min(thread * each, a.tokens);
  const int stop = min(first + each, a.tokens);
  int cost = 0, dearest = 0;
  for (int token = first; token < stop; ++token) {
    if (__ldg(a.sequence + token) < 0) continue;
    const int slots = __ldg(a.position + token) + 1;
    const Stretches stretches = stretches_of(slots);
    cost += cost_of(slots, stretches);
    dearest = max(dearest, stretches.length / SLOTS + 1);
  }
  int up_to = cost;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFu, up_to, distance);
    if (lane >= distance) up_to += other;
    dearest = max(dearest, __shfl_xor_sync(0xFFFFFFFFu, dearest, distance));
  }
  if (lane == 31) shared.costs[warp] = up_to, shared.dearest[warp] = dearest;
  if (thread == 0) shared.run = {a.tokens, 0, a.tokens, 0};
  __syncthreads();
  int start = up_to - cost, total = 0;
  for (int other = 0; other < WARPS; ++other) {
    if (other < warp) start += shared.costs[other];
    total += shared.costs[other];
    dearest = max(dearest, shared.dearest[other]);
  }
  if (total > 0) {
    const int unit = shares * dearest, size = (total + unit - 1) / unit * dearest;
    const int low = share * size, high = low + size;
    for (int token = first; token < stop; ++token) {
      if (__ldg(a.sequence + token) < 0) continue;
      const int slots = __ldg(a.position + token) + 1;
      const Stretches stretches = stretches_of(slots);
      const int one = stretches.length / SLOTS + 1, end = start + cost_of(slots, stretches);
      if (start <= low && low < end) {
        shared.run.token = token, shared.run.stretch = (low - start + one - 1) / one;
      }
      if (start <= high && high < end) {
        shared.run.end_token = token, shared.run.end_stretch = (high - start + one - 1) / one;
      }
      start = end;
    }
  }
  __syncthreads();
}

// Goes through a block's stretches.
struct Walk {
  const Arguments& a;
  Run run;  // its token and stretch: where it is
  int sequence, slots;
  Stretches stretches;

  __device__ Walk(const Arguments& a, const Run& run) : a(a), run(run) { settle(); }

  __device__ void settle() {
    for (; run.token < a.tokens; ++run.token, run.stretch = 0) {
      sequence = __ldg(a.sequence + run.token);
      if (sequence < 0) continue;
      slots = __ldg(a.position + run.token) + 1;
      stretches = stretches_of(slots);
      if (run.stretch < stretches.count) return;
    }
  }

  __device__ bool has(int stretch) const {
    return run.token < run.end_token || (run.token == run.end_token && stretch < run.end_stretch);
  }
  __device__ bool there() const { return has(run.stretch); }
  __device__ int first() const { return run.stretch * stretches.length; }
  __device__ int last() const { return min(first() + stretches.length, slots); }
  // Of the stretches of this token in this run, is it the last?
  __device__ bool leaves() const { return run.stretch + 1 == stretches.count || !has(run.stretch + 1); }
  __device__ void advance() { ++run.stretch; settle(); }
};

// One row of 16 that four warps copy at once: eight threads each, 16 bytes of every chunk. `from` can be read in any
// case; zeros if the row is not there.
__device__ __forceinline__ void copy_row(uint8_t* tile, int row, const uint16_t* from, bool there, uint64_t policy) {
  const int piece = threadIdx.x % 8;
  copy_pieces(tile + row * 128, (piece ^ (row % 8)) << 4, from + piece * 8, there, policy);
}

// Copies keep memory busy only while they are issued ahead of time, so nothing here may take long: pages are looked up
// a tile ahead, and found without dividing.
__device__ void copy_all(const Arguments& a, Shared& shared, int head_block) {
  const int row = (threadIdx.x - COPIERS) / 8;
  const uint64_t policy = cache_policy(head_blocks(a) == 1);
  // ceil(2^32 / page_slots): slot * this / 2^32 is slot / page_slots for slots < 2^32 / page_slots.
  const unsigned page_share = 0xFFFFFFFFu / static_cast<unsigned>(a.page_slots) + 1;
  int stage = 0, last_token = -1;
  unsigned parity = 1, query_parity = 1;  // of a fresh barrier: nobody waits in the first round
  const auto copy_query = [&](int token) {
    barrier_wait(&shared.query_empty, query_parity);
    query_parity ^= 1;
    for (int quarter = 0; quarter < QUARTERS; ++quarter) {
      const int head = head_block * HEADS + quarter * 16 + row;
      copy_row(shared.query, quarter * 16 + row,
               a.query + token * a.query_token + min(head, a.heads - 1) * a.query_head, head < a.heads, policy);
    }
    copies_arrive(&shared.query_full);
  };
  for (Walk walk(a, shared.run); walk.there(); walk.advance()) {
    const int32_t* table = a.tables + static_cast<int64_t>(walk.sequence) * a.table_width;
    const int last = walk.last();
    int pages[QUARTERS];  // of the thread's rows, or of the stretch's last one
    const auto slot_of = [&](int start, int quarter) { return min(start + quarter * 16 + row, last - 1); };
    const auto look_up = [&](int start, int quarter) {
      pages[quarter] = __ldg(table + __umulhi(slot_of(start, quarter), page_share));
    };
#pragma unroll
    for (int quarter = 0; quarter < QUARTERS; ++quarter) look_up(walk.first(), quarter);
    for (int start = walk.first(); start < last; start += SLOTS) {
#pragma unroll
      for (int quarter = 0; quarter < QUARTERS; ++quarter) {
        const int slot = slot_of(start, quarter), within = slot - __umulhi(slot, page_share) * a.page_slots;
        const uint16_t* from = a.store + pages[quarter] * a.store_page + within * a.store_slot;
        if (start + SLOTS < last) look_up(start + SLOTS, quarter);
        barrier_wait(&shared.empty[stage][quarter], parity);
        copy_row(shared.stages[stage], quarter * 16 + row, from, start + quarter * 16 + row < last, policy);
      }
      copies_arrive(&shared.full[stage]);
      if (++stage == STAGES) stage = 0, parity ^= 1;
      // After the first rows, whose room is free sooner than that of the query before.
      if (walk.run.token != last_token) copy_query(last_token = walk.run.token);
    }
  }
}

// Scores of 64 heads and a stage's rows.
__device__ __forceinline__ void multiply_with_query(float (&scores)[32], const Shared& shared, const uint8_t* tile) {
  const uint64_t query = operand(shared.query, 16, 1024), rows = operand(tile, 16, 1024);
  products_begin();
#pragma unroll
  for (int step = 0; step < WIDTH / 16; ++step) {
    const unsigned offset = (step / 4 * CHUNK_BYTES + step % 4 * 32) >> 4;
    multiply_scores(scores, query + offset, rows + offset, step > 0);
  }
  products_commit();
  products_wait<0>();
}

// sums (+)= weights · rows, for half of the rows' numbers; `done(quarter)` as soon as 16 rows are read.
template <class Done>
__device__ __forceinline__ void multiply_with_weights(float (&sums)[2][64], const Shared& shared, const uint8_t* tile,
                                                      int half, bool add, const Done& done) {
  const uint64_t weights = operand(shared.weights, 16, 1024);
  const uint64_t rows = operand(tile + half * (LATENT / 2 / 64) * CHUNK_BYTES, CHUNK_BYTES, 1024);
  products_begin();
#pragma unroll
  for (int quarter = 0; quarter < QUARTERS; ++quarter) {
    const uint64_t a = weights + (quarter * 32 >> 4), b = rows + (quarter * 16 * 128 >> 4);
    multiply_values(sums[0], a, b, add || quarter > 0);
    multiply_values(sums[1], a, b + (2 * CHUNK_BYTES >> 4), add || quarter > 0);
    products_commit();
  }
  products_wait<3>();
  done(0);
  products_wait<2>();
  done(1);
  products_wait<1>();
  done(2);
  products_wait<0>();
  done(3);
}

// The weights of columns 8j + 2·quarter and the next; their rows of 128 bytes lie as copied rows do.
__device__ __forceinline__ void store_weights(Shared& shared, int head, int j, unsigned pair) {
  store_operand(shared.weights + head * 128 + ((j ^ (head % 8)) << 4) + threadIdx.x % 4 * 4, pair);
}

// By one thread for its warp, after what all its threads have done.
__device__ __forceinline__ void warp_arrives(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Rows of 64 slots to weights: what the first four warps do.
struct Weigher {
  const Arguments& a;
  Shared& shared;
  const int lane, row;  // row: the thread's first head within the block; the second is row + 8
  float tops[2], totals[2];

  __device__ Weigher(const Arguments& a, Shared& shared)
      : a(a), shared(shared), lane(threadIdx.x % 32), row(threadIdx.x / 32 * 16 + lane / 4) {}

  // Scores to pairs of weights; and what the sums so far are to be multiplied with.
  __device__ __forceinline__ void weigh(float (&scores)[32], unsigned (&pairs)[16], float (&shrink)[2], int known) {
    if (known < SLOTS) {
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= known) scores[i] = -INFINITY;
    }
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float top = scores[2 * which];
#pragma unroll
      for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(scores[4 * j + 2 * which], scores[4 * j + 2 * which + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2)) * a.scale_log2;
      shrink[which] = 1.0f;
      if (top > tops[which] + 8.0f) {
        shrink[which] = exp2_of(tops[which] - top);
        tops[which] = top;
        totals[which] *= shrink[which];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float low = exp2_of(fmaf(scores[4 * j + 2 * which], a.scale_log2, -tops[which]));
        const float high = exp2_of(fmaf(scores[4 * j + 2 * which + 1], a.scale_log2, -tops[which]));
        totals[which] += low + high;
        pairs[2 * j + which] = bf16_pair(low, high);
      }
    }
  }

  __device__ __forceinline__ void tell_totals() {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float total = totals[which];
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
      if (lane % 4 == 0) shared.tops[row + 8 * which] = tops[which], shared.totals[row + 8 * which] = total;
    }
  }

  __device__ void weigh_all() {
    int stage = 0, last_token = -1;
    unsigned parity = 0, query_parity = 0, weights_parity = 1;
    for (Walk walk(a, shared.run); walk.there(); walk.advance()) {
      if (walk.run.token != last_token) {
        barrier_wait(&shared.query_full, query_parity);
        query_parity ^= 1;
        last_token = walk.run.token;
      }
      const int first = walk.first(), last = walk.last();
      const bool leaves = walk.leaves();
      tops[0] = tops[1] = -INFINITY;
      totals[0] = totals[1] = 0.0f;
      for (int start = first; start < last; start += SLOTS) {
        float scores[32], shrink[2];
        unsigned pairs[16];
        barrier_wait(&shared.full[stage], parity);
        operands_visible();
        multiply_with_query(scores, shared, shared.stages[stage]);
        const bool ends = start + SLOTS >= last;
        if (ends && leaves) warp_arrives(&shared.query_empty);
        weigh(scores, pairs, shrink, last - start);
        barrier_wait(&shared.weights_empty, weights_parity);  // the weights before have been read
        weights_parity ^= 1;
#pragma unroll
        for (int i = 0; i < 16; ++i) store_weights(shared, row + i % 2 * 8, i / 2, pairs[i]);
        if (lane % 4 == 0) shared.shrink[row] = shrink[0], shared.shrink[row + 8] = shrink[1];
        if (ends) tell_totals();
        operands_visible();
        warp_arrives(&shared.weights_full);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    }
  }
};

// What two stretches, or what they were joined to, contribute: sums · left + others · right.
struct Joint {
  float left, right, top, total;
  __device__ Joint(float2 a, float2 b) {
    top = fmaxf(a.x, b.x);
    left = exp2_of(a.x - top), right = exp2_of(b.x - top);
    total = fmaf(b.y, right, __fmul_rn(a.y, left));
  }
};
__device__ __forceinline__ float join(float a, float b, const Joint& joint) {
  return fmaf(b, joint.right, __fmul_rn(a, joint.left));
}

// Weights and rows to sums: what two times four warps do.
struct Summer {
  const Arguments& a;
  Shared& shared;
  const int head_block, half, lane, row;  // row: as for those who weigh
  float sums[2][64], tops[2], totals[2];

  __device__ Summer(const Arguments& a, Shared& shared, int head_block)
      : a(a), shared(shared), head_block(head_block), half((threadIdx.x - SUMMERS) / 128), lane(threadIdx.x % 32),
        row(threadIdx.x / 32 % 4 * 16 + lane / 4) {}

  __device__ __forceinline__ void scale(float first, float second) {
#pragma unroll
    for (int i = 0; i < 128; ++i) sums[i / 64][i % 64] *= i % 4 < 2 ? first : second;
  }

  // A stretch has been read: join it, keep it, or write it.
  __device__ void finish(const Walk& walk, bool covers) {
    const int stretch = walk.run.stretch, member = stretch % FAMILY, count = walk.stretches.count;
    const int own = covers ? stretch - member : stretch;
    const int64_t place = (static_cast<int64_t>(walk.run.token) * a.stretches + own) * head_blocks(a) + head_block;
    float4* part = a.parts + place * PART + half * (PART / 2) + threadIdx.x % 128;
    float2* family = shared.family_tops[half] + row;  // what a warp reads it wrote itself
    if (covers && member > 0) {
      const Joint first(family[0], {tops[0], totals[0]}), second(family[8], {tops[1], totals[1]});
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const float4 before = part[j * 128];
        float* more = sums[j / 16] + j % 16 * 4;
        more[0] = join(before.x, more[0], first), more[1] = join(before.y, more[1], first);
        more[2] = join(before.z, more[2], second), more[3] = join(before.w, more[3], second);
      }
      tops[0] = first.top, totals[0] = first.total, tops[1] = second.top, totals[1] = second.total;
    }
    if (covers && count <= FAMILY && stretch + 1 == count) return write(walk.run.token);
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      const float* four = sums[j / 16] + j % 16 * 4;
      part[j * 128] = make_float4(four[0], four[1], four[2], four[3]);
    }
    __syncwarp();
    if (lane % 4 == 0) {
      for (int which = 0; which < 2; ++which) {
        family[8 * which] = make_float2(tops[which], totals[which]);
        if (half == 0) a.tops[place * HEADS + row + 8 * which] = family[8 * which];
      }
    }
    __syncwarp();
  }

  __device__ void write(int token) {
    scale(1.0f / totals[0], 1.0f / totals[1]);
    for (int which = 0; which < 2; ++which) {
      const int head = head_block * HEADS + row + 8 * which;
      if (head >= a.heads) continue;
      uint16_t* row_of_out = a.out + (static_cast<int64_t>(token) * a.heads + head) * LATENT + half * (LATENT / 2);
      unsigned* to = reinterpret_cast<unsigned*>(row_of_out) + lane % 4;
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const float* two = sums[j / 16] + j % 16 * 4 + which * 2;
        to[j * 4] = bf16_pair(two[0], two[1]);
      }
    }
  }

  __device__ void sum_all() {
    int stage = 0, last_token = -1;
    unsigned parity = 0, weights_parity = 0;
    bool covers = false;  // does this run have the whole family?
    for (Walk walk(a, shared.run); walk.there(); walk.advance()) {
      const int stretch = walk.run.stretch;
      if (walk.run.token != last_token) covers = false;
      last_token = walk.run.token;
      if (stretch % FAMILY == 0) {
        covers = walk.has(min(stretch + FAMILY, walk.stretches.count) - 1);
        if (threadIdx.x == SUMMERS) {
          const int64_t family = static_cast<int64_t>(walk.run.token) * families(a) + stretch / FAMILY;
          a.whole[family * head_blocks(a) + head_block] = covers;
        }
      }
      const int first = walk.first(), last = walk.last();
      for (int start = first; start < last; start += SLOTS) {
        barrier_wait(&shared.full[stage], parity);
        barrier_wait(&shared.weights_full, weights_parity);
        weights_parity ^= 1;
        operands_visible();
        const float shrink = shared.shrink[row], shrink_second = shared.shrink[row + 8];
        if (start + SLOTS >= last) {
          for (int which = 0; which < 2; ++which)
            tops[which] = shared.tops[row + 8 * which], totals[which] = shared.totals[row + 8 * which];
        }
        if (start > first && __any_sync(0xFFFFFFFFu, shrink != 1.0f || shrink_second != 1.0f))
          scale(shrink, shrink_second);
        multiply_with_weights(sums, shared, shared.stages[stage], half, start > first, [&](int quarter) {
          if (lane == 0) barrier_arrive(&shared.empty[stage][quarter]);
        });
        warp_arrives(&shared.weights_empty);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
      finish(walk, covers);
    }
  }
};

__device__ void begin(Shared& shared) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(&shared.full[stage], 128);  // threads that copy
      for (int quarter = 0; quarter < QUARTERS; ++quarter) barrier_init(&shared.empty[stage][quarter], 8);  // warps
    }
    barrier_init(&shared.query_full, 128);
    barrier_init(&shared.query_empty, 4);
    barrier_init(&shared.weights_full, 4);
    barrier_init(&shared.weights_empty, 8);
    barriers_visible();
  }
}

__global__ void __launch_bounds__(THREADS, 1) read_stretches(const Arguments a) {
  DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int shares = gridDim.x / head_blocks(a);
  begin(shared);
  share_out(a, shared, blockIdx.x % shares, shares);
  if (threadIdx.x >= COPIERS) {
    registers_give<COPY_REGISTERS>();
    copy_all(a, shared, blockIdx.x / shares);
  } else if (threadIdx.x >= SUMMERS) {
    registers_take<SUM_REGISTERS>();
    Summer(a, shared, blockIdx.x / shares).sum_all();
  } else {
    registers_give<WEIGH_REGISTERS>();
    Weigher(a, shared).weigh_all();
  }
}

__device__ __forceinline__ void join_four(float4& sum, float4& top, const float4& more, const float4& more_top) {
  const Joint first({top.x, top.y}, {more_top.x, more_top.y}), second({top.z, top.w}, {more_top.z, more_top.w});
  sum = make_float4(join(sum.x, more.x, first), join(sum.y, more.y, first), join(sum.z, more.z, second),
                    join(sum.w, more.w, second));
  top = make_float4(first.top, first.total, second.top, second.total);
}

// Joins what blocks did not, begun while they still work. `each` blocks share the float4 of a token and head block; a thread joins one bunch of one
// of them, and the first bunch's thread the bunches.
__global__ void __launch_bounds__(256) join_stretches(const Arguments a, int each) {
  DYNAMIC_SHARED(memory);
  kernel_before_has_ended();
  float4* sums = reinterpret_cast<float4*>(memory);
  float4* tops = sums + 256;
  const int blocks = head_blocks(a), head_block = blockIdx.x / each % blocks, token = blockIdx.x / each / blocks;
  const bool is_padding = __ldg(a.sequence + token) < 0;
  const int count = is_padding ? 0 : stretches_of(__ldg(a.position + token) + 1).count;
  const uint8_t* whole = a.whole + static_cast<int64_t>(token) * families(a) * blocks + head_block;
  if (!is_padding && count <= FAMILY && whole[0]) return;  // written already
  int bunches = 1;
  while (bunches * BUNCH * FAMILY < count) bunches *= 2;
  const int columns = 256 / bunches, column = threadIdx.x % columns, bunch = threadIdx.x / columns;
  for (int base = blockIdx.x % each * columns; base < PART; base += each * columns) {
    const int within = base + column, j = within / 128 % 32, thread = within % 128;
    const int row = thread / 32 * 16 + thread % 32 / 4, head = head_block * HEADS + row;
    float4 sum = make_float4(0, 0, 0, 0), top = make_float4(0, 0, 0, 0);
    const int stop = min((bunch + 1) * BUNCH * FAMILY, count);
    const auto load = [&](int stretch, float4& part, float4& part_top) {
      const int64_t place = (static_cast<int64_t>(token) * a.stretches + stretch) * blocks + head_block;
      const float2 upper = a.tops[place * HEADS + row], lower = a.tops[place * HEADS + row + 8];
      part = a.parts[place * PART + within];
      part_top = make_float4(upper.x, upper.y, lower.x, lower.y);
    };
    // The usual case is that a family is whole or all there: what is read for it does not wait for `whole`, and the
    // next family's does not wait for this one's.
#pragma unroll
    for (int family = 0; family < BUNCH; ++family) {
      const int first = (bunch * BUNCH + family) * FAMILY;
      if (first >= stop) break;
      const int members = whole[first / FAMILY * blocks] ? 1 : min(FAMILY, count - first);
      float4 parts[FAMILY], part_tops[FAMILY];
      load(first, parts[0], part_tops[0]);
#pragma unroll
      for (int member = 1; member < FAMILY; ++member)
        if (member < members) load(first + member, parts[member], part_tops[member]);
#pragma unroll
      for (int member = 1; member < FAMILY; ++member)
        if (member < members) join_four(parts[0], part_tops[0], parts[member], part_tops[member]);
      if (family == 0) sum = parts[0], top = part_tops[0];
      else join_four(sum, top, parts[0], part_tops[0]);
    }
    __syncthreads();  // what the round before left has been read
    sums[threadIdx.x] = sum, tops[threadIdx.x] = top;
    __syncthreads();
    if (bunch > 0) continue;
    for (int other = 1; other * BUNCH * FAMILY < count; ++other)
      join_four(sum, top, sums[other * columns + column], tops[other * columns + column]);
    // As where a block writes: the reciprocal, then the product.
    const float upper = count ? 1.0f / top.y : 0.0f, lower = count ? 1.0f / top.w : 0.0f;
    uint16_t* row_of_out = a.out + (static_cast<int64_t>(token) * a.heads + head) * LATENT;
    unsigned* to = reinterpret_cast<unsigned*>(row_of_out + within / 128 / 32 * (LATENT / 2) + j * 8 + thread % 4 * 2);
    if (head < a.heads) to[0] = bf16_pair(sum.x * upper, sum.y * upper);
    if (head + 8 < a.heads) to[8 * LATENT / 2] = bf16_pair(sum.z * lower, sum.w * lower);
  }
}

// One product of each kind by itself: scores fp32 [64, 64] of query and rows, bf16 [64, 576], and values fp32 [64, 512]
// of `given`, bf16 [64, 64], and the rows.
__global__ void __launch_bounds__(THREADS, 1) try_products(
    const uint16_t* query, const uint16_t* rows, const uint16_t* given, float* scores_out, float* values_out) {
  DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 % 4 * 16 + lane / 4;
  uint8_t* tile = shared.stages[1];
  begin(shared);
  __syncthreads();
  if (thread >= COPIERS) {
    registers_give<COPY_REGISTERS>();
    for (int line = (thread - COPIERS) / 8; line < HEADS; line += 16) {
      copy_row(shared.query, line, query + line * WIDTH, true, cache_policy(false));
      copy_row(tile, line, rows + line * WIDTH, true, cache_policy(false));
    }
    copies_arrive(&shared.full[1]);
  } else if (thread >= SUMMERS) {
    registers_take<SUM_REGISTERS>();
    float sums[2][64];
    const int half = (thread - SUMMERS) / 128;
    barrier_wait(&shared.full[1], 0);
    barrier_wait(&shared.weights_full, 0);
    operands_visible();
    multiply_with_weights(sums, shared, tile, half, false, [](int) {});
#pragma unroll
    for (int i = 0; i < 128; ++i)
      values_out[(row + i % 4 / 2 * 8) * LATENT + half * 256 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i / 64][i % 64];
  } else {
    registers_give<WEIGH_REGISTERS>();
    float scores[32];
    for (int i = 0; i < 16; ++i) {
      const int head = row + i % 2 * 8, at = head * SLOTS + i / 2 * 8 + lane % 4 * 2;
      store_weights(shared, head, i / 2, given[at] | static_cast<unsigned>(given[at + 1]) << 16);
    }
    operands_visible();
    warp_arrives(&shared.weights_full);
    barrier_wait(&shared.full[1], 0);
    operands_visible();
    multiply_with_query(scores, shared, tile);
#pragma unroll
    for (int i = 0; i < 32; ++i)
      scores_out[(row + i % 4 / 2 * 8) * SLOTS + i / 4 * 8 + lane % 4 * 2 + i % 2] = scores[i];
  }
}

// `follows`: it may start before the kernel before has ended, and waits itself where it must.
template <class... Parameters, class... Values>
int launch(void (*kernel)(Parameters...), bool follows, int blocks, int threads, int bytes, void* stream,
           Values... values) {
#ifdef MOONBASE_ON_CPU
  return run_on_cpu([=] { kernel(values...); }, blocks, threads, bytes, 16);
#else
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return static_cast<int>(error);
  cudaLaunchAttribute early[1] = {};
  early[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early[0].val.programmaticStreamSerializationAllowed = follows;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream), config.attrs = early, config.numAttrs = 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, values...));
#endif
}

}  // namespace

// Stretches of a context of so many slots or fewer, at most.
extern "C" int moonbase_latent_stretches(int slots) { return stretches_wanted(slots); }

// Returns CUDA's error code. `blocks`: at most one a processor, a multiple of the blocks of heads.
// `about`: Arguments; a type that no other file knows would hide this function from them.
extern "C" int moonbase_latent_attention(const void* about, int blocks, void* stream) {
  const Arguments a = *static_cast<const Arguments*>(about);
  const int error = launch(read_stretches, false, blocks, THREADS, sizeof(Shared), stream, a);
  if (error) return error;
  // About eight blocks a processor, if there is as much to join.
  const int tiles = a.tokens * head_blocks(a);
  int each = 8;
  while (each < 256 && each * 2 * tiles <= 8 * blocks) each *= 2;
  return launch(join_stretches, true, tiles * each, 256, 512 * 16, stream, a, each);
}

extern "C" int moonbase_latent_products(const uint16_t* query, const uint16_t* rows, const uint16_t* given,
                                        float* scores, float* values, void* stream) {
  return launch(try_products, false, 1, THREADS, sizeof(Shared), stream, query, rows, given, scores, values);
}
