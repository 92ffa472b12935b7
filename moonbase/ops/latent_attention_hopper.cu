// Attention over paged latents for decoding: rows of 512 + 64 bf16 numbers (DeepSeek-V2 §2.1), read once for 64 heads.
// The time is that of reading the rows, so everything else has to hide behind it.
//
// - A block takes one token, 64 heads and one stretch of the context after the other; one block a processor. One warp
//   asks the copy engine for rows, 64 at once, as soon as there is room; four multiply them with the query and make
//   weights of the scores, which go through shared memory in bf16; and two times four add weights · rows, each for half
//   of the 512 numbers, in registers. They wait for one another by barriers in shared memory alone, so that the
//   scores of the next 64 rows are under way while the last are summed.
// - Scores are four warps' work and not eight's: the tensor core reads both operands from shared memory, and the query
//   would be read twice, which costs half as much again.
// - How a context is cut into stretches follows from its length alone, and so do the bits of a token: each stretch is
//   summed from nothing, and stretches are joined from left to right, in bunches, and then those. Which block did them
//   changes nothing of that.
// - Blocks get equal runs of stretches, which they work out for themselves from the positions: nothing waits for the
//   host, and a call can be recorded. A token that one block has alone it joins; of others each of their blocks joins
//   some columns, once all have arrived at the token's counter. So blocks wait for one another: all of them run at
//   once.
// - Sums that wait to be joined are fp16 numbers, scaled by a power of two for each row of a thread: half as much to
//   write and read, 2^-12 beside the 2^-9 of the result's bf16.
// - The softmax refers to a maximum that follows the true one only when that is more than 2^8 above, so that sums are
//   rarely scaled anew.
//
// Shapes: N tokens, H heads, B blocks of 64 heads, G stretches at most, P pages of Z slots; A areas for sums that wait.
// Where a comment names a section, it is of the PTX manual. Warps of a group: 16 heads each; lane = 4·(head mod 8) +
// quarter (wgmma, "Register Fragments and Shared Memory Matrix Layouts"): accumulators 4j … 4j + 3 of a thread are of
// head `lane / 4`, columns 8j + 2·quarter and the next, and of head `lane / 4 + 8` the same.

#include <cstdint>
#ifndef MOONBASE_ON_CPU  // a test runs this file without a GPU
#include <cuda.h>
#include <cuda_runtime.h>
#endif

namespace {

#ifndef SHORTEST_STRETCH  // a test has shorter ones
#define SHORTEST_STRETCH 256
#define LONGEST_STRETCH 4096
#define BUNCH 16  // stretches that are joined first
#endif
constexpr int MOST_STRETCHES = 128;  // of one context
constexpr int LATENT = 512, WIDTH = 576;
constexpr int HEADS = 64;            // of a block: rows of the tensor core's products
constexpr int SLOTS = 64;            // rows of the cache at once
constexpr int STAGES = 2;
constexpr int CHUNKS = WIDTH / 64;   // a row lies in nine chunks of 128 bytes
constexpr int CHUNK_BYTES = 8 * 128;  // of eight rows, which follow one another for each chunk
constexpr int GROUP_BYTES = CHUNKS * CHUNK_BYTES;
constexpr int GROUPS = 8;            // of eight rows: what one order to the copy engine brings; a page has whole ones
constexpr int TILE_BYTES = GROUPS * GROUP_BYTES;
constexpr int QUARTERS = 4;          // of a tile: 16 rows, the depth of a product; each one's room is given back
constexpr int SUMMERS = 128, COPIERS = 384;  // the first threads of those who sum and copy; the first 128 weigh
constexpr int THREADS = 512, WARPS = THREADS / 32;  // three warps beside the one that copies have nothing to do
constexpr int SUMMING = 256;         // threads that sum
constexpr int PART = HEADS * LATENT / 8;     // uint4 of a stretch's sums: [j, thread of those who sum], eight fp16 each
constexpr int COPY_REGISTERS = 48, WEIGH_REGISTERS = 80, SUM_REGISTERS = 192;  // 512 = 48 + 80 + 2 · 192

struct Arguments {
  const uint16_t* query;    // bf16 [N, H, 576]
  const uint16_t* store;    // bf16 [P, Z, 576]
  const int32_t* tables;    // [sequences, table_width]
  const int32_t* sequence;  // [N], -1 for padding
  const int32_t* position;  // [N]
  uint4* parts;             // [A, G, B, PART], sums of stretches
  float4* marks;            // [A, G, B, 256], of a thread's two rows: what maximum they refer to, sum of weights
  float2* scales;           // [A, G, B, 256]: what the fp16 numbers of each row are multiplied with
  unsigned* arrived;        // [shares, B], zero before and after: blocks that have written their parts of a token
  uint16_t* out;            // bf16 [N, H, 512]
  int64_t query_token, query_head, store_page, store_slot;  // elements from one to the next
  float scale_log2;
  int tokens, heads, page_slots, table_width, stretches, pages, few;
};

__host__ __device__ inline int head_blocks(const Arguments& a) { return (a.heads + HEADS - 1) / HEADS; }

// Stretches of a block, from the first on; `start`: costs of all tokens before the first, `size`: of a block's run.
struct Run { int token, stretch, end_token, end_stretch, start, size; };

// A token of several blocks: the share of the first, how many, and where its parts lie.
struct Split { int token, area, count, first, sharers; };

struct Shared {
  uint8_t query[TILE_BYTES];
  uint8_t stages[STAGES][TILE_BYTES];
  uint8_t weights[HEADS * 128];
  float shrink[HEADS], tops[HEADS], totals[HEADS];
  uint64_t full[STAGES], empty[STAGES][QUARTERS], query_full, query_empty, weights_full, weights_empty;
  int costs[WARPS], dearest[WARPS];
  Run run;
  Split splits[2];  // of the run's first token and its last
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

// A phase of copies is announced, and ends when their bytes are there; the copy engine's writes need no fence.
__device__ __forceinline__ void barrier_init_copies(uint64_t* barrier, int) { barrier_init(barrier, 1); }
__device__ __forceinline__ void copies_announce(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
               : "memory");
}

// Until operands are there which the writer has made visible, or the copy engine wrote.
__device__ __forceinline__ void copies_wait(uint64_t* barrier, unsigned parity) { barrier_wait(barrier, parity); }

// After all that this thread knows to be written.
__device__ __forceinline__ void add_release(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// What the second cache does with rows ("createpolicy"): those that are read once leave first, and the sums of
// stretches stay.
__device__ __forceinline__ uint64_t cache_policy(bool read_once) {
  uint64_t policy;
  if (read_once) asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Where rows of 576 numbers lie: `lines` of them a page.
using RowMap = CUtensorMap;

// Eight lines of a page, or zeros where there are none, chunk by chunk, the 16 bytes p of line l at p ^ (l mod 8)
// ("cp.async.bulk.tensor").
__device__ __forceinline__ void copy_lines(void* to, const RowMap& map, int line, int page, uint64_t* barrier,
                                           uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %2, %4}], [%5], %6;" ::"r"(address_of(to)), "l"(&map), "r"(0), "r"(line), "r"(page),
      "r"(address_of(barrier)), "l"(policy) : "memory");
}

__device__ __forceinline__ void prefetch_map(const RowMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Returns CUDA's error code. The function is the driver's, which the library is not linked to.
inline int make_row_map(RowMap* map, const void* base, uint64_t lines, uint64_t line_bytes, uint64_t pages,
                    uint64_t page_bytes) {
  static decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  if (encode == nullptr) {
    cudaDriverEntryPointQueryResult found;
    void* function = nullptr;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return static_cast<int>(cudaErrorNotSupported);
    encode = reinterpret_cast<decltype(encode)>(function);
  }
  const cuuint64_t sizes[4] = {64, lines, CHUNKS, pages}, strides[3] = {line_bytes, 128, page_bytes};
  const cuuint32_t box[4] = {64, 8, CHUNKS, 1}, steps[4] = {1, 1, 1, 1};
  return static_cast<int>(encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(base), sizes, strides, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

// Those who sum, and nobody else.
__device__ __forceinline__ void summers_meet() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

__device__ __forceinline__ unsigned acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
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

// sums += a · b over 16: 64 heads x 128 of a row's numbers; b is N-major, hence the last 1. With 512 threads the
// compiler takes no product with 128 registers, whatever its warps may have.
__device__ __forceinline__ void multiply_values(float* sums, uint64_t a, uint64_t b) {
  asm volatile(
      "{ wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"
      " %64, %65, 1, 1, 1, 0, 1; }"
      : SIXTEEN(sums, 0), SIXTEEN(sums, 16), SIXTEEN(sums, 32), SIXTEEN(sums, 48)
      : "l"(a), "l"(b));
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

__device__ __forceinline__ unsigned half_pair(float low, float high) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float2 floats_of(unsigned half_pair) {
  float2 both;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(both.x), "=f"(both.y) : "r"(half_pair));
  return both;
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

// `few`: that many, but none shorter than `SHORTEST_STRETCH`, and more where they would be longer than `LONGEST_STRETCH`.
__host__ __device__ inline int stretches_wanted(int slots, int few) {
  const int most = (slots + SHORTEST_STRETCH - 1) / SHORTEST_STRETCH;
  const int least = (slots + LONGEST_STRETCH - 1) / LONGEST_STRETCH;
  const int wanted = few > most ? most : few < least ? least : few;
  return wanted < MOST_STRETCHES ? wanted : MOST_STRETCHES;
}

__host__ __device__ inline Stretches stretches_of(int slots, int few) {
  const int unit = stretches_wanted(slots, few) * SLOTS, length = (slots + unit - 1) / unit * SLOTS;
  return {length, (slots + length - 1) / length};
}

// A stretch costs its tiles and one more, for its end; the last one as much as the others, so that tokens of equal
// stretches fall into equal shares.
__host__ __device__ __forceinline__ int cost_of(const Stretches& stretches) { return stretches.length / SLOTS + 1; }

// The block's share of all stretches: those that begin, in costs, from `share` times the run's size on. That size is a
// multiple of the dearest stretch.
__device__ void share_out(const Arguments& a, Shared& shared, int share, int shares) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int each = (a.tokens + THREADS - 1) / THREADS, first = min(thread * each, a.tokens);
  const int stop = min(first + each, a.tokens);
  int cost = 0, dearest = 0;
  for (int token = first; token < stop; ++token) {
    const int sequence = __ldg(a.sequence + token), position = __ldg(a.position + token);  // together
    if (sequence < 0) continue;
    const Stretches stretches = stretches_of(position + 1, a.few);
    cost += stretches.count * cost_of(stretches);
    dearest = max(dearest, cost_of(stretches));
  }
  int up_to = cost;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFu, up_to, distance);
    if (lane >= distance) up_to += other;
    dearest = max(dearest, __shfl_xor_sync(0xFFFFFFFFu, dearest, distance));
  }
  if (lane == 31) shared.costs[warp] = up_to, shared.dearest[warp] = dearest;
  if (thread == 0) shared.run = {a.tokens, 0, a.tokens, 0, 0, 1};
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
      const Stretches stretches = stretches_of(__ldg(a.position + token) + 1, a.few);
      const int one = cost_of(stretches), end = start + stretches.count * one;
      if (start <= low && low < end) {
        shared.run.token = token, shared.run.stretch = (low - start + one - 1) / one;
        shared.run.start = start, shared.run.size = size;
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
      sequence = __ldg(a.sequence + run.token), slots = __ldg(a.position + run.token) + 1;
      if (sequence < 0) continue;
      stretches = stretches_of(slots, a.few);
      if (run.stretch < stretches.count) return;
      run.start += stretches.count * cost_of(stretches);
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
  __device__ void advance() {
    if (++run.stretch == stretches.count) {
      run.start += stretches.count * cost_of(stretches);
      ++run.token, run.stretch = 0;
      settle();
    }
  }
  // Share of the block that has a stretch of the token.
  __device__ int share_of(int stretch) const { return (run.start + stretch * cost_of(stretches)) / run.size; }
};

// One warp: each of the first eight lanes has eight rows of every tile. What is not there is asked for from a page that
// is not there, and so comes as zeros; only of eight rows at the end of a context the last may be anybody's. Stretches
// follow one another without a gap. Pages are looked up two tiles ahead, and found without dividing.
__device__ void copy_all(const Arguments& a, const RowMap& rows, const RowMap& queries, Shared& shared,
                         int head_block) {
  const int lane = threadIdx.x % 32, group = lane % GROUPS;
  const uint64_t policy = cache_policy(head_blocks(a) == 1);
  // ceil(2^32 / page_slots): slot * this / 2^32 is slot / page_slots for slots < 2^32 / page_slots.
  const unsigned page_share = 0xFFFFFFFFu / static_cast<unsigned>(a.page_slots) + 1;
  int stage = 0;
  unsigned parity = 1, query_parity = 1;  // of a fresh barrier: nobody waits in the first round
  for (Walk walk(a, shared.run); walk.there(); walk.advance()) {
    const int32_t* table = a.tables + static_cast<int64_t>(walk.sequence) * a.table_width;
    const int token = walk.run.token, first = walk.first();
    while (!walk.leaves()) walk.advance();
    const int last = walk.last();
    const auto page_of = [&](int slot) { return slot < last ? __ldg(table + __umulhi(slot, page_share)) : a.pages; };
    int slot = first + group * 8, page = page_of(slot), next = page_of(slot + SLOTS);
    for (int start = first; start < last; start += SLOTS, slot += SLOTS) {
      const int line = slot - __umulhi(slot, page_share) * a.page_slots, after_next = page_of(slot + 2 * SLOTS);
#pragma unroll
      for (int quarter = 0; quarter < QUARTERS; ++quarter) {
        barrier_wait(&shared.empty[stage][quarter], parity);
        if (quarter == 0 && lane == 0) copies_announce(&shared.full[stage], TILE_BYTES);
        __syncwarp();
        if (lane / 2 == quarter)
          copy_lines(shared.stages[stage] + group * GROUP_BYTES, rows, line, page, &shared.full[stage], policy);
      }
      page = next, next = after_next;
      if (++stage == STAGES) stage = 0, parity ^= 1;
      if (start > first) continue;
      // After the first rows, whose room is free sooner than that of the query before.
      barrier_wait(&shared.query_empty, query_parity);
      query_parity ^= 1;
      if (lane == 0) copies_announce(&shared.query_full, TILE_BYTES);
      __syncwarp();
      if (lane < GROUPS)
        copy_lines(shared.query + group * GROUP_BYTES, queries, head_block * HEADS + group * 8, token,
                   &shared.query_full, policy);
    }
  }
}

// Rows of the result that belong to nobody.
__device__ void clear_padding(const Arguments& a, int head_block, int share, int shares) {
  const int heads = min(HEADS, a.heads - head_block * HEADS);
  for (int token = share; token < a.tokens; token += shares) {
    if (__ldg(a.sequence + token) >= 0) continue;
    const int64_t row = static_cast<int64_t>(token) * a.heads + head_block * HEADS;
    uint4* out = reinterpret_cast<uint4*>(a.out + row * LATENT);
    for (int i = threadIdx.x - COPIERS - 32; i < heads * LATENT / 8; i += 96) out[i] = make_uint4(0, 0, 0, 0);
  }
}

// Scores of 64 heads and a tile's rows.
__device__ __forceinline__ void multiply_with_query(float (&scores)[32], const Shared& shared, const uint8_t* tile) {
  const uint64_t query = operand(shared.query, 16, GROUP_BYTES), rows = operand(tile, 16, GROUP_BYTES);
  products_begin();
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const unsigned offset = (chunk * CHUNK_BYTES + step * 32) >> 4;
      multiply_scores(scores, query + offset, rows + offset, chunk > 0 || step > 0);
    }
  }
  products_commit();
  products_wait<0>();
}

// sums += weights · rows, for half of the rows' numbers; `done(quarter)` as soon as those rows are read.
template <class Done>
__device__ __forceinline__ void multiply_with_weights(float (&sums)[128], const Shared& shared, const uint8_t* tile,
                                                      int half, const Done& done) {
  const uint64_t weights = operand(shared.weights, 16, 1024);
  const uint64_t rows = operand(tile + half * (LATENT / 2 / 64) * CHUNK_BYTES, CHUNK_BYTES, GROUP_BYTES);
  products_begin();
#pragma unroll
  for (int quarter = 0; quarter < QUARTERS; ++quarter) {
#pragma unroll
    for (int part = 0; part < 2; ++part)
      multiply_values(sums + part * 64, weights + (quarter * 32 >> 4),
                      rows + ((quarter * 2 * GROUP_BYTES + part * 2 * CHUNK_BYTES) >> 4));
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

// Rows that eight slots have too many, but the rotated keys: times a weight of 0 they must give 0.
__device__ __forceinline__ void clear_rows(uint8_t* tile, int known) {
  uint8_t* group = tile + known / 8 * GROUP_BYTES;
  const int words = (8 - known % 8) * 32;  // of a chunk
  for (int i = threadIdx.x; i < words * (CHUNKS - 1); i += 128)
    store_operand(group + i / words * CHUNK_BYTES + known % 8 * 128 + i % words * 4, 0);
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
        copies_wait(&shared.query_full, query_parity);
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
        copies_wait(&shared.full[stage], parity);
        multiply_with_query(scores, shared, shared.stages[stage]);
        const bool ends = start + SLOTS >= last;
        if (last - start < SLOTS && (last - start) % 8) clear_rows(shared.stages[stage], last - start);
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

// Where the parts of a token and a block of heads lie.
struct Parts {
  const Arguments& a;
  int64_t first;  // of its stretches
  int step;       // from one to the next

  __device__ Parts(const Arguments& a, int area, int head_block)
      : a(a), first(static_cast<int64_t>(area) * a.stretches * head_blocks(a) + head_block), step(head_blocks(a)) {}
  __device__ __forceinline__ uint4* words(int stretch) const { return a.parts + (first + stretch * step) * PART; }
  __device__ __forceinline__ float4* marks(int stretch) const { return a.marks + (first + stretch * step) * SUMMING; }
  __device__ __forceinline__ float2* scales(int stretch) const { return a.scales + (first + stretch * step) * SUMMING; }
};

// Some uint4 of joined parts, and what they refer to for a thread's two rows.
template <int COLUMNS>
struct Joined {
  float sums[COLUMNS][8];
  float2 upper, lower;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < COLUMNS * 8; ++i) sums[i / 8][i % 8] = 0.0f;
    upper = lower = make_float2(-INFINITY, 0.0f);
  }

  __device__ __forceinline__ void join(const float (&more)[COLUMNS][8], float2 more_upper, float2 more_lower) {
    const Joint first(upper, more_upper), second(lower, more_lower);
    upper = make_float2(first.top, first.total), lower = make_float2(second.top, second.total);
#pragma unroll
    for (int i = 0; i < COLUMNS * 8; ++i) {
      const Joint& joint = i / 2 % 2 ? second : first;
      sums[i / 8][i % 8] = fmaf(more[i / 8][i % 8], joint.right, __fmul_rn(sums[i / 8][i % 8], joint.left));
    }
  }

  // Stretches from `first` to `stop`, at most a bunch, of the columns from `column` on and 256 apart; `AHEAD` of them
  // are read before the first is used.
  template <int AHEAD>
  __device__ __forceinline__ void read(const Parts& parts, int first, int stop, int column) {
    const int who = column % SUMMING;
    clear();
    for (int start = first; start < stop; start += AHEAD) {
      uint4 words[AHEAD][COLUMNS];
      float4 marks[AHEAD];
      float2 scales[AHEAD];
#pragma unroll
      for (int ahead = 0; ahead < AHEAD; ++ahead) {
        const int stretch = min(start + ahead, stop - 1);  // what is read too much is not used
        const uint4* from = parts.words(stretch);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) words[ahead][i] = __ldcg(from + min(column + i * SUMMING, PART - 1));
        marks[ahead] = __ldcg(parts.marks(stretch) + who), scales[ahead] = __ldcg(parts.scales(stretch) + who);
      }
#pragma unroll
      for (int ahead = 0; ahead < AHEAD; ++ahead) {
        if (start + ahead >= stop) break;
        float more[COLUMNS][8];
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
          const unsigned pairs[4] = {words[ahead][i].x, words[ahead][i].y, words[ahead][i].z, words[ahead][i].w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 two = floats_of(pairs[j]);
            const float scale = j % 2 ? scales[ahead].y : scales[ahead].x;
            more[i][2 * j] = two.x * scale, more[i][2 * j + 1] = two.y * scale;
          }
        }
        join(more, make_float2(marks[ahead].x, marks[ahead].y), make_float2(marks[ahead].z, marks[ahead].w));
      }
    }
  }

  __device__ __forceinline__ void write(const Arguments& a, int token, int head_block, int column, int stop) const {
    const int who = column % SUMMING, head = head_block * HEADS + who % 128 / 32 * 16 + who % 32 / 4;
    const float shares[2] = {1.0f / upper.y, 1.0f / lower.y};
    unsigned* out = reinterpret_cast<unsigned*>(a.out + (static_cast<int64_t>(token) * a.heads + head) * LATENT) +
                    who / 128 * (LATENT / 4) + who % 4;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      if (column + i * SUMMING >= stop) break;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (head + j % 2 * 8 < a.heads)
          out[j % 2 * 8 * (LATENT / 2) + ((column / SUMMING + i) * 2 + j / 2) * 4] =
              bf16_pair(sums[i][2 * j] * shares[j % 2], sums[i][2 * j + 1] * shares[j % 2]);
    }
  }
};

// What follows is done by all who sum, for the columns from `low` to `high` of all heads of a block of them. A thread
// takes all bunches of some columns ...
template <int COLUMNS, int AHEAD>
__device__ __forceinline__ void join_columns(const Arguments& a, const Parts& parts, int token, int head_block,
                                             int count, int low, int high) {
  for (int column = low + threadIdx.x - SUMMERS; column < high; column += COLUMNS * SUMMING) {
    Joined<COLUMNS> all, bunch;
    all.template read<AHEAD>(parts, 0, min(BUNCH, count), column);
    for (int first = BUNCH; first < count; first += BUNCH) {
      bunch.template read<AHEAD>(parts, first, min(first + BUNCH, count), column);
      all.join(bunch.sums, bunch.upper, bunch.lower);
    }
    all.write(a, token, head_block, column, high);
  }
}

// ... or one bunch of one, and the first bunch's thread joins them: `room` for all threads.
__device__ __forceinline__ void join_bunches(const Arguments& a, const Parts& parts, int token, int head_block,
                                             int count, int low, int high, Joined<1>* room) {
  int bunches = 1;
  while (bunches * BUNCH < count) bunches *= 2;
  const int thread = threadIdx.x - SUMMERS, columns = SUMMING / bunches, bunch = thread / columns;
  for (int base = low; base < high; base += columns) {
    const int column = base + thread % columns;
    const bool there = column < high && bunch * BUNCH < count;
    Joined<1> all;
    if (there) all.read<8>(parts, bunch * BUNCH, min((bunch + 1) * BUNCH, count), column), room[thread] = all;
    summers_meet();
    if (there && bunch == 0) {
      for (int other = 1; other * BUNCH < count; ++other) {
        const Joined<1> more = room[other * columns + thread];
        all.join(more.sums, more.upper, more.lower);
      }
      all.write(a, token, head_block, column, high);
    }
    summers_meet();
  }
}

// Weights and rows to sums: what two times four warps do.
struct Summer {
  const Arguments& a;
  Shared& shared;
  const int head_block, share, shares, half, lane, row;  // row: as for those who weigh
  float sums[128], tops[2], totals[2];

  __device__ Summer(const Arguments& a, Shared& shared, int head_block, int share, int shares)
      : a(a), shared(shared), head_block(head_block), share(share), shares(shares),
        half((threadIdx.x - SUMMERS) / 128), lane(threadIdx.x % 32), row(threadIdx.x / 32 % 4 * 16 + lane / 4) {}

  __device__ __forceinline__ void scale(float first, float second) {
#pragma unroll
    for (int i = 0; i < 128; ++i) sums[i] *= i % 4 < 2 ? first : second;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 128; ++i) sums[i] = 0.0f;
  }

  // As fp16, the largest of a row below 2^15.
  __device__ __forceinline__ void keep(const Parts& parts, int stretch) {
    float largest[2] = {0.0f, 0.0f}, scales[2], inverse[2];
#pragma unroll
    for (int i = 0; i < 128; ++i) largest[i % 4 / 2] = fmaxf(largest[i % 4 / 2], fabsf(sums[i]));
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int exponent = max(static_cast<int>(__float_as_uint(largest[which]) >> 23), 30);
      scales[which] = __uint_as_float((exponent - 14) << 23), inverse[which] = __uint_as_float((268 - exponent) << 23);
    }
    const int who = threadIdx.x - SUMMERS;
    uint4* to = parts.words(stretch) + who;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float* eight = sums + j * 8;
      to[j * SUMMING] = make_uint4(half_pair(eight[0] * inverse[0], eight[1] * inverse[0]),
                                   half_pair(eight[2] * inverse[1], eight[3] * inverse[1]),
                                   half_pair(eight[4] * inverse[0], eight[5] * inverse[0]),
                                   half_pair(eight[6] * inverse[1], eight[7] * inverse[1]));
    }
    parts.marks(stretch)[who] = make_float4(tops[0], totals[0], tops[1], totals[1]);
    parts.scales(stretch)[who] = make_float2(scales[0], scales[1]);
  }

  // A stretch has been read: write it, or keep it until all of its token are there. A thread of a token that the block
  // has alone reads what it wrote itself, so the next such token can have the same area.
  __device__ __forceinline__ void finish(const Walk& walk) {
    const int token = walk.run.token, count = walk.stretches.count;
    if (count == 1) return write(token);
    const int first = walk.share_of(0), sharers = walk.share_of(count - 1) - first + 1;
    const int area = a.tokens <= 2 * shares ? token : sharers == 1 ? share : shares + first;
    const Parts parts(a, area, head_block);
    keep(parts, walk.run.stretch);
    if (!walk.leaves()) return;
    if (sharers == 1) return join_columns<4, 4>(a, parts, token, head_block, count, 0, PART);
    summers_meet();
    if (threadIdx.x == SUMMERS) {
      add_release(a.arrived + first * head_blocks(a) + head_block);
      shared.splits[first == share] = {token, area, count, first, sharers};
    }
  }

  __device__ __forceinline__ void write(int token) {
    scale(1.0f / totals[0], 1.0f / totals[1]);
    for (int which = 0; which < 2; ++which) {
      const int head = head_block * HEADS + row + 8 * which;
      if (head >= a.heads) continue;
      uint16_t* row_of_out = a.out + (static_cast<int64_t>(token) * a.heads + head) * LATENT + half * (LATENT / 2);
      unsigned* to = reinterpret_cast<unsigned*>(row_of_out) + lane % 4;
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const float* two = sums + j * 4 + which * 2;
        to[j * 4] = bf16_pair(two[0], two[1]);
      }
    }
  }

  // Tokens that other blocks have stretches of: every block joins some columns.
  __device__ void join_splits() {
    for (int which = 0; which < 2; ++which) {
      summers_meet();
      const Split split = shared.splits[which];
      if (split.sharers == 0) continue;
      unsigned* arrived = a.arrived + split.first * head_blocks(a) + head_block;
      if (threadIdx.x == SUMMERS)
        while (acquire(arrived) < static_cast<unsigned>(split.sharers)) __nanosleep(20);
      summers_meet();
      const int mine = share - split.first;
      const int low = PART * mine / split.sharers, high = PART * (mine + 1) / split.sharers;
      const Parts parts(a, split.area, head_block);
      if (split.count > BUNCH)  // rows and query are not needed any more
        join_bunches(a, parts, split.token, head_block, split.count, low, high,
                     reinterpret_cast<Joined<1>*>(shared.stages[0]));
      else if (high - low > 2 * SUMMING)
        join_columns<4, 4>(a, parts, split.token, head_block, split.count, low, high);
      else
        join_columns<2, 8>(a, parts, split.token, head_block, split.count, low, high);
      // Nobody reads the counter any more when all have arrived once more.
      if (threadIdx.x == SUMMERS && atomicAdd(arrived, 1u) + 1 == 2u * split.sharers) *arrived = 0;
    }
  }

  __device__ void sum_all() {
    int stage = 0;
    unsigned parity = 0, weights_parity = 0;
    clear();
    for (Walk walk(a, shared.run); walk.there(); walk.advance()) {
      const int first = walk.first(), last = walk.last();
      for (int start = first; start < last; start += SLOTS) {
        copies_wait(&shared.full[stage], parity);
        copies_wait(&shared.weights_full, weights_parity);
        weights_parity ^= 1;
        const float shrink = shared.shrink[row], shrink_second = shared.shrink[row + 8];
        if (start + SLOTS >= last) {
          for (int which = 0; which < 2; ++which)
            tops[which] = shared.tops[row + 8 * which], totals[which] = shared.totals[row + 8 * which];
        }
        if (start > first && __any_sync(0xFFFFFFFFu, shrink != 1.0f || shrink_second != 1.0f))
          scale(shrink, shrink_second);
        multiply_with_weights(sums, shared, shared.stages[stage], half, [&](int quarter) {
          if (lane == 0) barrier_arrive(&shared.empty[stage][quarter]);
        });
        warp_arrives(&shared.weights_empty);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
      finish(walk);
      clear();
    }
    join_splits();
  }
};

__device__ void begin(Shared& shared) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init_copies(&shared.full[stage], GROUPS);
      for (int quarter = 0; quarter < QUARTERS; ++quarter)
        barrier_init(&shared.empty[stage][quarter], 8);  // warps
    }
    barrier_init_copies(&shared.query_full, GROUPS);
    barrier_init(&shared.query_empty, 4);
    barrier_init(&shared.weights_full, 4);
    barrier_init(&shared.weights_empty, 8);
    barriers_visible();
    shared.splits[0].sharers = shared.splits[1].sharers = 0;
  }
}

__global__ void __launch_bounds__(THREADS, 1) read_stretches(const Arguments a, const __grid_constant__ RowMap rows,
                                                             const __grid_constant__ RowMap queries) {
  DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int shares = gridDim.x / head_blocks(a), share = blockIdx.x % shares, head_block = blockIdx.x / shares;
  if (threadIdx.x == COPIERS) prefetch_map(rows), prefetch_map(queries);
  begin(shared);
  share_out(a, shared, share, shares);
  if (threadIdx.x >= COPIERS) {
    registers_give<COPY_REGISTERS>();
    if (threadIdx.x < COPIERS + 32) copy_all(a, rows, queries, shared, head_block);
    else clear_padding(a, head_block, share, shares);
  } else if (threadIdx.x >= SUMMERS) {
    registers_take<SUM_REGISTERS>();
    Summer(a, shared, head_block, share, shares).sum_all();
  } else {
    registers_give<WEIGH_REGISTERS>();
    Weigher(a, shared).weigh_all();
  }
}

// One product of each kind by itself: scores fp32 [64, 64] of query and rows, bf16 [64, 576], and values fp32 [64, 512]
// of `given`, bf16 [64, 64], and the rows.
__global__ void __launch_bounds__(THREADS, 1) try_products(
    const __grid_constant__ RowMap queries, const __grid_constant__ RowMap rows, const uint16_t* given,
    float* scores_out, float* values_out) {
  DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 % 4 * 16 + lane / 4;
  uint8_t* tile = shared.stages[1];
  begin(shared);
  __syncthreads();
  if (thread >= COPIERS) {
    registers_give<COPY_REGISTERS>();
    if (thread >= COPIERS + 32) return;
    const uint64_t policy = cache_policy(false);
    if (lane == 0) copies_announce(&shared.full[1], TILE_BYTES), copies_announce(&shared.query_full, TILE_BYTES);
    __syncwarp();
    if (lane < GROUPS) {
      copy_lines(tile + lane * GROUP_BYTES, rows, lane * 8, 0, &shared.full[1], policy);
      copy_lines(shared.query + lane * GROUP_BYTES, queries, lane * 8, 0, &shared.query_full, policy);
    }
  } else if (thread >= SUMMERS) {
    registers_take<SUM_REGISTERS>();
    float sums[128] = {};
    const int half = (thread - SUMMERS) / 128;
    copies_wait(&shared.full[1], 0);
    copies_wait(&shared.weights_full, 0);
    multiply_with_weights(sums, shared, tile, half, [](int) {});
#pragma unroll
    for (int i = 0; i < 128; ++i)
      values_out[(row + i % 4 / 2 * 8) * LATENT + half * 256 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
  } else {
    registers_give<WEIGH_REGISTERS>();
    float scores[32];
    for (int i = 0; i < 16; ++i) {
      const int head = row + i % 2 * 8, at = head * SLOTS + i / 2 * 8 + lane % 4 * 2;
      store_weights(shared, head, i / 2, given[at] | static_cast<unsigned>(given[at + 1]) << 16);
    }
    operands_visible();
    warp_arrives(&shared.weights_full);
    copies_wait(&shared.full[1], 0);
    copies_wait(&shared.query_full, 0);
    multiply_with_query(scores, shared, tile);
#pragma unroll
    for (int i = 0; i < 32; ++i)
      scores_out[(row + i % 4 / 2 * 8) * SLOTS + i / 4 * 8 + lane % 4 * 2 + i % 2] = scores[i];
  }
}

template <class... Parameters, class... Values>
int launch(void (*kernel)(Parameters...), int blocks, void* stream, Values... values) {
#ifdef MOONBASE_ON_CPU
  return run_on_cpu([=] { kernel(values...); }, blocks, THREADS, sizeof(Shared), blocks);
#else
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return static_cast<int>(error);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(THREADS), config.dynamicSmemBytes = sizeof(Shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute together[1] = {};  // blocks wait for one another: all of them run, or none does yet
  together[0].id = cudaLaunchAttributeCooperative;
  together[0].val.cooperative = 1;
  config.attrs = together, config.numAttrs = 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, values...));
#endif
}

}  // namespace

// Stretches of a context of so many slots or fewer, at most.
extern "C" int moonbase_latent_stretches(int slots, int few) { return stretches_wanted(slots, few); }

// Returns CUDA's error code. `blocks`: at most one a processor, a multiple of the blocks of heads.
// `about`: Arguments; a type that no other file knows would hide this function from them.
extern "C" int moonbase_latent_attention(const void* about, int blocks, void* stream) {
  const Arguments a = *static_cast<const Arguments*>(about);
  RowMap rows, queries;
  int error = make_row_map(&rows, a.store, a.page_slots, a.store_slot * 2, a.pages, a.store_page * 2);
  if (!error) error = make_row_map(&queries, a.query, a.heads, a.query_head * 2, a.tokens, a.query_token * 2);
  return error ? error : launch(read_stretches, blocks, stream, a, rows, queries);
}

extern "C" int moonbase_latent_products(const uint16_t* query, const uint16_t* rows, const uint16_t* given,
                                        float* scores, float* values, void* stream) {
  RowMap query_map, rows_map;
  int error = make_row_map(&query_map, query, HEADS, WIDTH * 2, 1, HEADS * WIDTH * 2);
  if (!error) error = make_row_map(&rows_map, rows, SLOTS, WIDTH * 2, 1, SLOTS * WIDTH * 2);
  return error ? error : launch(try_products, 1, stream, query_map, rows_map, given, scores, values);
}
