// Routed experts with INT4 weights for inference, a whole layer in one kernel: group the choices by expert, gate and up,
// SwiGLU, down. Made for at most a few tokens an expert, where the time is that of reading the weights once.
//
// What it does about it:
// - Weights lie in chunks of 64 rows x 128 inputs with their scales (`int4_chunks.py`). Every warp owns a ring of
//   chunks in shared memory and fills it ahead by bulk copies; it runs on into the next piece of work, and over the
//   border between the two matrices, so that memory is never idle while sums are finished or others are waited for.
// - The eight warps of a block share the inputs of the same rows among them and add up at the end: no input is read
//   twice, none is kept in shared memory.
// - A word holds eight neighbours of a row, as in the checkpoint. `word >> 4p & 0x000F000F | 0x43004300` is the pair of
//   bf16 numbers 128 + u of its nibbles p and p + 4; a tensor core may sum the inputs in any order, so its pairs are
//   these. What 128 + u has too much (u = q + 8, so 136) is taken off the sum of a group beforehand: a product of the
//   inputs with -136, made once for all rows. The scale is multiplied onto the fp32 sum of a group.
// - Two such blocks of a processor hide each other's waits: with one, the same instructions took a sixth longer.
// - Down begins for an expert when its gate and up are done (a counter each). Blocks wait for work of others, so all of
//   them must run at once, and the launch is a cooperative one.
//
// A row's sums depend on its token and the weights alone: neither on the other tokens nor on the number of blocks.
// Shapes: N tokens, K choices, E experts, D hidden, I width of an expert. Tiles of the tensor core: 16 rows of weights x
// 16 inputs, times 16 inputs x 8 tokens. In a tile, lane = 4·(row mod 8) + quarter.

#include <cstdint>
#ifndef MOONBASE_ON_CPU  // a test runs this file without a GPU
#include <cuda_runtime.h>
#endif

namespace {

constexpr int WARPS = 8, BLOCKS = 2;  // of a block, and of a processor
constexpr int STAGES = 2;            // chunks in a warp's ring
constexpr int TILES = 8;             // of 16 rows: what a warp has sums for
constexpr int GROUP = 32;            // inputs that share a scale
constexpr int CHUNK_ROWS = 64;       // four tiles
constexpr int CHUNK_INPUTS = 128;    // four groups
constexpr int CHUNK_BYTES = CHUNK_ROWS * CHUNK_INPUTS / 2 + CHUNK_ROWS * CHUNK_INPUTS / GROUP * 2;
constexpr int SCALES = CHUNK_ROWS * CHUNK_INPUTS / 2;  // where a chunk's scales begin
constexpr int MOST_CHOICES = 2048;
constexpr int MOST_EXPERTS = 512;

struct Arguments {
  const uint16_t* x;          // bf16 [N, D]
  const void* indices;        // int32 or int64 [N, K]
  const float* weights;       // [N, K]
  const uint8_t* gate_up;     // chunks [E, 2I / 64, D / 128]; of a tile's rows eight are gate's, eight the same of up
  const uint8_t* down;        // chunks [E, D / 64, I / 128]
  uint16_t* activation;       // bf16 [N·K, I]
  float* out;                 // [N·K, D]
  unsigned* progress;         // [E + 1], zero before and after
  int64_t x_row;              // elements from a token to the next
  int tokens, choices, experts, hidden, width, wide_indices;
};

// What every block finds out for itself about the call.
struct Lists {
  int counts[MOST_EXPERTS];
  int offsets[MOST_EXPERTS];   // where an expert's choices begin in `order`
  int ends[MOST_EXPERTS];      // and where they end
  int16_t hits[MOST_EXPERTS];  // experts that somebody chose
  int16_t order[MOST_CHOICES];
  int num_hits, of_warps[WARPS];
  bool is_last_block;
};
static_assert(MOST_EXPERTS <= 2 * WARPS * 32, "two experts a thread");

struct Shared {
  uint8_t ring[WARPS][STAGES][CHUNK_BYTES];
  uint64_t full[WARPS][STAGES];
  float4 sums[WARPS / 2][TILES * 32];  // of a piece
  Lists lists;
};
static_assert(BLOCKS * (sizeof(Shared) + 1024) <= 233472, "what a processor of compute capability 9.0 has");

// --- what the chip does ----------------------------------------------------------------------------------------------
#ifndef MOONBASE_ON_CPU

__device__ __forceinline__ unsigned address_of(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(barrier)) : "memory");
}

__device__ __forceinline__ void barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Start a copy of `bytes` (a multiple of 16) whose end completes the barrier's phase. What is read for the last time
// leaves the second cache first.
__device__ __forceinline__ void copy_start(void* to, const void* from, unsigned bytes, uint64_t* barrier, bool again) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
               : "memory");
  uint64_t policy;
  if (again) asm("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
  else asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          address_of(to)), "l"(from), "r"(bytes), "r"(address_of(barrier)), "l"(policy) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
      " @!done bra again; }" ::"r"(address_of(barrier)), "r"(parity) : "memory");
}

// (word & mask) | bits, in one instruction.
__device__ __forceinline__ unsigned and_or(unsigned word, unsigned mask, unsigned bits) {
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

// sums[row, token] = products + start, over 16 inputs.
__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&rows)[4], unsigned tokens_low,
                                         unsigned tokens_high, const float (&start)[4]) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
      " {%10, %11, %12, %13};"
      : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(tokens_low), "r"(tokens_high), "f"(start[0]),
        "f"(start[1]), "f"(start[2]), "f"(start[3]));
}

__device__ __forceinline__ unsigned acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

__device__ __forceinline__ uint16_t to_bf16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) uint8_t name[]

#endif  // MOONBASE_ON_CPU
// ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ __forceinline__ float4 plus(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 four(const float (&x)[4]) { return make_float4(x[0], x[1], x[2], x[3]); }

// A piece of work: the rows of some tiles, for all tokens of one expert. All gate-and-up pieces come before down's.
// Blocks take them in turns; where the next one lies follows from this one, without dividing.
struct Steps {
  int up_blocks, down_blocks;                          // pieces of an expert
  int up_experts, up_rest, down_experts, down_rest;    // what as many pieces as there are blocks amount to

  __host__ __device__ Steps(const Arguments& a, int blocks) {
    up_blocks = 2 * a.width / (16 * TILES), down_blocks = a.hidden / (16 * TILES);
    up_experts = blocks / up_blocks, up_rest = blocks % up_blocks;
    down_experts = blocks / down_blocks, down_rest = blocks % down_blocks;
  }
};

struct Piece {
  int number, hit, block;  // hit: which of the experts that somebody chose; block: which rows
  bool is_down;

  __device__ Piece(const Steps& steps, const Lists& lists, int number) : number(number) {
    hit = number / steps.up_blocks, block = number % steps.up_blocks, is_down = false;
    cross(steps, lists);
  }

  __device__ void cross(const Steps& steps, const Lists& lists) {
    const int within = number - lists.num_hits * steps.up_blocks;
    if (is_down || within < 0) return;
    hit = within / steps.down_blocks, block = within % steps.down_blocks, is_down = true;
  }

  __device__ void advance(const Steps& steps, const Lists& lists) {
    number += gridDim.x;
    hit += is_down ? steps.down_experts : steps.up_experts;
    block += is_down ? steps.down_rest : steps.up_rest;
    const int blocks = is_down ? steps.down_blocks : steps.up_blocks;
    if (block >= blocks) block -= blocks, ++hit;
    cross(steps, lists);
  }

  __device__ bool there(const Steps& steps, const Lists& lists) const {
    return number < lists.num_hits * (steps.up_blocks + steps.down_blocks);
  }
};

__device__ __forceinline__ int chunks_of(const Arguments& a, const Piece& piece) {
  return (piece.is_down ? a.width : a.hidden) / CHUNK_INPUTS;
}

// The chunks that a warp reads, in order: pieces of its block, passes over their tokens, its share of the inputs, both
// halves of the rows.
struct Reader {
  const Arguments& a;
  const Steps& steps;
  const Lists& lists;
  const int warp;
  Piece piece;
  int left, passes, half;  // columns of chunks left; passes left
  const uint8_t* next;

  __device__ Reader(const Arguments& a, const Steps& steps, const Lists& lists, int warp)
      : a(a), steps(steps), lists(lists), warp(warp), piece(steps, lists, blockIdx.x) { begin(); }

  __device__ void begin() {
    for (; there(); piece.advance(steps, lists)) {
      passes = (lists.counts[lists.hits[piece.hit]] + 7) / 8;
      rewind();
      if (left > 0) return;  // else narrow matrices: nothing for this warp
    }
  }

  __device__ void rewind() {
    const int chunks = chunks_of(a, piece), first = warp * chunks / WARPS;
    const int rows = (piece.is_down ? steps.down_blocks : steps.up_blocks) * 2;  // of an expert, in chunks
    const int64_t row = static_cast<int64_t>(lists.hits[piece.hit]) * rows + piece.block * 2;
    next = (piece.is_down ? a.down : a.gate_up) + (row * chunks + first) * CHUNK_BYTES;
    left = (warp + 1) * chunks / WARPS - first;
    half = 0;
  }

  __device__ bool there() const { return piece.there(steps, lists); }

  __device__ void advance() {
    const int row = chunks_of(a, piece) * CHUNK_BYTES;
    half ^= 1;
    next += half ? row : CHUNK_BYTES - row;
    if (half || --left > 0) return;
    if (--passes > 0) return rewind();
    piece.advance(steps, lists);
    begin();
  }
};

__device__ __forceinline__ int expert_of(const Arguments& a, int choice) {
  return a.wide_indices ? static_cast<int>(static_cast<const int64_t*>(a.indices)[choice])
                        : static_cast<const int32_t*>(a.indices)[choice];
}

// Choices that one warp has room for: the other warps wait for it once. What nobody chose is left as it was.
__device__ void group_few_choices(const Arguments& a, Lists& lists) {
  const int num_choices = a.tokens * a.choices, lane = threadIdx.x;
  if (lane < 32) {
    const int expert = lane < num_choices ? expert_of(a, lane) : -1;
    int count = 0, first = lane, before = 0;  // choices of the expert; the first of them; those of them before this one
    for (int other = 31; other >= 0; --other) {
      if (__shfl_sync(0xFFFFFFFFu, expert, other) != expert) continue;
      ++count, first = other;
      if (other < lane) ++before;
    }
    const int own = expert >= 0 && first == lane ? count : 0;
    int hits = 0, hit = 0, offset = 0;
    for (int other = 0; other < 32; ++other) {
      const int more = __shfl_sync(0xFFFFFFFFu, own, other);
      hits += more > 0;
      if (other < first) hit += more > 0, offset += more;
    }
    if (own > 0) lists.hits[hit] = expert, lists.counts[expert] = count, lists.offsets[expert] = offset;
    if (expert >= 0) lists.order[offset + before] = lane;
    if (lane == 0) lists.num_hits = hits;
  }
  __syncthreads();
}

// Every block for itself: how many choices each expert has, and which. Their order among themselves is of no account.
__device__ void group_choices(const Arguments& a, Lists& lists) {
  const int num_choices = a.tokens * a.choices, thread = threadIdx.x, threads = blockDim.x;
  if (num_choices <= 32) return group_few_choices(a, lists);
  for (int expert = thread; expert < a.experts; expert += threads) lists.counts[expert] = 0;
  __syncthreads();
  for (int choice = thread; choice < num_choices; choice += threads) atomicAdd(&lists.counts[expert_of(a, choice)], 1);
  __syncthreads();
  // Two experts a thread; choices in the lower half of a word, experts that somebody chose in the upper.
  const int first = 2 * thread, lane = thread % 32;
  const int count[2] = {first < a.experts ? lists.counts[first] : 0, first + 1 < a.experts ? lists.counts[first + 1] : 0};
  const int own = count[0] + count[1] + ((count[0] > 0) + (count[1] > 0) << 16);
  int up_to = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFu, up_to, distance);
    if (lane >= distance) up_to += other;
  }
  if (lane == 31) lists.of_warps[thread / 32] = up_to;
  __syncthreads();
  int before = up_to - own;
  for (int warp = 0; warp < thread / 32; ++warp) before += lists.of_warps[warp];
  for (int which = 0; which < 2 && first + which < a.experts; ++which) {
    lists.offsets[first + which] = lists.ends[first + which] = before & 0xFFFF;
    if (count[which] > 0) lists.hits[before >> 16] = first + which;
    before += count[which] + ((count[which] > 0) << 16);
  }
  if (thread == threads - 1) lists.num_hits = before >> 16;
  __syncthreads();
  for (int choice = thread; choice < num_choices; choice += threads)
    lists.order[atomicAdd(&lists.ends[expert_of(a, choice)], 1)] = choice;
  __syncthreads();
}

// The inputs of one chunk: pairs of a token's inputs as the tensor core wants them beside the words' pairs, and what
// every row's sum of a group starts from.
struct Inputs {
  unsigned pairs[4][4];  // group, pair p: inputs 8·quarter + p and 8·quarter + p + 4
  float starts[4][2];

  __device__ __forceinline__ void read(const uint16_t* row, int chunk, bool written_here) {
    const int quarter = threadIdx.x % 4;
    const unsigned minus_136[4] = {0xC308C308u, 0xC308C308u, 0xC308C308u, 0xC308C308u};
    const float zero[4] = {0, 0, 0, 0};
    uint4 words[4];
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      const uint4* from = reinterpret_cast<const uint4*>(row + chunk * CHUNK_INPUTS + group * GROUP + quarter * 8);
      // Activations were written by other blocks of this launch: past the first cache.
      words[group] = written_here ? __ldcg(from) : __ldg(from);
    }
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      unsigned (&p)[4] = pairs[group];
      p[0] = __byte_perm(words[group].x, words[group].z, 0x5410);
      p[1] = __byte_perm(words[group].x, words[group].z, 0x7632);
      p[2] = __byte_perm(words[group].y, words[group].w, 0x5410);
      p[3] = __byte_perm(words[group].y, words[group].w, 0x7632);
      float sums[4], both[4];
      multiply(sums, minus_136, p[0], p[1], zero);
      multiply(both, minus_136, p[2], p[3], sums);
      starts[group][0] = both[0];
      starts[group][1] = both[1];
    }
  }
};

// totals += one tile of weights, 16 rows x 128 inputs, times the inputs.
__device__ __forceinline__ void multiply_tile(float (&totals)[4], const uint8_t* chunk, int tile,
                                              const Inputs& inputs) {
  const int lane = threadIdx.x % 32;
  const uint4 upper = reinterpret_cast<const uint4*>(chunk + tile * 1024)[lane];
  const uint4 lower = reinterpret_cast<const uint4*>(chunk + tile * 1024 + 512)[lane];
  const uint4 scales = reinterpret_cast<const uint4*>(chunk + SCALES + tile * 128)[lane / 4];
  const unsigned upper_words[4] = {upper.x, upper.y, upper.z, upper.w};
  const unsigned lower_words[4] = {lower.x, lower.y, lower.z, lower.w};
  const float upper_scales[4] = {low_half(scales.x), high_half(scales.x), low_half(scales.y), high_half(scales.y)};
  const float lower_scales[4] = {low_half(scales.z), high_half(scales.z), low_half(scales.w), high_half(scales.w)};
#pragma unroll
  for (int group = 0; group < 4; ++group) {
    unsigned rows[2][4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      rows[pair / 2][pair % 2 * 2] = and_or(upper_words[group] >> (4 * pair), 0x000F000Fu, 0x43004300u);
      rows[pair / 2][pair % 2 * 2 + 1] = and_or(lower_words[group] >> (4 * pair), 0x000F000Fu, 0x43004300u);
    }
    const float (&start)[2] = inputs.starts[group];
    const float begin[4] = {start[0], start[1], start[0], start[1]};
    float sums[4], both[4];
    multiply(sums, rows[0], inputs.pairs[group][0], inputs.pairs[group][1], begin);
    multiply(both, rows[1], inputs.pairs[group][2], inputs.pairs[group][3], sums);
    totals[0] += upper_scales[group] * both[0];
    totals[1] += upper_scales[group] * both[1];
    totals[2] += lower_scales[group] * both[2];
    totals[3] += lower_scales[group] * both[3];
  }
}

// Add up what the warps have of a piece, and write it: activations of gate and up, or rows of the output.
__device__ void finish(const Arguments& a, const Shared& shared, const Piece& piece, int expert, int first) {
  const Lists& lists = shared.lists;
  const int count = lists.counts[expert];
  for (int slot = threadIdx.x; slot < TILES * 32; slot += WARPS * 32) {
    float4 total = shared.sums[0][slot];
#pragma unroll
    for (int warp = 1; warp < WARPS / 2; ++warp) total = plus(total, shared.sums[warp][slot]);
    const int lane = slot % 32, tile = slot / 32;
    const float upper[2] = {total.x, total.y}, lower[2] = {total.z, total.w};
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int token = first + lane % 4 * 2 + which;
      if (token >= count) continue;
      const int64_t choice = lists.order[lists.offsets[expert] + token];
      if (piece.is_down) {
        const float weight = a.weights[choice];
        float* to = a.out + choice * a.hidden + piece.block * (16 * TILES) + tile * 16 + lane / 4;
        to[0] = weight * upper[which];
        to[8] = weight * lower[which];
      } else {
        const float gate = upper[which], silu = gate / (1.0f + __expf(-gate));
        a.activation[choice * a.width + piece.block * (8 * TILES) + tile * 8 + lane / 4] =
            to_bf16(silu * lower[which]);
      }
    }
  }
}

__global__ void __launch_bounds__(WARPS * 32, BLOCKS) experts_int4(const Arguments a, const Steps steps) {
  DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Lists& lists = shared.lists;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) {
    for (int stage = 0; stage < STAGES; ++stage) barrier_init(&shared.full[warp][stage]);
    barriers_visible();
  }
  group_choices(a, shared.lists);

  Reader ahead(a, steps, lists, warp);
  const auto fetch = [&](int stage) {
    if (!ahead.there()) return;
    if (lane == 0)
      copy_start(shared.ring[warp][stage], ahead.next, CHUNK_BYTES, &shared.full[warp][stage], ahead.passes > 1);
    ahead.advance();
  };
  for (int stage = 0; stage < STAGES; ++stage) fetch(stage);

  int stage = 0;
  unsigned parity = 0;
  for (Piece piece(steps, lists, blockIdx.x); piece.there(steps, lists); piece.advance(steps, lists)) {
    const int expert = lists.hits[piece.hit], count = lists.counts[expert], chunks = chunks_of(a, piece);
    const int first_chunk = warp * chunks / WARPS, stop = (warp + 1) * chunks / WARPS;
    if (piece.is_down) {
      if (lane == 0)
        while (acquire(&a.progress[expert]) < static_cast<unsigned>(steps.up_blocks)) __nanosleep(20);
      __syncwarp();
    }
    for (int first = 0; first < count; first += 8) {
      // Columns that no token has repeat the last one's; nobody reads their sums.
      const int64_t choice = lists.order[lists.offsets[expert] + min(first + lane / 4, count - 1)];
      const uint16_t* row = piece.is_down ? a.activation + choice * a.width : a.x + choice / a.choices * a.x_row;
      float totals[TILES][4] = {};
      for (int chunk = first_chunk; chunk < stop; ++chunk) {
        Inputs inputs;
        inputs.read(row, chunk, piece.is_down);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          barrier_wait(&shared.full[warp][stage], parity);
#pragma unroll
          for (int tile = 0; tile < 4; ++tile)
            multiply_tile(totals[half * 4 + tile], shared.ring[warp][stage], tile, inputs);
          __syncwarp();
          fetch(stage);
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
      }
      // Half of the warps leave their sums, the other half add theirs; that takes half the room, and fewer reads.
      float4* const sums = shared.sums[warp % (WARPS / 2)] + lane;
      __syncthreads();  // the sums of the piece before have been read
      if (warp < WARPS / 2) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) sums[tile * 32] = four(totals[tile]);
      }
      __syncthreads();
      if (warp >= WARPS / 2) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) sums[tile * 32] = plus(sums[tile * 32], four(totals[tile]));
      }
      __syncthreads();
      finish(a, shared, piece, expert, first);
    }
    if (!piece.is_down) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) atomicAdd(&a.progress[expert], 1u);
    }
  }
  // The last block to end leaves the counters as it found them.
  if (threadIdx.x == 0) {
    __threadfence();
    shared.lists.is_last_block = atomicAdd(&a.progress[a.experts], 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (lists.is_last_block)
    for (int expert = threadIdx.x; expert <= a.experts; expert += WARPS * 32) a.progress[expert] = 0;
}

}  // namespace

// Returns CUDA's error code. `about`: Arguments; a type that no other file knows would hide this function from them.
extern "C" int moonbase_experts_int4(const void* about, int processors, void* stream) {
  const Arguments arguments = *static_cast<const Arguments*>(about);
  const int blocks = processors * BLOCKS;
  const Steps steps(arguments, blocks);
#ifdef MOONBASE_ON_CPU
  return run_on_cpu([=] { experts_int4(arguments, steps); }, blocks, WARPS * 32, sizeof(Shared));
#else
  const void* kernel = reinterpret_cast<const void*>(experts_int4);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  void* pointers[] = {const_cast<Arguments*>(&arguments), const_cast<Steps*>(&steps)};
  if (error == cudaSuccess)
    error = cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(WARPS * 32), pointers, sizeof(Shared),
                                        static_cast<cudaStream_t>(stream));
  return static_cast<int>(error);
#endif
}
