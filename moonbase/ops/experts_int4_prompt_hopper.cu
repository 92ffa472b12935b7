// Routed experts with INT4 weights for prompts, where an expert has so many tokens that the tensor cores are the limit.
//
// - Weights are the tensor core's left operand and come from registers: a lane's words of a chunk (`int4_chunks.py`)
//   are its part of 64 rows x 16 inputs, eight times. They become q·s, rounded to bf16 as in a multiplied-out
//   checkpoint, while the products before are under way. Tokens are the right operand and come from shared memory, as many at once
//   as the expert has, in eights: hardly any product is in vain.
// - A block makes tiles of 256 rows and up to 120 tokens of one expert, one tile after the other. One thread fills a
//   ring of stages by bulk copies, ahead over the end of a tile; two times four warps multiply, two chunks of rows each.
// - Tokens lie in memory as in shared memory, so that a stage's are two copies: sorted by expert, lines of 64 inputs,
//   swizzled, and the inputs in the order in which a word gives its nibbles. One kernel brings x into that order, gate
//   and up write their activations in it.
// - Results leave through shared memory by bulk copies, while the next tile is multiplied. Rows of choices are rounded
//   to bf16; a last kernel adds up a token's choices, in their order, in fp32.
//
// A row's sums depend on its token and the weights alone. Nothing is read back by the host.
// Shapes: N tokens, K choices, E experts, D hidden, I width of an expert; R grouped rows: every expert's choices begin
// at a multiple of eight. In a warp's 16 rows, lane = 4·(row mod 8) + quarter.

#include <cstdint>
#ifndef MOONBASE_ON_CPU  // a test runs this file without a GPU
#include <cuda_runtime.h>
#endif

namespace {

constexpr int CHUNK_INPUTS = 128;  // four groups that share a scale
constexpr int CHUNK_BYTES = 64 * CHUNK_INPUTS / 2 + 64 * CHUNK_INPUTS / 32 * 2;
constexpr int SCALES = 64 * CHUNK_INPUTS / 2;  // where a chunk's scales begin
constexpr int LINE = 128;                      // bytes of a token's 64 inputs
constexpr int TILE_CHUNKS = 4, TILE_ROWS = 64 * TILE_CHUNKS;
#ifndef MOST_EIGHTS  // a test has fewer
#define MOST_EIGHTS 15
#endif
constexpr int MOST_TOKENS = 8 * MOST_EIGHTS;   // of a tile: with more, fewer stages have room
constexpr int MOST_EXPERTS = 512;
constexpr int TOKEN_BYTES = MOST_TOKENS * CHUNK_INPUTS * 2;
constexpr int STAGE_BYTES = TOKEN_BYTES + TILE_CHUNKS * CHUNK_BYTES;
constexpr int STAGE_COPIES = 2 + TILE_CHUNKS;
constexpr int ROW_BYTES = TILE_ROWS / 2 * 2 + 16;  // a token's results of a group; 16 more, so that eight hit all banks
constexpr int MOST_SHARED = 232448;            // what a block of compute capability 9.0 may have
constexpr int THREADS = 384, WORKERS = 128;    // the first 128 copy
constexpr int COPY_REGISTERS = 40, WORK_REGISTERS = 232;
constexpr int GROUP_THREADS = 1024;

struct Tile { int expert, first, siblings, row, count; };  // first: the expert's first tile; siblings: how many it has

struct Arguments {
  const uint16_t* x;        // bf16 [N, D]
  const void* indices;      // int32 or int64 [N, K]
  const float* weights;     // [N, K]
  const uint8_t* gate_up;   // chunks [E, 2I / 64, D / 128]; of 16 rows eight are gate's, eight the same of up
  const uint8_t* down;      // chunks [E, D / 64, I / 128]
  uint8_t* inputs;          // lines [D / 64, R]
  uint8_t* activation;      // lines [I / 64, R]
  uint16_t* choice_rows;    // bf16 [N·K, D], may be the memory of `inputs`
  float* out;               // [N, D]
  Tile* tiles;
  int* num_tiles;
  int* row_of_choice;       // [N·K]
  int* choice_of_row;       // [R]
  float* weight_of_row;     // [R]
  int64_t x_row;            // elements from a token to the next
  int64_t rows;             // R, or more
  int tokens, choices, experts, hidden, width, wide_indices;
};

template <bool DOWN>
struct Shared {
  static constexpr int RESULT_BYTES = 2 * MOST_TOKENS * (DOWN ? ROW_BYTES : LINE);
  static constexpr int FIT = (MOST_SHARED - RESULT_BYTES - 2048) / STAGE_BYTES, STAGES = FIT < 4 ? FIT : 4;
  uint8_t stages[STAGES][STAGE_BYTES];
  uint8_t results[2][RESULT_BYTES / 2];
  float weights[2][128];
  uint64_t full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared<false>) <= MOST_SHARED && sizeof(Shared<true>) <= MOST_SHARED, "there is room for them");

// --- what the chip does ----------------------------------------------------------------------------------------------
#ifndef MOONBASE_ON_CPU

__device__ __forceinline__ unsigned address_of(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(count) : "memory");
}

// A phase ends with so many bulk copies, once their bytes have been announced.
__device__ __forceinline__ void barrier_init_copies(uint64_t* barrier, int) { barrier_init(barrier, 1); }

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

// For what bulk copies brought, which the tensor core sees without a fence.
__device__ __forceinline__ void copies_wait(uint64_t* barrier, unsigned parity) { barrier_wait(barrier, parity); }

__device__ __forceinline__ void copies_announce(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_in(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   address_of(to)), "l"(from), "r"(bytes), "r"(address_of(barrier)) : "memory");
}

// Weights make room for tokens.
__device__ __forceinline__ void copy_in_once(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  asm volatile(
      "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy;"
      " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy; }"
      ::"r"(address_of(to)), "l"(from), "r"(bytes), "r"(address_of(barrier)) : "memory");
}

__device__ __forceinline__ void copy_out(void* to, const void* from, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(address_of(from)),
               "r"(bytes) : "memory");
}
__device__ __forceinline__ void copies_out_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Shared memory has been read.
__device__ __forceinline__ void copies_out_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ __forceinline__ void store_operand(void* to, unsigned word) { *static_cast<unsigned*>(to) = word; }

// Lanes 8i … 8i + 7 name eight times 16 bytes, which take matrix i turned round: its columns ("stmatrix").
template <int COUNT>
__device__ __forceinline__ void store_turned(void* to, const unsigned (&matrices)[4]) {
  if (COUNT == 4)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address_of(to)),
                 "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3]) : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address_of(to)),
                 "r"(matrices[0]), "r"(matrices[1]) : "memory");
}

// Between ordinary writes to shared memory and bulk copies that read it.
__device__ __forceinline__ void operands_visible() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void group_meets(int group) {
  if (group == 0) asm volatile("bar.sync 1, 128;" ::: "memory");
  else asm volatile("bar.sync 2, 128;" ::: "memory");
}

// The same, but the compiler does not know, and cannot keep what follows from it in registers meanwhile.
__device__ __forceinline__ int unknown(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// (word & mask) | bits, in one instruction.
__device__ __forceinline__ unsigned and_or(unsigned word, unsigned mask, unsigned bits) {
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

__device__ __forceinline__ unsigned add_pairs(unsigned a, unsigned b) {
  unsigned sum;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

__device__ __forceinline__ unsigned multiply_pairs(unsigned a, unsigned b) {
  unsigned product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

__device__ __forceinline__ unsigned bf16_pair(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Before products, and after other uses of their registers; those of the left operand too ("wgmma.fence").
template <int COUNT>
__device__ __forceinline__ void sums_begin(unsigned (&rows)[COUNT][4]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i)  // nothing that makes them is moved below
    asm volatile("" : "+r"(rows[i][0]), "+r"(rows[i][1]), "+r"(rows[i][2]), "+r"(rows[i][3])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void sums_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void sums_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// sums += rows · tokens over 16 inputs: 64 rows x columns of tokens, K-major.
#define LIST_1 "%0, %1, %2, %3"
#define LIST_2 LIST_1 ", %4, %5, %6, %7"
#define LIST_3 LIST_2 ", %8, %9, %10, %11"
#define LIST_4 LIST_3 ", %12, %13, %14, %15"
#define LIST_5 LIST_4 ", %16, %17, %18, %19"
#define LIST_6 LIST_5 ", %20, %21, %22, %23"
#define LIST_7 LIST_6 ", %24, %25, %26, %27"
#define LIST_8 LIST_7 ", %28, %29, %30, %31"
#define LIST_9 LIST_8 ", %32, %33, %34, %35"
#define LIST_10 LIST_9 ", %36, %37, %38, %39"
#define LIST_11 LIST_10 ", %40, %41, %42, %43"
#define LIST_12 LIST_11 ", %44, %45, %46, %47"
#define LIST_13 LIST_12 ", %48, %49, %50, %51"
#define LIST_14 LIST_13 ", %52, %53, %54, %55"
#define LIST_15 LIST_14 ", %56, %57, %58, %59"
#define FOUR(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_1 FOUR(0)
#define SUMS_2 SUMS_1, FOUR(4)
#define SUMS_3 SUMS_2, FOUR(8)
#define SUMS_4 SUMS_3, FOUR(12)
#define SUMS_5 SUMS_4, FOUR(16)
#define SUMS_6 SUMS_5, FOUR(20)
#define SUMS_7 SUMS_6, FOUR(24)
#define SUMS_8 SUMS_7, FOUR(28)
#define SUMS_9 SUMS_8, FOUR(32)
#define SUMS_10 SUMS_9, FOUR(36)
#define SUMS_11 SUMS_10, FOUR(40)
#define SUMS_12 SUMS_11, FOUR(44)
#define SUMS_13 SUMS_12, FOUR(48)
#define SUMS_14 SUMS_13, FOUR(52)
#define SUMS_15 SUMS_14, FOUR(56)
#define PRODUCT(EIGHTS, COLUMNS, A0, A1, A2, A3, LOW, HIGH)                                                            \
  __device__ __forceinline__ void multiply_rows(float (&sums)[4 * EIGHTS], const unsigned (&rows)[4], unsigned low,    \
                                                unsigned high) {                                                       \
    asm volatile("{ .reg .b64 tokens; mov.b64 tokens, {%" #LOW ", %" #HIGH "};"                                        \
                 " wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" LIST_##EIGHTS "},"                \
                 " {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, tokens, 1, 1, 1, 0; }"                                    \
                 : SUMS_##EIGHTS                                                                                       \
                 : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(low), "r"(high));                       \
  }
PRODUCT(1, 8, 4, 5, 6, 7, 8, 9)
PRODUCT(2, 16, 8, 9, 10, 11, 12, 13)
PRODUCT(3, 24, 12, 13, 14, 15, 16, 17)
PRODUCT(4, 32, 16, 17, 18, 19, 20, 21)
PRODUCT(5, 40, 20, 21, 22, 23, 24, 25)
PRODUCT(6, 48, 24, 25, 26, 27, 28, 29)
PRODUCT(7, 56, 28, 29, 30, 31, 32, 33)
PRODUCT(8, 64, 32, 33, 34, 35, 36, 37)
PRODUCT(9, 72, 36, 37, 38, 39, 40, 41)
PRODUCT(10, 80, 40, 41, 42, 43, 44, 45)
PRODUCT(11, 88, 44, 45, 46, 47, 48, 49)
PRODUCT(12, 96, 48, 49, 50, 51, 52, 53)
PRODUCT(13, 104, 52, 53, 54, 55, 56, 57)
PRODUCT(14, 112, 56, 57, 58, 59, 60, 61)
PRODUCT(15, 120, 60, 61, 62, 63, 64, 65)

template <int COUNT>
__device__ __forceinline__ void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
__device__ __forceinline__ void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// Only where a block's memory begins at a multiple of 1,024 does the tensor core's pattern begin there too.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

#endif  // MOONBASE_ON_CPU
// ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// "Matrix Descriptor Format" of the PTX manual: units of 16 bytes, 128-byte swizzling (1 in the top bits): the 16 bytes
// p of line l lie at p ^ (l mod 8). K-major: 1,024 bytes from eight lines to the next eight.
__device__ __forceinline__ unsigned operand(const void* shared) { return address_of(shared) >> 4 | 1 << 16; }
constexpr unsigned OPERAND_HIGH = 1024 >> 4 | 1 << 30;

// One block: where each expert's choices lie, and the tiles, large ones first, so that every block gets as much as the
// others. The order of an expert's choices is of no account.
__global__ void __launch_bounds__(GROUP_THREADS) group_choices(const Arguments a) {
  DYNAMIC_SHARED(memory);
  int* counts = reinterpret_cast<int*>(memory);  // [E]
  int* places = counts + MOST_EXPERTS;           // [E], where an expert's next choice goes
  int* sizes = places + MOST_EXPERTS;            // [E], tokens of its tiles, in eights: nearly the same for all of them
  int* order = sizes + MOST_EXPERTS;             // [E], the experts with the largest tiles first
  const int num_choices = a.tokens * a.choices, thread = threadIdx.x;
  constexpr int EACH = 8;  // loads under way
  const auto for_all = [&](const auto& what) {
    for (int base = thread; base < num_choices; base += EACH * GROUP_THREADS) {
      int experts[EACH];
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int choice = base + i * GROUP_THREADS;
        if (choice < num_choices)
          experts[i] = a.wide_indices ? static_cast<int>(static_cast<const int64_t*>(a.indices)[choice])
                                      : static_cast<const int32_t*>(a.indices)[choice];
      }
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        if (base + i * GROUP_THREADS < num_choices) what(base + i * GROUP_THREADS, experts[i]);
    }
  };
  for (int expert = thread; expert < a.experts; expert += GROUP_THREADS) counts[expert] = 0;
  __syncthreads();
  for_all([&](int, int expert) { atomicAdd(&counts[expert], 1); });
  __syncthreads();
  const auto tiles_of = [&](int expert) { return (counts[expert] + MOST_TOKENS - 1) / MOST_TOKENS; };
  for (int expert = thread; expert < a.experts; expert += GROUP_THREADS) {
    const int tiles = max(tiles_of(expert), 1);
    sizes[expert] = ((counts[expert] + tiles - 1) / tiles + 7) / 8;
  }
  __syncthreads();
  for (int expert = thread; expert < a.experts; expert += GROUP_THREADS) {
    const int size = sizes[expert];
    int before = 0;
    for (int other = 0; other < a.experts; ++other)
      before += sizes[other] > size || (sizes[other] == size && other < expert);
    order[before] = expert;
  }
  __syncthreads();
  if (thread < 32) {
    int rows_before = 0, tiles_before = 0;
    for (int base = 0; base < a.experts; base += 32) {
      const bool there = base + thread < a.experts;
      const int expert = there ? order[base + thread] : 0, count = there ? counts[expert] : 0;
      const int rows = (count + 7) / 8 * 8, tiles = there ? tiles_of(expert) : 0;
      int rows_up_to = rows, tiles_up_to = tiles;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int more_rows = __shfl_up_sync(0xFFFFFFFFu, rows_up_to, distance);
        const int more_tiles = __shfl_up_sync(0xFFFFFFFFu, tiles_up_to, distance);
        if (thread >= distance) rows_up_to += more_rows, tiles_up_to += more_tiles;
      }
      if (there) {
        const int first_row = rows_before + rows_up_to - rows, first = tiles_before + tiles_up_to - tiles;
        const int each = 8 * sizes[expert];
        places[expert] = first_row;
        for (int tile = 0; tile < tiles; ++tile)
          a.tiles[first + tile] = {expert, first, tiles, first_row + tile * each, min(each, count - tile * each)};
      }
      rows_before += __shfl_sync(0xFFFFFFFFu, rows_up_to, 31);
      tiles_before += __shfl_sync(0xFFFFFFFFu, tiles_up_to, 31);
    }
    if (thread == 0) *a.num_tiles = tiles_before;
  }
  __syncthreads();
  for_all([&](int choice, int expert) {
    const int row = atomicAdd(&places[expert], 1);
    a.row_of_choice[choice] = row;
    a.choice_of_row[row] = choice;
    a.weight_of_row[row] = a.weights[choice];
  });
}

// A block for each token: its row, in the order of the words' nibbles, to all its places. Of 32 inputs a lane has eight
// neighbours, of which the pairs c and c + 4 belong into the 16 bytes c: four lanes exchange them.
__global__ void __launch_bounds__(256) spread_tokens(const Arguments a) {
  const int lane = threadIdx.x % 32, token = blockIdx.x;
  const bool odd = lane % 2, high = lane / 2 % 2;
  const int* places = a.row_of_choice + static_cast<int64_t>(token) * a.choices;
  for (int piece = threadIdx.x; piece < a.hidden / 8; piece += blockDim.x) {
    const uint4 words = reinterpret_cast<const uint4*>(a.x + token * a.x_row)[piece];
    unsigned pairs[4] = {__byte_perm(words.x, words.z, 0x5410), __byte_perm(words.x, words.z, 0x7632),
                         __byte_perm(words.y, words.w, 0x5410), __byte_perm(words.y, words.w, 0x7632)};
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const unsigned other = __shfl_xor_sync(0xFFFFFFFFu, odd ? pairs[i] : pairs[i + 1], 1);
      (odd ? pairs[i] : pairs[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned other = __shfl_xor_sync(0xFFFFFFFFu, high ? pairs[i] : pairs[i + 2], 2);
      (high ? pairs[i] : pairs[i + 2]) = other;
    }
    const uint4 line_part = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    for (int choice = 0; choice < a.choices; ++choice) {
      const int row = __ldg(places + choice);
      uint8_t* line = a.inputs + (piece / 8 * a.rows + row) * LINE;
      reinterpret_cast<uint4*>(line)[piece % 8 ^ row % 8] = line_part;
    }
  }
}

// A tile's rows of weights and its tokens.
struct Item { int expert, block, row, count; };

template <bool DOWN>
struct Plan {
  const Arguments& a;
  int blocks, chunks, total;  // chunks: along the inputs

  __device__ explicit Plan(const Arguments& a) : a(a) {
    blocks = (DOWN ? a.hidden : 2 * a.width) / TILE_ROWS;
    chunks = (DOWN ? a.width : a.hidden) / CHUNK_INPUTS;
    total = *a.num_tiles * blocks;
  }

  // Tiles with the same weights are neighbours, then those with the same tokens. In two steps, each of which reads
  // memory: which expert, then which of its tiles.
  struct Found { int number, first, siblings; };
  __device__ __forceinline__ Found find(int number) const {
    const Tile& any = a.tiles[number / blocks];
    return {number, any.first, any.siblings};
  }
  __device__ __forceinline__ Item item(const Found& found) const {
    const int within = found.number - found.first * blocks, block = within / found.siblings;
    const Tile& tile = a.tiles[found.first + within - block * found.siblings];
    return {tile.expert, block, tile.row, tile.count};
  }
};

// A stage, and the parity of its barrier.
template <bool DOWN>
struct Place {
  int stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == Shared<DOWN>::STAGES) stage = 0, parity ^= 1;
  }
};

template <bool DOWN>
__device__ void copy_all(const Arguments& a, Shared<DOWN>& shared) {
  const Plan<DOWN> plan(a);
  Place<DOWN> place;
  place.parity = 1;  // of a fresh barrier: nobody waits in the first round
  for (int number = blockIdx.x; number < plan.total; number += gridDim.x) {
    const Item item = plan.item(plan.find(number));
    const unsigned line_bytes = (item.count + 7) / 8 * (8 * LINE);
    const int64_t row_block = static_cast<int64_t>(item.expert * plan.blocks + item.block) * TILE_CHUNKS;
    const int64_t step = static_cast<int64_t>(plan.chunks) * CHUNK_BYTES;
    const uint8_t* weights = (DOWN ? a.down : a.gate_up) + row_block * step;
    const uint8_t* tokens = (DOWN ? a.activation : a.inputs) + static_cast<int64_t>(item.row) * LINE;
    for (int chunk = 0; chunk < plan.chunks; ++chunk) {
      uint8_t* to = shared.stages[place.stage];
      uint64_t* full = &shared.full[place.stage];
      barrier_wait(&shared.empty[place.stage], place.parity);
      copies_announce(full, 2 * line_bytes + TILE_CHUNKS * CHUNK_BYTES);
#pragma unroll
      for (int i = 0; i < TILE_CHUNKS; ++i)
        copy_in_once(to + TOKEN_BYTES + i * CHUNK_BYTES, weights + i * step, CHUNK_BYTES, full);
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        copy_in(to + line * line_bytes, tokens, line_bytes, full);
        tokens += a.rows * LINE;
      }
      weights += CHUNK_BYTES;
      place.advance();
    }
  }
}

// A lane's words and scales of a chunk.
struct Words {
  uint4 upper, lower, scales;

  __device__ __forceinline__ void read(const uint8_t* chunk, int warp, int lane) {
    upper = reinterpret_cast<const uint4*>(chunk + warp * 1024)[lane];
    lower = reinterpret_cast<const uint4*>(chunk + warp * 1024 + 512)[lane];
    scales = reinterpret_cast<const uint4*>(chunk + SCALES + warp * 128)[lane / 4];
  }

  // 64 of its inputs: the left operands of four products.
  __device__ __forceinline__ void unpack(unsigned (&rows)[4][4], int half) const {
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const unsigned words[2] = {half ? (group ? upper.w : upper.z) : (group ? upper.y : upper.x),
                                 half ? (group ? lower.w : lower.z) : (group ? lower.y : lower.x)};
      const unsigned both[2] = {half ? scales.y : scales.x, half ? scales.w : scales.z};
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const unsigned scale = __byte_perm(both[which], both[which], group ? 0x3232 : 0x1010);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          // 128 + u, then u - 8, both exact; the product is rounded once.
          const unsigned raised = and_or(words[which] >> (4 * pair), 0x000F000Fu, 0x43004300u);
          rows[group * 2 + pair / 2][pair % 2 * 2 + which] = multiply_pairs(add_pairs(raised, 0xC308C308u), scale);
        }
      }
    }
  }
};

// What four of the warps do: half of a tile's rows.
template <bool DOWN>
struct Worker {
  const Arguments& a;
  Shared<DOWN>& shared;
  const Plan<DOWN> plan;
  const int group;
  int thread, warp, lane;
  Place<DOWN> place;
  typename Plan<DOWN>::Found found;  // what comes next, read while something else is multiplied or written
  Item next;

  __device__ Worker(const Arguments& a, Shared<DOWN>& shared)
      : a(a), shared(shared), plan(a), group(threadIdx.x / 128 - 1), thread(threadIdx.x % 128), warp(thread / 32),
        lane(thread % 32) {}

  // 64 rows of weights times the tokens of a stage. While products of 64 inputs are under way, the next are unpacked.
  template <int COUNT>
  __device__ __forceinline__ void multiply_chunk(float (&sums)[COUNT], unsigned (&rows)[2][4][4], int which,
                                                 const Place<DOWN>& place) {
    const uint8_t* here = shared.stages[place.stage];
    const unsigned tokens = operand(here);
    copies_wait(&shared.full[place.stage], place.parity);
    Words words;
    words.read(here + TOKEN_BYTES + (group * 2 + which) * CHUNK_BYTES, warp, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      words.unpack(rows[half], half);
      sums_begin(rows[half]);
#pragma unroll
      for (int step = 0; step < 4; ++step)
        multiply_rows(sums, rows[half][step], tokens + ((half * COUNT * 2 * LINE + step * 32) >> 4), OPERAND_HIGH);
      sums_commit();
      sums_wait<1>();  // the other half's registers are free
    }
  }

  __device__ __forceinline__ void end_stage() {
    sums_wait<0>();
    if (lane == 0) barrier_arrive(&shared.empty[place.stage]);
    place.advance();
  }

  // Once a stage a group waits for its own products: the compiler gives up overlapping where any are under way at the
  // end of a loop that it has so many of. The other group's fill the time if the two do so half a stage apart, and so
  // the second group's second chunk is a stage ahead.
  template <int EIGHTS>
  __device__ __forceinline__ void multiply(float (&sums)[2][4 * EIGHTS]) {
    unsigned rows[2][4][4];
    Place<DOWN> ahead = place;
    if (group == 1) {
      multiply_chunk(sums[1], rows, 1, ahead);
      sums_wait<0>();
      ahead.advance();
    }
#pragma unroll 1
    for (int chunk = group; chunk < plan.chunks; ++chunk) {
      multiply_chunk(sums[0], rows, 0, place);
      multiply_chunk(sums[1], rows, 1, ahead);
      ahead.advance();
      end_stage();
    }
    if (group == 1) {
      multiply_chunk(sums[0], rows, 0, place);
      end_stage();
    }
  }

  // SwiGLU to lines of 64 activations, as `spread_tokens` orders them: a warp's eight are a word's, so that lanes whose
  // rows are four apart make a pair.
  template <int EIGHTS>
  __device__ __forceinline__ void write_activations(const Item& item, const float (&sums)[2][4 * EIGHTS]) {
    uint8_t* lines = shared.results[group];
    const bool second = lane >= 16;
    if (thread == 0) copies_out_wait();
    group_meets(group);
#pragma unroll
    for (int which = 0; which < 2; ++which)
#pragma unroll
      for (int j = 0; j < EIGHTS; ++j) {
        float values[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float gate = sums[which][4 * j + i];
          values[i] = __fdividef(gate, 1.0f + __expf(-gate)) * sums[which][4 * j + 2 + i];
        }
        const float other = __shfl_xor_sync(0xFFFFFFFFu, second ? values[0] : values[1], 16);
        const int token = j * 8 + lane % 4 * 2 + second, place = (which * 4 + lane / 4 % 4) ^ (token % 8);
        store_operand(lines + token * LINE + place * 16 + warp * 4,
                      second ? bf16_pair(other, values[1]) : bf16_pair(values[0], other));
      }
    operands_visible();
    group_meets(group);
    if (thread == 0) {
      copy_out(a.activation + ((item.block * 2 + group) * a.rows + item.row) * LINE, lines, EIGHTS * 8 * LINE);
      copies_out_commit();
    }
  }

  // `choice` and `weight`: of the tile's token `thread`.
  template <int EIGHTS>
  __device__ __forceinline__ void write_rows(const Item& item, const float (&sums)[2][4 * EIGHTS], int choice,
                                             float weight) {
    uint8_t* results = shared.results[group];
    shared.weights[group][thread] = weight;
    copies_out_wait();
    group_meets(group);
#pragma unroll
    for (int j = 0; j < EIGHTS; j += 2) {
      float2 weights[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        weights[i] = *reinterpret_cast<const float2*>(
            &shared.weights[group][min(j + i, EIGHTS - 1) * 8 + lane % 4 * 2]);
      uint8_t* to = results + (j * 8 + lane / 16 % (EIGHTS - j > 1 ? 2 : 1) * 8 + lane % 8) * ROW_BYTES + warp * 32 +
                    lane / 8 % 2 * 16;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        unsigned matrices[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (j + i / 2 >= EIGHTS) break;
          const float* two = sums[which] + 4 * (j + i / 2) + i % 2 * 2;
          matrices[i] = bf16_pair(two[0] * weights[i / 2].x, two[1] * weights[i / 2].y);
        }
        if (j + 1 < EIGHTS) store_turned<4>(to + which * 128, matrices);
        else store_turned<2>(to + which * 128, matrices);
      }
    }
    operands_visible();
    group_meets(group);
    if (thread < item.count) {
      const int64_t column = item.block * TILE_ROWS + group * (TILE_ROWS / 2);
      copy_out(a.choice_rows + choice * static_cast<int64_t>(a.hidden) + column, results + thread * ROW_BYTES, 256);
    }
    copies_out_commit();
  }

  template <int EIGHTS>
  __device__ __forceinline__ void work(const Item& item) {
    float sums[2][4 * EIGHTS] = {};  // so that the registers hold nothing between tiles, for the compiler to know
    int choice = 0;
    float weight = 0;
    if (DOWN && thread < item.count)
      choice = a.choice_of_row[item.row + thread], weight = a.weight_of_row[item.row + thread];
    multiply<EIGHTS>(sums);
    next = plan.item(found);
    thread = unknown(thread), warp = thread / 32, lane = thread % 32;
    if constexpr (DOWN) write_rows<EIGHTS>(item, sums, choice, weight);
    else write_activations<EIGHTS>(item, sums);
  }

  template <int EIGHTS>
  __device__ __forceinline__ void work_with(const Item& item, int eights) {
    if constexpr (EIGHTS == MOST_EIGHTS) {
      work<EIGHTS>(item);
    } else {
      if (eights == EIGHTS) work<EIGHTS>(item);
      else work_with<EIGHTS + 1>(item, eights);
    }
  }

  __device__ __forceinline__ void work_all() {
    if (blockIdx.x >= plan.total) return;
    next = plan.item(plan.find(blockIdx.x));
    for (int number = blockIdx.x; number < plan.total; number += gridDim.x) {
      const Item item = next;
      found = plan.find(min(number + static_cast<int>(gridDim.x), plan.total - 1));
      work_with<1>(item, (item.count + 7) / 8);
    }
    copies_out_wait();
  }
};

template <bool DOWN>
__global__ void __launch_bounds__(THREADS, 1) multiply_experts(const Arguments a) {
  DYNAMIC_SHARED(memory);
  Shared<DOWN>& shared = *reinterpret_cast<Shared<DOWN>*>(memory);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Shared<DOWN>::STAGES; ++stage) {
      barrier_init_copies(&shared.full[stage], STAGE_COPIES);
      barrier_init(&shared.empty[stage], 8);  // warps
    }
    barriers_visible();
  }
  __syncthreads();
  if (threadIdx.x < WORKERS) {
    registers_give<COPY_REGISTERS>();
    if (threadIdx.x == 0) copy_all<DOWN>(a, shared);
  } else {
    registers_take<WORK_REGISTERS>();
    Worker<DOWN>(a, shared).work_all();
  }
}

// A block for each token.
__global__ void __launch_bounds__(256) sum_choices(const Arguments a) {
  const int64_t token = blockIdx.x;
  for (int piece = threadIdx.x; piece < a.hidden / 8; piece += blockDim.x) {
    float sums[8] = {};
    for (int choice = 0; choice < a.choices; ++choice) {
      const uint16_t* row = a.choice_rows + (token * a.choices + choice) * a.hidden;
      const uint4 words = reinterpret_cast<const uint4*>(row)[piece];
      const unsigned pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[2 * i] += low_half(pairs[i]), sums[2 * i + 1] += high_half(pairs[i]);
    }
    float4* to = reinterpret_cast<float4*>(a.out + token * a.hidden) + 2 * piece;
    to[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    to[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
  }
}

int launch(void (*kernel)(Arguments), const Arguments& a, int blocks, int threads, int bytes, void* stream) {
#ifdef MOONBASE_ON_CPU
  return run_on_cpu([=] { kernel(a); }, blocks, threads, bytes, 4);
#else
  if (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  kernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(a);
  return static_cast<int>(cudaGetLastError());
#endif
}

}  // namespace

// Tokens of an expert that one tile takes, at most.
extern "C" int moonbase_experts_int4_prompt_tokens() { return MOST_TOKENS; }

// Returns CUDA's error code. `blocks`: one a processor. `parts`: bits for grouping, spreading, gate and up, down, sums.
// `about`: Arguments; a type that no other file knows would hide this function from them.
extern "C" int moonbase_experts_int4_prompt(const void* about, int blocks, int parts, void* stream) {
  const Arguments& a = *static_cast<const Arguments*>(about);
  int error = 0;
  if (parts & 1) error = launch(group_choices, a, 1, GROUP_THREADS, 4 * MOST_EXPERTS * sizeof(int), stream);
  if (parts & 2 && !error) error = launch(spread_tokens, a, a.tokens, 256, 0, stream);
  if (parts & 4 && !error) error = launch(multiply_experts<false>, a, blocks, THREADS, sizeof(Shared<false>), stream);
  if (parts & 8 && !error) error = launch(multiply_experts<true>, a, blocks, THREADS, sizeof(Shared<true>), stream);
  if (parts & 16 && !error) error = launch(sum_choices, a, a.tokens, 256, 0, stream);
  return error;
}
