// Routed experts in training, bf16: the grouped products, gate's and up's with SwiGLU at their end.
//
// - Rows come sorted by expert, and an expert's may begin anywhere. Tiles have 128 rows and 256 columns; two blocks
//   (a cluster) take neighbouring rows of one expert, and each fetches half of the weights for both: the way from the
//   second cache is the narrow one. Of an expert's last rows each takes half. A tile reads past its expert's rows and
//   writes only its own.
// - One warp keeps a ring of stages (64 of the depth) filled by tensor copies, ahead over the end of a tile; two times
//   four warps multiply 64 rows each.
// - There is no room for a second set of sums, but there is for their bf16 pairs. A tile's are kept while the next one
//   is multiplied: at each of its first steps, with products under way, a piece of them is brought to its end and
//   written.
// - Results go from registers to memory: four lanes turn four pairs of columns, and each writes 16 bytes.
// - Which tiles there are, every block finds out for itself. Nothing is read back by the host.
//
// Shapes: N rows, E experts, K depth and M columns of a product; D hidden, I width of an expert, F = 2I: gate, then up.
// In a warp's 16 rows, lane = 4·(row mod 8) + quarter.

#include <cstdint>
#ifndef MOONBASE_ON_CPU  // a test runs this file without a GPU
#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#endif

namespace {

constexpr int ROWS = 128, COLUMNS = 256, DEPTH = 64;  // of a tile and a step
constexpr int CLUSTER = 2;                            // blocks that share weights
constexpr int LINE = 2 * DEPTH;                       // bytes
constexpr int LEFT_BYTES = ROWS * LINE, RIGHT_BYTES = COLUMNS * LINE, STAGE_BYTES = LEFT_BYTES + RIGHT_BYTES;
constexpr int STAGES = 4;
constexpr int THREADS = 384, WARPS = 8;  // a warp of the first 128 threads copies, WARPS multiply
constexpr int COPY_REGISTERS = 24, WORK_REGISTERS = 240;
constexpr int MOST_EXPERTS = 512;
constexpr float LOG2_E = 1.4426950408889634f;

// The first with SwiGLU at the end; gradients of rows and of weights.
enum Form { GATE_UP, PRODUCT, GRADIENT, WEIGHT_GRADIENT };
// The right operand is stored the other way round: neighbours in memory are neighbouring columns, not neighbours of the
// depth. That of the weights' gradient is N rows deep, and so is its left one.
template <int FORM>
constexpr bool TURNED = FORM >= GRADIENT;

// Pieces of a tile's end, one for each of the next one's first steps: every product has as many at least.
constexpr int ENDS = 8;
#ifndef MOONBASE_END_STEPS  // a test has fewer
#define MOONBASE_END_STEPS ENDS
#endif
constexpr int END_STEPS = MOONBASE_END_STEPS;

struct Call {
  const uint16_t* left;   // [N, K]
  const uint16_t* right;  // [E, M, K]; for gradients [E, K, M]; for those of weights [N, M]
  const int* ends;        // [E], where an expert's rows end
  const float* weights;   // [N], with SwiGLU
  uint16_t* gate_up;      // [N, F]: made by GATE_UP
  uint16_t* out;          // [N, M]; GATE_UP: [N, I]; WEIGHT_GRADIENT: [E, K, M]
  int64_t rows;
  int experts, depth, columns;  // N, E, K, M
};

// --- what the chip does ----------------------------------------------------------------------------------------------
#ifndef MOONBASE_ON_CPU

using Map = CUtensorMap;

__device__ __forceinline__ unsigned address_of(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(count) : "memory");
}

// A phase ends once its bytes have been announced and so many boxes have come.
__device__ __forceinline__ void barrier_init_boxes(uint64_t* barrier, int) { barrier_init(barrier, 1); }
__device__ __forceinline__ void boxes_announce(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barriers_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// At the same barrier of another block of the cluster, or of this one.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
      " mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(address_of(barrier)), "r"(rank) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
      " @!done bra again; }" ::"r"(address_of(barrier)), "r"(parity) : "memory");
}

// For what tensor copies brought, which the tensor core sees without a fence.
__device__ __forceinline__ void copies_wait(uint64_t* barrier, unsigned parity) { barrier_wait(barrier, parity); }

__device__ __forceinline__ int rank_in_cluster() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ __forceinline__ void cluster_meets() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A box of a matrix: rows from `row` on, columns from sixty-four `block` on; to the same place in every block of the
// cluster where EVERYWHERE.
template <bool EVERYWHERE>
__device__ __forceinline__ void copy_box(void* to, const Map& map, int row, int block, uint64_t* barrier) {
  if (EVERYWHERE && CLUSTER > 1)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(address_of(to)), "l"(&map), "r"(address_of(barrier)), "r"(0),
        "r"(row), "r"(block), "h"(static_cast<uint16_t>((1 << CLUSTER) - 1)) : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(address_of(to)), "l"(&map), "r"(address_of(barrier)), "r"(0),
        "r"(row), "r"(block) : "memory");
}

__device__ __forceinline__ void clear_16(void* to) { *static_cast<uint4*>(to) = make_uint4(0, 0, 0, 0); }

// Between ordinary writes to shared memory and products that read it.
__device__ __forceinline__ void operands_visible() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void group_meets(int group) {
  if (group == 0) asm volatile("bar.sync 1, 128;" ::: "memory");
  else asm volatile("bar.sync 2, 128;" ::: "memory");
}

// The compiler makes four of an ordinary store of such registers.
__device__ __forceinline__ void store(uint16_t* to, const unsigned (&pairs)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]),
               "r"(pairs[3]) : "memory");
}

// Before the first product, and between other uses of its registers and a product ("wgmma.fence").
__device__ __forceinline__ void tiles_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void tiles_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void tiles_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#define FOUR(f, i) "+f"(f[i]), "+f"(f[i + 1]), "+f"(f[i + 2]), "+f"(f[i + 3])
#define SIXTEEN(f, i) FOUR(f, i), FOUR(f, i + 4), FOUR(f, i + 8), FOUR(f, i + 12)
#define SIXTY_FOUR(f, i) SIXTEEN(f, i), SIXTEEN(f, i + 16), SIXTEEN(f, i + 32), SIXTEEN(f, i + 48)

// sums (+)= a · b over 16: 64 rows x 256 columns. K-major both of them, or M-major and N-major.
template <bool M_MAJOR, bool N_MAJOR>
__device__ __forceinline__ void multiply_tile(float (&sums)[128], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred add; setp.ne.b32 add, %130, 0;"
      " wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127},"
      " %128, %129, add, 1, 1, %131, %132; }"
      : SIXTY_FOUR(sums, 0), SIXTY_FOUR(sums, 64)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(M_MAJOR ? 1 : 0),
        "n"(N_MAJOR ? 1 : 0));
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

__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ unsigned bf16_pair(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Only where a block's memory begins at a multiple of 1,024 does the tensor core's pattern begin there too.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

// A matrix in memory, row by row, and the box that is copied at a time. Lines of 64 columns are swizzled. Returns
// CUDA's error code.
int describe(Map& map, const void* matrix, int64_t rows, int columns, int box_rows, int box_blocks) {
  static const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
      dlsym(dlopen("libcuda.so.1", RTLD_LAZY), "cuTensorMapEncodeTiled"));
  if (encode == nullptr) return static_cast<int>(cudaErrorNotSupported);
  const cuuint64_t sizes[3] = {DEPTH, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(columns / DEPTH)};
  const cuuint64_t distances[2] = {static_cast<cuuint64_t>(columns) * 2, LINE};
  const cuuint32_t box[3] = {DEPTH, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_blocks)};
  const cuuint32_t steps[3] = {1, 1, 1};
  return static_cast<int>(encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(matrix), sizes,
                                 distances, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

#endif  // MOONBASE_ON_CPU
// ---------------------------------------------------------------------------------------------------------------------

struct Arguments {
  Map left, right;
  Call call;
};

struct Shared {
  uint8_t stages[STAGES][STAGE_BYTES];
  uint64_t full[STAGES], empty[STAGES];
  int row_ends[MOST_EXPERTS + 1], tile_ends[MOST_EXPERTS + 1];  // from 0 on; tiles: of a cluster's rows
  int largest[MOST_EXPERTS];                                    // experts, those with most rows first
};
static_assert(sizeof(Shared) <= 232448, "what a block of compute capability 9.0 may have");

__device__ __forceinline__ float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// "Matrix Descriptor Format": addresses and distances in units of 16 bytes, 128-byte swizzling (1 in the top bits): the
// 16 bytes p of the 128-byte line l lie at p ^ (l mod 8).
// K-major ("Strides"): `stride` from 8 rows to the next 8, `leading` is not used. N-major: `leading` from 64 columns to
// the next 64, `stride` from 8 rows of the depth to the next 8. In a cluster addresses also name the block, above.
__device__ __forceinline__ uint64_t operand(const void* shared, unsigned leading, unsigned stride) {
  return static_cast<uint64_t>(address_of(shared) >> 4 & 0x3FFF) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

// By the first warp of a block.
__device__ __forceinline__ void list_tiles(const Call& call, Shared& shared) {
  const int lane = threadIdx.x;
  int tiles_before = 0;
  if (lane == 0) shared.row_ends[0] = shared.tile_ends[0] = 0;
  for (int base = 0; base < call.experts; base += 32) {
    const int expert = base + lane, last = min(expert, call.experts - 1);
    const int end = __ldg(call.ends + last), start = last > 0 ? __ldg(call.ends + last - 1) : 0;
    int tiles = expert == last ? (end - start + CLUSTER * ROWS - 1) / (CLUSTER * ROWS) : 0;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, tiles, distance);
      if (lane >= distance) tiles += other;
    }
    tiles += tiles_before;
    if (expert == last) shared.row_ends[expert + 1] = end, shared.tile_ends[expert + 1] = tiles;
    tiles_before = __shfl_sync(0xFFFFFFFFu, tiles, 31);
  }
}

// By all threads, after that.
__device__ __forceinline__ void order_experts(const Call& call, Shared& shared) {
  const auto size = [&](int expert) { return shared.row_ends[expert + 1] - shared.row_ends[expert]; };
  for (int expert = threadIdx.x; expert < call.experts; expert += THREADS) {
    int place = 0;
    for (int other = 0; other < call.experts; ++other)
      place += size(other) > size(expert) || (size(other) == size(expert) && other < expert);
    shared.largest[place] = expert;
  }
}

// A block's part of a tile: `count` rows of the result from `row` on. Gradients of weights are sums over `depth` rows
// of the operands from `start` on; products go through the whole depth.
struct Item { int expert, row, count, column_tile, start, depth; };

// Half each of the last rows, in sixty-fours: then one of a block's two groups is all that works.
__device__ __forceinline__ void take_share(Item& item, int row, int left, int rank) {
  const int share = CLUSTER > 1 && left <= ROWS ? ROWS / CLUSTER : ROWS;
  item.row = row + rank * share, item.count = min(max(left - rank * share, 0), share);
}

// Goes through a cluster's tiles. Neighbours have the same rows.
template <int FORM>
struct Walk {
  static constexpr int WIDTH = FORM == GATE_UP ? COLUMNS / 2 : COLUMNS;
  const Call& call;
  const Shared& shared;
  const int rank, column_tiles, row_tiles, total, clusters, cluster;
  int round = 0, expert = 0;

  __device__ Walk(const Call& call, const Shared& shared, int rank)
      : call(call), shared(shared), rank(rank), column_tiles((columns(call) + WIDTH - 1) / WIDTH),
        row_tiles((call.depth + CLUSTER * ROWS - 1) / (CLUSTER * ROWS)),
        total((FORM == WEIGHT_GRADIENT ? call.experts * row_tiles : shared.tile_ends[call.experts]) * column_tiles),
        clusters(gridDim.x / CLUSTER), cluster(blockIdx.x / CLUSTER) {}

  __device__ static int columns(const Call& call) { return FORM == GATE_UP ? call.columns / 2 : call.columns; }
  // Tiles of weights' gradients are as long as the expert has rows: large ones first, and every other round backwards.
  __device__ __forceinline__ int number() const {
    return round * clusters + (FORM == WEIGHT_GRADIENT && round % 2 ? clusters - 1 - cluster : cluster);
  }
  __device__ __forceinline__ bool there() const { return number() < total; }
  __device__ __forceinline__ void advance() { ++round; }
  __device__ __forceinline__ Item item() {
    const int tile = number() / column_tiles;
    Item item;
    item.column_tile = number() - tile * column_tiles;
    if (FORM == WEIGHT_GRADIENT) {
      const int place = tile / row_tiles, row = (tile - place * row_tiles) * (CLUSTER * ROWS);
      item.expert = shared.largest[place];
      item.start = shared.row_ends[item.expert];
      item.depth = shared.row_ends[item.expert + 1] - item.start;
      take_share(item, row, call.depth - row, rank);
    } else {
      while (tile >= shared.tile_ends[expert + 1]) ++expert;
      const int row = shared.row_ends[expert] + (tile - shared.tile_ends[expert]) * (CLUSTER * ROWS);
      item.expert = expert, item.start = 0, item.depth = call.depth;
      take_share(item, row, shared.row_ends[expert + 1] - row, rank);
    }
    return item;
  }
};

// A stage, and the parity of its barrier.
struct Place {
  int stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// One warp. A block fetches its own rows, and its share of the weights for the whole cluster.
template <int FORM>
__device__ void copy_all(const Arguments& a, Shared& shared) {
  constexpr int HALVES = 2, HALF_COLUMNS = COLUMNS / HALVES, HALF_BYTES = RIGHT_BYTES / HALVES;
  const Call& call = a.call;
  const int lane = threadIdx.x, rank = rank_in_cluster();
  Place place;
  place.parity = 1;  // of a fresh barrier: nobody waits in the first round
  for (Walk<FORM> walk(call, shared, rank); walk.there(); walk.advance()) {
    const Item item = walk.item();
    const int steps = (item.depth + DEPTH - 1) / DEPTH;
    for (int step = 0; step < steps; ++step) {
      uint8_t* to = shared.stages[place.stage];
      uint64_t* full = &shared.full[place.stage];
      barrier_wait(&shared.empty[place.stage], place.parity);
      if (lane == 0) {
        boxes_announce(full, STAGE_BYTES);
        if (FORM == WEIGHT_GRADIENT) copy_box<false>(to, a.left, item.start + step * DEPTH, item.row / DEPTH, full);
        else copy_box<false>(to, a.left, item.row, step, full);
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          if (half % CLUSTER != rank) continue;
          uint8_t* place_of_half = to + LEFT_BYTES + half * HALF_BYTES;
          if (TURNED<FORM>) {
            const int first = FORM == WEIGHT_GRADIENT ? item.start : item.expert * call.depth;
            copy_box<true>(place_of_half, a.right, first + step * DEPTH,
                           (item.column_tile * HALVES + half) * (HALF_COLUMNS / DEPTH), full);
          } else {
            const int within = FORM == GATE_UP ? half * (call.columns / 2) + item.column_tile * HALF_COLUMNS
                                               : (item.column_tile * HALVES + half) * HALF_COLUMNS;
            copy_box<true>(place_of_half, a.right, item.expert * call.columns + within, step, full);
          }
        }
      }
      __syncwarp();
      place.advance();
    }
  }
}

// Four lanes hold pairs of four times eight columns; afterwards each has the eight whose number is its own.
__device__ __forceinline__ void turn(unsigned (&pairs)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
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
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp2_of(-LOG2_E * x)); }

// A tile's sums on their way to memory, rounded.
struct Pending {
  unsigned pairs[COLUMNS / 32][2][4];  // in four times eight columns each, of the thread's first and second row
  float factors[2];                    // with SwiGLU: the rows' weights
  int row, column, left;               // the thread's first row of the result, the tile's first column; rows left
  __device__ __forceinline__ bool has(int second) const { return 8 * second < left; }
  __device__ __forceinline__ int64_t row_of(int second) const { return row + 8 * second; }
};

// What four of the warps do: 64 of a block's rows.
template <int FORM>
struct Worker {
  static constexpr bool AT_ONCE = FORM == WEIGHT_GRADIENT;  // its tiles are long, or short: no steps to count on
  const Call& call;
  Shared& shared;
  const int group, lane, row;  // row: the thread's first of the block's; the second is row + 8
  Place place;
  Pending pending;

  __device__ Worker(const Call& call, Shared& shared)
      : call(call), shared(shared), group(threadIdx.x / 128 - 1), lane(threadIdx.x % 32),
        row(group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4) {
#pragma unroll
    for (int part = 0; part < COLUMNS / 32; ++part)
#pragma unroll
      for (int i = 0; i < 8; ++i) pending.pairs[part][i / 4][i % 4] = 0;
    pending.row = 0, pending.column = 0, pending.left = 0;
    pending.factors[0] = pending.factors[1] = 0.0f;
  }

  // The stage may be filled again, as far as this warp is concerned: by both blocks.
  __device__ __forceinline__ void release(int stage) {
    if (lane < CLUSTER) barrier_arrive_at(&shared.empty[stage], lane);
  }

  // What lies beyond an expert's rows is the next one's: lines `from` and on of the group's left operand.
  __device__ __forceinline__ void clear(uint8_t* left, int from) {
    for (int line = from + threadIdx.x % 128 / 8; line < DEPTH; line += 16)
      clear_16(left + line * LINE + threadIdx.x % 8 * 16);
    operands_visible();
    group_meets(group);
  }

  // Products of a stage, which the tensor core begins with; `first`: with sums of nothing.
  __device__ __forceinline__ void multiply_stage(float (&sums)[128], bool first) {
    constexpr bool M_MAJOR = FORM == WEIGHT_GRADIENT, N_MAJOR = TURNED<FORM>;
    const uint8_t* here = shared.stages[place.stage];
    const uint64_t left = operand(here + group * (LEFT_BYTES / 2), 16, 8 * LINE);
    const uint64_t right = operand(here + LEFT_BYTES, N_MAJOR ? DEPTH * LINE : 16, 8 * LINE);
    tiles_begin();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16)
      multiply_tile<M_MAJOR, N_MAJOR>(sums, left + ((M_MAJOR ? LINE * k : 2 * k) >> 4),
                                      right + ((N_MAJOR ? LINE * k : 2 * k) >> 4), !first || k > 0);
    tiles_commit();
  }

  // `meanwhile`: done once, while products are under way.
  template <class Meanwhile>
  __device__ __forceinline__ void multiply(float (&sums)[128], int depth, const Meanwhile& meanwhile) {
    int before = 0, step = 0;
    const int steps = depth / DEPTH, rest = FORM == WEIGHT_GRADIENT ? depth % DEPTH : 0;
    if constexpr (!AT_ONCE) {
#pragma unroll
      for (; step < END_STEPS; ++step) {
        constexpr int EACH = ENDS / END_STEPS;
        const auto bring_to_end = [&] {
#pragma unroll
          for (int i = 0; i < EACH; ++i) end(step * EACH + i);
        };
        if (step > 0) bring_to_end();  // while products of the step before are under way
        copies_wait(&shared.full[place.stage], place.parity);
        multiply_stage(sums, step == 0);
        if (step == 0) bring_to_end();
        tiles_wait<1>();
        if (step > 0) release(before);
        before = place.stage;
        place.advance();
      }
    }
    meanwhile();
    for (; step < steps; ++step) {
      copies_wait(&shared.full[place.stage], place.parity);
      multiply_stage(sums, step == 0);
      tiles_wait<1>();
      if (step > 0) release(before);
      before = place.stage;
      place.advance();
    }
    tiles_wait<0>();
    if (steps > 0) release(before);
    if (rest > 0) {
      copies_wait(&shared.full[place.stage], place.parity);
      clear(shared.stages[place.stage] + group * (LEFT_BYTES / 2), rest);
      multiply_stage(sums, steps == 0);
      tiles_wait<0>();
      release(place.stage);
      place.advance();
    }
  }

  __device__ __forceinline__ void skip(int depth) {
    for (int done = 0; done < depth; done += DEPTH) {
      copies_wait(&shared.full[place.stage], place.parity);
      __syncwarp();
      release(place.stage);
      place.advance();
    }
  }

  // What `pending` will be, once the tile before has come to its end.
  __device__ __forceinline__ void prepare(const Item& item) {
    pending.row = (FORM == WEIGHT_GRADIENT ? item.expert * call.depth : 0) + item.row + row;
    pending.column = item.column_tile * Walk<FORM>::WIDTH, pending.left = item.count - row;
    if (FORM == GATE_UP) {
#pragma unroll
      for (int second = 0; second < 2; ++second)
        pending.factors[second] = pending.has(second) ? __ldg(call.weights + pending.row_of(second)) : 0.0f;
    }
  }

  __device__ __forceinline__ void keep(const float (&sums)[128]) {
#pragma unroll
    for (int part = 0; part < COLUMNS / 32; ++part)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float* two = sums + 16 * part + 4 * (i % 4) + 2 * (i / 4);
        pending.pairs[part][i / 4][i % 4] = bf16_pair(two[0], two[1]);
      }
  }

  __device__ __forceinline__ void end(int piece) {
    if constexpr (FORM == GATE_UP) {
      end_activation(piece / 2, piece % 2);
    } else {
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const int column = pending.column + 32 * piece;
        unsigned (&pairs)[4] = pending.pairs[piece][second];
        turn(pairs, lane);
        if (pending.has(second) && column < call.columns)
          store(call.out + pending.row_of(second) * call.columns + column + lane % 4 * 8, pairs);
      }
    }
  }

  __device__ __forceinline__ void end_all() {
#pragma unroll
    for (int piece = 0; piece < ENDS; ++piece) end(piece);
    pending.left = 0;
  }

  // SwiGLU of what was rounded, so that the way back finds the same numbers.
  __device__ __forceinline__ void end_activation(int part, int second) {
    unsigned (&gate)[4] = pending.pairs[part][second], (&up)[4] = pending.pairs[part + COLUMNS / 64][second];
    unsigned activation[4];
    turn(gate, lane);
    turn(up, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = low_half(gate[i]), high = high_half(gate[i]);
      activation[i] = bf16_pair(low * sigmoid(low) * low_half(up[i]) * pending.factors[second],
                                high * sigmoid(high) * high_half(up[i]) * pending.factors[second]);
    }
    const int width = call.columns / 2, column = pending.column + 32 * part;
    if (pending.has(second) && column < width) {
      const int64_t begin = pending.row_of(second) * width;
      uint16_t* to = call.gate_up + 2 * begin + column + lane % 4 * 8;
      store(to, gate);
      store(to + width, up);
      store(call.out + begin + column + lane % 4 * 8, activation);
    }
  }

  __device__ __forceinline__ void write_zeros(const Item& item) {
    const unsigned zeros[4] = {};
    const int first = item.column_tile * COLUMNS, last = min(first + COLUMNS, call.columns);
    for (int second = 0; second < 2; ++second) {
      if (row + 8 * second >= item.count) break;
      const int64_t begin = static_cast<int64_t>(item.expert) * call.depth + item.row + row + 8 * second;
      for (int column = first + lane % 4 * 8; column < last; column += 32)
        store(call.out + begin * call.columns + column, zeros);
    }
  }

  __device__ void work_all() {
    Walk<FORM> walk(call, shared, rank_in_cluster());
    if (!walk.there()) return;
    Item item = walk.item();
    while (walk.there()) {
      const int depth = item.depth;
      const auto look_ahead = [&] {
        prepare(item);
        walk.advance();
        if (walk.there()) item = walk.item();
      };
      if (group * 64 >= item.count) {
        end_all();
        skip(depth);
        look_ahead();
        continue;
      }
      if (FORM == WEIGHT_GRADIENT && depth == 0) {
        write_zeros(item);
        look_ahead();
        pending.left = 0;
        continue;
      }
      float sums[128];
      multiply(sums, depth, look_ahead);
      keep(sums);
      if (AT_ONCE) end_all();
    }
    end_all();
  }
};

template <int FORM>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    multiply_groups(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init_boxes(&shared.full[stage], 3);
      barrier_init(&shared.empty[stage], CLUSTER * WARPS);
    }
    barriers_visible();
  }
  if (threadIdx.x < 32) list_tiles(a.call, shared);
  if (FORM == WEIGHT_GRADIENT) {
    __syncthreads();
    order_experts(a.call, shared);
  }
  __syncthreads();
  cluster_meets();
  if (threadIdx.x < 128) {
    registers_give<COPY_REGISTERS>();
    if (threadIdx.x < 32) copy_all<FORM>(a, shared);
  } else {
    registers_take<WORK_REGISTERS>();
    Worker<FORM>(a.call, shared).work_all();
  }
  __syncwarp();
  cluster_meets();  // nobody leaves while others may still write to its memory
}

template <int FORM>
int launch(const Call& call, int blocks, void* stream) {
  Arguments a;
  a.call = call;
  const int64_t weight_rows = static_cast<int64_t>(call.experts) * (TURNED<FORM> ? call.depth : call.columns);
  int error = FORM == WEIGHT_GRADIENT ? describe(a.left, call.left, call.rows, call.depth, DEPTH, ROWS / DEPTH)
                                      : describe(a.left, call.left, call.rows, call.depth, ROWS, 1);
  if (error) return error;
  if (TURNED<FORM>)
    error = describe(a.right, call.right, FORM == WEIGHT_GRADIENT ? call.rows : weight_rows, call.columns, DEPTH,
                     COLUMNS / 2 / DEPTH);
  else
    error = describe(a.right, call.right, weight_rows, call.depth, COLUMNS / 2, 1);
  if (error) return error;
#ifdef MOONBASE_ON_CPU
  return run_on_cpu([=] { multiply_groups<FORM>(a); }, blocks, THREADS, sizeof(Shared));
#else
  error = static_cast<int>(cudaFuncSetAttribute(multiply_groups<FORM>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                sizeof(Shared)));
  if (error) return error;
  multiply_groups<FORM><<<blocks, THREADS, sizeof(Shared), static_cast<cudaStream_t>(stream)>>>(a);
  return static_cast<int>(cudaGetLastError());
#endif
}

}  // namespace

// Returns CUDA's error code. `blocks`: one a processor, an even number. `about`: Call; a type that no other file knows
// would hide this function from them.
extern "C" int moonbase_experts_bf16(const void* about, int form, int blocks, void* stream) {
  const Call& call = *static_cast<const Call*>(about);
  switch (form) {
    case GATE_UP: return launch<GATE_UP>(call, blocks, stream);
    case PRODUCT: return launch<PRODUCT>(call, blocks, stream);
    case GRADIENT: return launch<GRADIENT>(call, blocks, stream);
    default: return launch<WEIGHT_GRADIENT>(call, blocks, stream);
  }
}
