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
// - Down begins for an expert when its gate and up are done (a counter each). Blocks wait for work of others, so all of
//   them must run at once: one a processor, launched cooperatively.
//
// A row's sums depend on its token and the weights alone: neither on the other tokens nor on the number of blocks.
// Shapes: N tokens, K choices, E experts, D hidden, I width of an expert. Tiles of the tensor core: 16 rows of weights x
// 16 inputs, times 16 inputs x 8 tokens. In a tile, lane = 4·(row mod 8) + quarter.

#include <cstdint>
#ifndef MOONBASE_ON_CPU  // a test runs this file without a GPU
#include <cuda_runtime.h>
#endif

namespace {

constexpr int WARPS = 8;
constexpr int STAGES = 4;            // chunks in a warp's ring
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

struct Shared {
  uint8_t ring[WARPS][STAGES][CHUNK_BYTES];
  uint64_t full[WARPS][STAGES];
  int counts[MOST_EXPERTS];
  int offsets[MOST_EXPERTS];   // where an expert's choices begin in `order`
  int16_t hits[MOST_EXPERTS];  // experts that somebody chose
  int16_t order[MOST_CHOICES];
  int num_hits;
  // Then float4 sums[WARPS][tiles][token tiles][32].
};

// --- what the chip does ----------------------------------------------------------------------------------------------
#ifndef MOONBASE_ON_CPU

__device__ __forceinline__ unsigned address_of(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(barrier)) : "memory");
}

__device__ __forceinline__ void barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Start a copy of `bytes` (a multiple of 16) whose end completes the barrier's phase. The weights are read once.
__device__ __forceinline__ void copy_start(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
               : "memory");
  asm volatile(
      "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy;"
      " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy; }"
      ::"r"(address_of(to)), "l"(from), "r"(bytes), "r"(address_of(barrier)) : "memory");
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

// A piece of work: the rows of some tiles, for all tokens of one expert. All gate-and-up pieces come before down's.
struct Piece {
  bool is_down;
  int expert, block, count;  // block: which rows; count: choices of this expert
};

template <int TILES>
struct Plan {
  const Arguments& a;
  const Shared& shared;
  int up_blocks, down_blocks, num_up, total;

  __device__ Plan(const Arguments& a, const Shared& shared) : a(a), shared(shared) {
    up_blocks = 2 * a.width / (16 * TILES);
    down_blocks = a.hidden / (16 * TILES);
    num_up = shared.num_hits * up_blocks;
    total = num_up + shared.num_hits * down_blocks;
  }

  __device__ Piece piece(int number) const {
    Piece piece;
    piece.is_down = number >= num_up;
    const int within = piece.is_down ? number - num_up : number;
    const int blocks = piece.is_down ? down_blocks : up_blocks;
    piece.expert = shared.hits[within / blocks];
    piece.block = within % blocks;
    piece.count = shared.counts[piece.expert];
    return piece;
  }

  __device__ int inputs_chunks(bool is_down) const { return (is_down ? a.width : a.hidden) / CHUNK_INPUTS; }

  __device__ const uint8_t* chunk(const Piece& piece, int half, int inputs) const {
    const int64_t rows = (piece.is_down ? a.hidden : 2 * a.width) / CHUNK_ROWS, depth = inputs_chunks(piece.is_down);
    const int64_t row = piece.expert * rows + piece.block * (TILES / 4) + half;
    return (piece.is_down ? a.down : a.gate_up) + (row * depth + inputs) * CHUNK_BYTES;
  }
};

// The chunks that a warp reads, in order: pieces of its block, passes over their tokens, its share of the inputs, halves.
template <int TILES, int TOKENS>
struct Reader {
  const Plan<TILES>& plan;
  const int warp;
  int number, first, inputs, stop, half;
  Piece piece;

  __device__ Reader(const Plan<TILES>& plan, int warp) : plan(plan), warp(warp), number(blockIdx.x) { begin(); }

  __device__ void begin() {
    first = half = 0;
    inputs = stop = 0;
    while (number < plan.total) {
      piece = plan.piece(number);
      share();
      if (inputs < stop) return;
      number += gridDim.x;  // narrow matrices: nothing for this warp
    }
  }

  __device__ void share() {
    const int chunks = plan.inputs_chunks(piece.is_down);
    inputs = warp * chunks / WARPS;
    stop = (warp + 1) * chunks / WARPS;
  }

  __device__ bool done() const { return number >= plan.total; }
  __device__ const uint8_t* where() const { return plan.chunk(piece, half, inputs); }

  __device__ void advance() {
    if (++half < TILES / 4) return;
    half = 0;
    if (++inputs < stop) return;
    first += TOKENS;
    share();
    if (first < piece.count) return;
    number += gridDim.x;
    begin();
  }
};

// Every block for itself: how many choices each expert has, and which. Their order among themselves is of no account.
__device__ void group_choices(const Arguments& a, Shared& shared) {
  const int num_choices = a.tokens * a.choices, thread = threadIdx.x, threads = blockDim.x;
  for (int expert = thread; expert < a.experts; expert += threads) shared.counts[expert] = 0;
  __syncthreads();
  const auto expert_of = [&](int choice) {
    return a.wide_indices ? static_cast<int>(static_cast<const int64_t*>(a.indices)[choice])
                          : static_cast<const int32_t*>(a.indices)[choice];
  };
  for (int choice = thread; choice < num_choices; choice += threads) atomicAdd(&shared.counts[expert_of(choice)], 1);
  __syncthreads();
  if (thread < 32) {
    int choices_before = 0, hits_before = 0;
    for (int base = 0; base < a.experts; base += 32) {
      const int expert = base + thread, count = expert < a.experts ? shared.counts[expert] : 0;
      int up_to = count;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, up_to, distance);
        if (thread >= distance) up_to += other;
      }
      const unsigned hit = __ballot_sync(0xFFFFFFFFu, count > 0);
      if (expert < a.experts) shared.offsets[expert] = choices_before + up_to - count;
      if (count > 0) shared.hits[hits_before + __popc(hit & ((1u << thread) - 1))] = expert;
      hits_before += __popc(hit);
      choices_before += __shfl_sync(0xFFFFFFFFu, up_to, 31);
    }
    if (thread == 0) shared.num_hits = hits_before;
  }
  __syncthreads();
  // Offsets run to the end of each expert's part while it is filled, and are set back.
  for (int choice = thread; choice < num_choices; choice += threads)
    shared.order[atomicAdd(&shared.offsets[expert_of(choice)], 1)] = choice;
  __syncthreads();
  for (int expert = thread; expert < a.experts; expert += threads) shared.offsets[expert] -= shared.counts[expert];
  __syncthreads();
}

// The inputs of one chunk: pairs of a token's inputs as the tensor core wants them beside the words' pairs, and what
// every row's sum of a group starts from.
template <int TOKEN_TILES>
struct Inputs {
  unsigned pairs[TOKEN_TILES][4][4];  // group, pair p: inputs 8·quarter + p and 8·quarter + p + 4
  float starts[TOKEN_TILES][4][2];

  __device__ void read(const uint16_t* const (&rows)[TOKEN_TILES], int chunk, int active, bool written_here) {
    const int quarter = threadIdx.x % 4;
    const unsigned minus_136[4] = {0xC308C308u, 0xC308C308u, 0xC308C308u, 0xC308C308u};
    const float zero[4] = {0, 0, 0, 0};
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
      if (tile > 0 && tile >= active) break;
      uint4 words[4];
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        words[group] = make_uint4(0, 0, 0, 0);
        if (rows[tile] != nullptr) {
          const uint4* from = reinterpret_cast<const uint4*>(
              rows[tile] + chunk * CHUNK_INPUTS + group * GROUP + quarter * 8);
          // Activations were written by other blocks of this launch: past the first cache.
          words[group] = written_here ? __ldcg(from) : __ldg(from);
        }
      }
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        unsigned (&p)[4] = pairs[tile][group];
        p[0] = __byte_perm(words[group].x, words[group].z, 0x5410);
        p[1] = __byte_perm(words[group].x, words[group].z, 0x7632);
        p[2] = __byte_perm(words[group].y, words[group].w, 0x5410);
        p[3] = __byte_perm(words[group].y, words[group].w, 0x7632);
        float sums[4], both[4];
        multiply(sums, minus_136, p[0], p[1], zero);
        multiply(both, minus_136, p[2], p[3], sums);
        starts[tile][group][0] = both[0];
        starts[tile][group][1] = both[1];
      }
    }
  }
};

// totals[token tile] += one tile of weights, 16 rows x 128 inputs, times the inputs.
template <int TOKEN_TILES>
__device__ __forceinline__ void multiply_tile(float (&totals)[TOKEN_TILES][4], const uint8_t* chunk, int tile,
                                              const Inputs<TOKEN_TILES>& inputs, int active) {
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
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
      if (n > 0 && n >= active) break;
      const float (&start)[2] = inputs.starts[n][group];
      const float begin[4] = {start[0], start[1], start[0], start[1]};
      float sums[4], both[4];
      multiply(sums, rows[0], inputs.pairs[n][group][0], inputs.pairs[n][group][1], begin);
      multiply(both, rows[1], inputs.pairs[n][group][2], inputs.pairs[n][group][3], sums);
      totals[n][0] += upper_scales[group] * both[0];
      totals[n][1] += upper_scales[group] * both[1];
      totals[n][2] += lower_scales[group] * both[2];
      totals[n][3] += lower_scales[group] * both[3];
    }
  }
}

// Add up what the warps have of a piece, and write it: activations of gate and up, or rows of the output.
template <int TILES, int TOKEN_TILES>
__device__ void finish(const Arguments& a, const Shared& shared, const float4* sums, const Piece& piece, int first) {
  constexpr int SLOTS = TILES * TOKEN_TILES * 32;
  for (int slot = threadIdx.x; slot < SLOTS; slot += WARPS * 32) {
    float4 total = sums[slot];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) {
      const float4 more = sums[warp * SLOTS + slot];
      total = make_float4(total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w);
    }
    const int lane = slot % 32, token_tile = slot / 32 % TOKEN_TILES, tile = slot / 32 / TOKEN_TILES;
    const float upper[2] = {total.x, total.y}, lower[2] = {total.z, total.w};
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int token = first + token_tile * 8 + lane % 4 * 2 + which;
      if (token >= piece.count) continue;
      const int64_t choice = shared.order[shared.offsets[piece.expert] + token];
      if (piece.is_down) {
        const float weight = a.weights[choice];
        float* to = a.out + choice * a.hidden + piece.block * (16 * TILES) + tile * 16 + lane / 4;
        to[0] = weight * upper[which];
        to[8] = weight * lower[which];
      } else {
        const float gate = upper[which], silu = gate / (1.0f + __expf(-gate));
        a.activation[choice * a.width + piece.block * (8 * TILES) + tile * 8 + lane / 4] = to_bf16(silu * lower[which]);
      }
    }
  }
}

template <int TILES, int TOKEN_TILES>
__global__ void __launch_bounds__(WARPS * 32, 1) experts_int4(const Arguments a) {
  DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  float4* sums = reinterpret_cast<float4*>(memory + (sizeof(Shared) + 15) / 16 * 16);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) {
    for (int stage = 0; stage < STAGES; ++stage) barrier_init(&shared.full[warp][stage]);
    barriers_visible();
  }
  group_choices(a, shared);

  const Plan<TILES> plan(a, shared);
  Reader<TILES, TOKEN_TILES * 8> ahead(plan, warp);
  const auto fetch = [&](int stage) {
    if (ahead.done()) return;
    if (lane == 0) copy_start(shared.ring[warp][stage], ahead.where(), CHUNK_BYTES, &shared.full[warp][stage]);
    ahead.advance();
  };
  for (int stage = 0; stage < STAGES; ++stage) fetch(stage);

  int stage = 0;
  unsigned parity = 0;
  for (int number = blockIdx.x; number < plan.total; number += gridDim.x) {
    const Piece piece = plan.piece(number);
    const int chunks = plan.inputs_chunks(piece.is_down);
    if (piece.is_down) {
      if (lane == 0)
        while (acquire(&a.progress[piece.expert]) < static_cast<unsigned>(plan.up_blocks)) __nanosleep(20);
      __syncwarp();
    }
    for (int first = 0; first < piece.count; first += TOKEN_TILES * 8) {
      const int active = min(TOKEN_TILES, (piece.count - first + 7) / 8);
      const uint16_t* rows[TOKEN_TILES];
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n) {
        const int token = first + n * 8 + lane / 4;
        rows[n] = nullptr;
        if (token < piece.count) {
          const int64_t choice = shared.order[shared.offsets[piece.expert] + token];
          rows[n] = piece.is_down ? a.activation + choice * a.width : a.x + choice / a.choices * a.x_row;
        }
      }
      float totals[TILES][TOKEN_TILES][4] = {};
      const int stop = (warp + 1) * chunks / WARPS;
      for (int chunk = warp * chunks / WARPS; chunk < stop; ++chunk) {
        Inputs<TOKEN_TILES> inputs;
        inputs.read(rows, chunk, active, piece.is_down);
#pragma unroll
        for (int half = 0; half < TILES / 4; ++half) {
          barrier_wait(&shared.full[warp][stage], parity);
#pragma unroll
          for (int tile = 0; tile < 4; ++tile)
            multiply_tile(totals[half * 4 + tile], shared.ring[warp][stage], tile, inputs, active);
          __syncwarp();
          fetch(stage);
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
      }
      __syncthreads();  // the sums of the piece before have been read
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
          const float (&total)[4] = totals[tile][n];
          sums[((warp * TILES + tile) * TOKEN_TILES + n) * 32 + lane] =
              make_float4(total[0], total[1], total[2], total[3]);
        }
      __syncthreads();
      finish<TILES, TOKEN_TILES>(a, shared, sums, piece, first);
    }
    if (!piece.is_down) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) atomicAdd(&a.progress[piece.expert], 1u);
    }
  }
  // The last block to end leaves the counters as it found them.
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(&a.progress[a.experts], 1u) == gridDim.x - 1)
      for (int expert = 0; expert <= a.experts; ++expert) a.progress[expert] = 0;
  }
}

template <int TILES, int TOKEN_TILES>
int launch(const Arguments* arguments, int blocks, void* stream) {
  constexpr int BYTES = (sizeof(Shared) + 15) / 16 * 16 + WARPS * TILES * TOKEN_TILES * 32 * 16;
#ifdef MOONBASE_ON_CPU
  return run_on_cpu([=] { experts_int4<TILES, TOKEN_TILES>(*arguments); }, blocks, WARPS * 32, BYTES);
#else
  const void* kernel = reinterpret_cast<const void*>(experts_int4<TILES, TOKEN_TILES>);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  void* pointers[] = {const_cast<Arguments*>(arguments)};
  if (error == cudaSuccess)
    error = cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(WARPS * 32), pointers, BYTES,
                                        static_cast<cudaStream_t>(stream));
  return static_cast<int>(error);
#endif
}

}  // namespace

// Returns CUDA's error code. `blocks`: at most one a processor; `token_tiles`: tokens of an expert at once, in eights.
// `about`: Arguments; a type that no other file knows would hide this function from them.
extern "C" int moonbase_experts_int4(const void* about, int token_tiles, int blocks, void* stream) {
  const Arguments* arguments = static_cast<const Arguments*>(about);
  switch (token_tiles) {
    case 1: return launch<8, 1>(arguments, blocks, stream);
    case 2: return launch<8, 2>(arguments, blocks, stream);
    default: return -1;
  }
}
