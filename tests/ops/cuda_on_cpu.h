// Runs a CUDA kernel on the CPU, one thread of the machine for all of the kernel's: a fiber each, which go on in random
// order and give way wherever they wait for one another. Slow, and enough to see whether a kernel's indices, barriers
// and hand-overs are right. Bulk copies end at a random later moment, and what they will overwrite is poisoned at once.
//
// Only what `moonbase/ops/*.cu` use is here. Meanings follow the PTX manual (mma: "Matrix Fragments for mma.m16n8k16").

#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define MOONBASE_ON_CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) uint8_t* name = current().block->shared.data()

struct Dim { unsigned x; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- fibers ----------------------------------------------------------------------------------------------------------

struct Meeting {  // of all members of a warp or a block; what each brought lies in `words`
  int arrived = 0, generation = 0;
  std::vector<uint32_t> words, result;
};

struct Copy { void* to; const void* from; unsigned bytes; uint64_t* barrier; };

// Copies of one thread up to its arrival at a barrier; without a source, zeros.
struct Batch { std::vector<std::pair<void*, const void*>> copies; uint64_t* barrier = nullptr; };

// A product of 64 rows by some columns, a warp's 16 rows of it.
struct Product {
  float* sums[32];
  uint64_t a, b;
  int columns, lanes = 0;
  bool turned, add, wrong = false;
};

struct Block {
  std::vector<uint8_t> shared;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<std::deque<Product>> products;  // of a warp, in order; all but the last few are done
  std::vector<size_t> products_done;
};

struct Fiber {
  ucontext_t context;
  Block* block;
  Dim thread, block_index;
  bool ended = false;
  const int* watched = nullptr;  // it waits until this is no longer `seen`
  int seen = 0;
  long sleeps_until = 0;
  std::deque<Batch> batches;  // all but the last have arrivals
  std::vector<std::pair<unsigned*, unsigned>> unseen;  // operands stored, and not yet visible to products
  bool unfenced = false, begun = false;
  size_t products = 0;
  std::vector<size_t> groups;  // how many products there were at each commit
};

constexpr int STACK = 1 << 16;

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Copy> copies;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<Fiber*> copying;  // those with batches under way
  ucontext_t scheduler;
  Fiber* running = nullptr;
  unsigned grid = 0, threads = 0;
  long round = 0;
  std::mt19937 random{0};
  std::function<void()> kernel;
};

inline Machine& machine() { static Machine machine; return machine; }
inline Fiber& current() { return *machine().running; }
inline void sleep(long rounds) {
  current().sleeps_until = machine().round + rounds;
  swapcontext(&current().context, &machine().scheduler);
}
inline void give_way() { swapcontext(&current().context, &machine().scheduler); }

#define threadIdx (current().thread)
#define blockIdx (current().block_index)
inline Dim grid_() { return {machine().grid}; }
inline Dim block_() { return {machine().threads}; }
#define gridDim (grid_())
#define blockDim (block_())

inline void fiber_main() {
  machine().kernel();
  current().ended = true;
  give_way();
}

inline void arrive_at(uint64_t* barrier);

// Some of the batches end.
inline void end_batches(Machine& m) {
  for (size_t i = 0; i < m.copying.size();) {
    std::deque<Batch>& batches = m.copying[i]->batches;
    if (m.random() % 16 || batches.front().barrier == nullptr) { ++i; continue; }
    for (const auto& [to, from] : batches.front().copies)
      from ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
    arrive_at(batches.front().barrier);
    batches.pop_front();
    if (batches.empty()) m.copying[i] = m.copying.back(), m.copying.pop_back();
    else ++i;
  }
}

// 0 when every thread has ended; -2 when they wait for one another for ever. Blocks `first` and on.
inline int run_together(int first, int blocks, int threads, int shared_bytes) {
  Machine& m = machine();
  m.fibers.clear();
  m.copies.clear();
  m.copying.clear();
  std::vector<std::unique_ptr<Block>> all;
  for (int b = 0; b < blocks; ++b) {
    all.push_back(std::make_unique<Block>());
    all[b]->shared.assign(shared_bytes + 128, 0xA5);
    all[b]->warps.resize((threads + 31) / 32);
    all[b]->products.resize((threads + 31) / 32);
    all[b]->products_done.resize((threads + 31) / 32);
    for (int t = 0; t < threads; ++t) {
      auto fiber = std::make_unique<Fiber>();
      if (m.stacks.size() == m.fibers.size()) m.stacks.emplace_back(new char[STACK]);
      fiber->block = all[b].get();
      fiber->thread = {unsigned(t)};
      fiber->block_index = {unsigned(first + b)};
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = m.stacks[m.fibers.size()].get();
      fiber->context.uc_stack.ss_size = STACK;
      makecontext(&fiber->context, fiber_main, 0);
      m.fibers.push_back(std::move(fiber));
    }
  }
  const int warps_each = (threads + 31) / 32;
  std::vector<long> stands_still(blocks * warps_each);
  std::vector<Fiber*> alive;
  for (auto& fiber : m.fibers) alive.push_back(fiber.get());
  for (m.round = 0; !alive.empty(); ++m.round) {
    if (m.round > 2000000) return -2;
    std::shuffle(alive.begin(), alive.end(), m.random);
    // Now and then a warp stands still, and others get far ahead of it.
    if (m.random() % 16 == 0) stands_still[m.random() % stands_still.size()] = m.round + m.random() % 256;
    long next = m.round + 1024;  // when somebody can go on
    for (Fiber* fiber : alive) {
      if (fiber->watched && *fiber->watched == fiber->seen) continue;
      const long still = stands_still[(fiber->block_index.x - first) * warps_each + fiber->thread.x / 32];
      const long from = std::max(fiber->sleeps_until, still);
      next = std::min(next, std::max(from, m.round + 1));
      if (from > m.round) continue;
      m.running = fiber;
      swapcontext(&m.scheduler, &fiber->context);
    }
    for (size_t i = 0; i < m.copies.size();) {
      if (m.random() % 64) { ++i; continue; }
      const Copy copy = m.copies[i];
      std::memcpy(copy.to, copy.from, copy.bytes);
      ++*copy.barrier;
      m.copies.erase(m.copies.begin() + i);
    }
    end_batches(m);
    size_t kept = 0;
    for (Fiber* fiber : alive) if (!fiber->ended) alive[kept++] = fiber;
    alive.resize(kept);
    if (m.copies.empty() && m.copying.empty()) m.round = next - 1;
  }
  return m.copies.empty() && m.copying.empty() ? 0 : -3;
}

// `together`: how many blocks run at the same time; all of them, where they wait for one another.
inline int run_on_cpu(std::function<void()> kernel, int blocks, int threads, int shared_bytes, int together = 0) {
  Machine& m = machine();
  m.kernel = kernel;
  m.grid = blocks;
  m.threads = threads;
  const int step = together ? together : blocks;
  for (int first = 0; first < blocks; first += step)
    if (const int error = run_together(first, std::min(step, blocks - first), threads, shared_bytes)) return error;
  return 0;
}

// Everybody brings words; whoever comes last makes the result.
inline void meet(Meeting& meeting, int members, int member, const std::vector<uint32_t>& brings = {},
                 const std::function<void(Meeting&)>& make = {}) {
  meeting.words.resize(members * brings.size());
  std::copy(brings.begin(), brings.end(), meeting.words.begin() + member * brings.size());
  const int generation = meeting.generation;
  if (++meeting.arrived == members) {
    meeting.arrived = 0;
    if (make) make(meeting);
    ++meeting.generation;
  }
  current().watched = &meeting.generation;
  current().seen = generation;
  while (meeting.generation == generation) give_way();
  current().watched = nullptr;
}

inline Meeting& warp_meeting() { return current().block->warps[current().thread.x / 32]; }
inline int lane_() { return current().thread.x % 32; }

// `take` words for every lane, made of what all lanes bring.
inline std::vector<uint32_t> warp_exchange(const std::vector<uint32_t>& brings, int take,
                                           const std::function<void(const uint32_t*, uint32_t*)>& make) {
  Meeting& meeting = warp_meeting();
  meet(meeting, 32, lane_(), brings, [&](Meeting& m) {
    m.result.assign(32 * take, 0);
    make(m.words.data(), m.result.data());
  });
  const std::vector<uint32_t> takes(meeting.result.begin() + lane_() * take, meeting.result.begin() + (lane_() + 1) * take);
  meet(meeting, 32, lane_());  // nobody brings anything new before all have taken
  return takes;
}

inline void __syncthreads() {
  meet(current().block->all, machine().threads, current().thread.x);
  // One or the other dawdles, so that a barrier which should follow is missed.
  if (machine().random() % 64 == 0) sleep(machine().random() % 1024);
}
inline void __syncwarp() { meet(warp_meeting(), 32, lane_()); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { give_way(); }

inline int __shfl_sync(unsigned, int value, int source) {
  return warp_exchange({uint32_t(value)}, 1, [&](const uint32_t* words, uint32_t* result) {
    for (int lane = 0; lane < 32; ++lane) result[lane] = words[source];
  })[0];
}
inline int __shfl_up_sync(unsigned, int value, int distance) {
  return warp_exchange({uint32_t(value)}, 1, [&](const uint32_t* words, uint32_t* result) {
    for (int lane = 0; lane < 32; ++lane) result[lane] = words[lane >= distance ? lane - distance : lane];
  })[0];
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return warp_exchange({value}, 1, [](const uint32_t* words, uint32_t* result) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= (words[lane] != 0) << lane;
    for (int lane = 0; lane < 32; ++lane) result[lane] = all;
  })[0];
}
template <class T> T __shfl_xor_sync(unsigned, T value, int distance) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t other = warp_exchange({bits}, 1, [&](const uint32_t* words, uint32_t* result) {
    for (int lane = 0; lane < 32; ++lane) result[lane] = words[lane ^ distance];
  })[0];
  std::memcpy(&value, &other, 4);
  return value;
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T, class V> T atomicAdd(T* at, V more) { const T before = *at; *at += more; return before; }
template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline unsigned float_bits(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __expf(float x) { return std::exp(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return result;
}

// --- what `experts_int4_hopper.cu` asks of the chip ---------------------------------------------------------------------------

inline void barrier_init(uint64_t* barrier) { *barrier = 0; }  // here: how many phases have ended
inline void barriers_visible() {}
inline void copy_start(void* to, const void* from, unsigned bytes, uint64_t* barrier, bool) {
  std::memset(to, 0x7F, bytes);
  machine().copies.push_back({to, from, bytes, barrier});
}
inline void barrier_wait(uint64_t* barrier, unsigned parity) {
  const int& phases = reinterpret_cast<const int&>(*barrier);
  while ((phases & 1) == int(parity)) {
    current().watched = &phases;
    current().seen = phases;
    give_way();
  }
  current().watched = nullptr;
  current().unfenced = true;  // what arrived is not visible to wgmma yet
}
inline unsigned acquire(const unsigned* counter) { return *counter; }
inline unsigned and_or(unsigned word, unsigned mask, unsigned bits) { return (word & mask) | bits; }
inline uint16_t to_bf16(float value) {
  const unsigned bits = float_bits(value);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline void multiply(float (&sums)[4], const unsigned (&rows)[4], unsigned tokens_low, unsigned tokens_high,
                     const float (&start)[4]) {
  const std::vector<uint32_t> brings = {rows[0], rows[1], rows[2], rows[3], tokens_low, tokens_high,
                                        float_bits(start[0]), float_bits(start[1]), float_bits(start[2]),
                                        float_bits(start[3])};
  const auto takes = warp_exchange(brings, 4, [](const uint32_t* words, uint32_t* result) {
    double a[16][16], b[16][8];
    const auto half = [](uint32_t word, int which) { return double(__uint_as_float(which ? word & 0xFFFF0000u : word << 16)); };
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t* mine = words + lane * 10;
      const int row = lane / 4, quarter = lane % 4;
      for (int which = 0; which < 2; ++which) {
        const int k = 2 * quarter + which;
        a[row][k] = half(mine[0], which);
        a[row + 8][k] = half(mine[1], which);
        a[row][k + 8] = half(mine[2], which);
        a[row + 8][k + 8] = half(mine[3], which);
        b[k][row] = half(mine[4], which);
        b[k + 8][row] = half(mine[5], which);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
        double sum = __uint_as_float(words[lane * 10 + 6 + i]);
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][token];
        result[lane * 4 + i] = float_bits(float(sum));
      }
  });
  for (int i = 0; i < 4; ++i) sums[i] = __uint_as_float(takes[i]);
}

// --- what `latent_attention_hopper.cu` asks of the chip --------------------------------------------------------------

// A barrier with a count: phases that have ended, arrivals still awaited (from bit 32), those of a phase (from bit 48).
inline void barrier_init(uint64_t* barrier, unsigned count) {
  *barrier = uint64_t(count) << 48 | uint64_t(count) << 32;
}
inline void arrive_at(uint64_t* barrier) {
  *barrier -= uint64_t{1} << 32;
  if ((*barrier >> 32 & 0xFFFF) == 0) *barrier += (*barrier >> 48 << 32) + 1;
}
inline void barrier_arrive(uint64_t* barrier) {
  arrive_at(barrier);
  if (machine().random() % 32 == 0) sleep(machine().random() % 256);  // what it gave away is used by others meanwhile
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline uint64_t cache_policy(bool) { return 0; }
inline void kernel_before_has_ended() {}
inline void copy_16(void* to, const void* from, bool there) {
  Fiber& fiber = current();
  if (fiber.batches.empty()) machine().copying.push_back(&fiber);
  if (fiber.batches.empty() || fiber.batches.back().barrier) fiber.batches.emplace_back();
  std::memset(to, 0x7F, 16);
  fiber.batches.back().copies.push_back({to, there ? from : nullptr});
}
template <int SLICE>
inline void copy_pieces(void* line, unsigned within, const void* from, bool there, uint64_t) {
  for (int chunk = 0; chunk < 9; ++chunk)
    if ((chunk == 8 ? 0 : chunk / 2 % 2 + 1) == SLICE)
      copy_16(static_cast<char*>(line) + within + chunk * 8192, static_cast<const char*>(from) + chunk * 128, there);
}
inline void copies_arrive(uint64_t* barrier) { current().batches.back().barrier = barrier; }

// What was stored is poison for products until its thread makes it visible.
inline void store_operand(void* to, unsigned word) {
  std::memset(to, 0x7F, 4);
  current().unseen.push_back({static_cast<unsigned*>(to), word});
}
inline void operands_visible() {
  for (const auto& [to, word] : current().unseen) *to = word;
  current().unseen.clear();
  current().unfenced = false;
}

inline unsigned address_of(const void* shared) {
  return static_cast<const uint8_t*>(shared) - current().block->shared.data();
}

// Element (line, depth) of an operand, after the manual's figures of layouts with 128-byte swizzling. Turned: columns
// are neighbours in memory, 64 in a row of 128 bytes, a row for each of eight steps of the depth.
inline float element(const Block& block, uint64_t operand, bool turned, int line, int depth) {
  const unsigned start = (operand & 0x3FFF) << 4, leading = (operand >> 16 & 0x3FFF) << 4;
  const unsigned stride = (operand >> 32 & 0x3FFF) << 4;
  unsigned at = turned ? line / 64 * leading + line % 64 * 2 + depth / 8 * stride + depth % 8 * 128
                       : line / 8 * stride + line % 8 * 128 + depth * 2;
  at += start;
  at ^= (at >> 7 & 7) << 4;
  if (operand >> 62 != 1 || at + 2 > block.shared.size()) return NAN;
  uint16_t bits;
  std::memcpy(&bits, block.shared.data() + at, 2);
  return __uint_as_float(unsigned(bits) << 16);
}

inline void carry_out(const Block& block, const Product& product, int warp) {
  float a[16][16];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k) a[row][k] = element(block, product.a, false, warp % 4 * 16 + row, k);
  for (int column = 0; column < product.columns; ++column) {
    float b[16];
    for (int k = 0; k < 16; ++k) b[k] = element(block, product.b, product.turned, column, k);
    for (int row = 0; row < 16; ++row) {
      float& sum = product.sums[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
      float total = product.add ? sum : 0;
      for (int k = 0; k < 16; ++k) total += a[row][k] * b[k];
      sum = product.wrong ? NAN : total;
    }
  }
}

inline void products_begin() { current().begun = true; }
inline void products_commit() {
  current().groups.push_back(current().products);
}

// A product is carried out when its last lane asks for it, or as late as its warp waits for it.
inline void ask_for_product(float* sums, int columns, uint64_t a, uint64_t b, bool turned, bool add) {
  Fiber& fiber = current();
  const int warp = fiber.thread.x / 32;
  std::deque<Product>& products = fiber.block->products[warp];
  if (products.size() == fiber.products) products.push_back({{}, a, b, columns, 0, turned, add});
  Product& product = products[fiber.products++];
  product.sums[lane_()] = sums;
  product.wrong |= !fiber.begun || fiber.unfenced || product.a != a || product.b != b || product.columns != columns ||
                   product.add != add;
  size_t& done = fiber.block->products_done[warp];
  if (++product.lanes == 32 && done + 1 == fiber.products && machine().random() % 2)
    carry_out(*fiber.block, product, warp), ++done;
}
inline void multiply_scores(float (&sums)[32], uint64_t a, uint64_t b, bool add) {
  ask_for_product(sums, 64, a, b, false, add);
}
inline void multiply_values(float (&sums)[64], uint64_t a, uint64_t b, bool add) {
  ask_for_product(sums, 128, a, b, true, add);
}

template <int LEFT> void products_wait() {
  Fiber& fiber = current();
  const int warp = fiber.thread.x / 32;
  if (LEFT == 0) fiber.begun = false;
  if (fiber.groups.size() <= LEFT) return;
  const size_t until = fiber.groups[fiber.groups.size() - 1 - LEFT];
  meet(warp_meeting(), 32, lane_(), {}, [&](Meeting&) {
    for (size_t& done = fiber.block->products_done[warp]; done < until; ++done)
      carry_out(*fiber.block, fiber.block->products[warp][done], warp);
  });
}

template <int COUNT> void registers_give() {}
template <int COUNT> void registers_take() {}
inline float exp2_of(float x) { return std::exp2(x); }
inline unsigned bf16_pair(float low, float high) { return to_bf16(low) | unsigned(to_bf16(high)) << 16; }

// --- what `experts_int4_prompt_hopper.cu` asks of the chip -----------------------------------------------------------
#include <cstdlib>
#include <map>

struct RowsProduct {  // with a left operand in registers: a warp's 16 rows, read as late as the product is carried out
  float* sums[32];
  const unsigned* rows[32];
  uint64_t tokens;
  int columns, lanes = 0;
  bool wrong = false;
};
struct CopyOut { void* to; const void* from; unsigned bytes; };

struct More {  // of a fiber's warp, its group or its thread; what is over is taken away
  std::deque<RowsProduct> products;  // some of the first are done
  size_t done = 0;
  std::vector<Meeting> groups;
  std::vector<CopyOut> copies;
  std::vector<const unsigned*> changed;  // operands written since the last fence, as far as it told
  size_t asked = 0;
  std::vector<size_t> commits;
};
inline std::map<std::pair<const void*, int>, More>& more() {
  static std::map<std::pair<const void*, int>, More> all;
  return all;
}
inline More& of_warp() { return more()[{current().block, current().thread.x / 32}]; }
inline More& of_block() { return more()[{current().block, -1}]; }
inline More& of_thread() { return more()[{current().block, 1024 + current().thread.x}]; }

// Its phases end with `copies` bulk copies. Bytes that were announced and those that came are compared.
inline std::map<const uint64_t*, long>& announced() { static std::map<const uint64_t*, long> bytes; return bytes; }
inline void barrier_init_copies(uint64_t* barrier, unsigned copies) {
  barrier_init(barrier, copies);
  announced()[barrier] = 0;
}
inline void copies_announce(uint64_t* barrier, unsigned bytes) {
  if (announced()[barrier] != 0) std::abort();
  announced()[barrier] += bytes;
}
inline void copy_in(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  if ((reinterpret_cast<uintptr_t>(from) | address_of(to) | bytes) % 16) std::abort();
  announced()[barrier] -= bytes;
  for (unsigned at = 0; at < bytes; at += 16)
    copy_16(static_cast<char*>(to) + at, static_cast<const char*>(from) + at, true);
  copies_arrive(barrier);
}
inline void copy_in_once(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  copy_in(to, from, bytes, barrier);
}
inline void copies_wait(uint64_t* barrier, unsigned parity) {
  const bool unfenced = current().unfenced;
  barrier_wait(barrier, parity);
  current().unfenced = unfenced;  // the copies' proxy is the tensor core's
}

// Read as late as may be: when the thread waits for it.
inline void copy_out(void* to, const void* from, unsigned bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | address_of(from) | bytes) % 16) std::abort();
  of_thread().copies.push_back({to, from, bytes});
}
inline void copies_out_commit() {}
inline void copies_out_wait() {
  for (const CopyOut& copy : of_thread().copies) std::memcpy(copy.to, copy.from, copy.bytes);
  of_thread().copies.clear();
}

inline void group_meets(int group) {
  std::vector<Meeting>& groups = of_block().groups;
  if (groups.size() < 8) groups.resize(8);
  meet(groups[group], 128, current().thread.x % 128);
  if (machine().random() % 64 == 0) sleep(machine().random() % 1024);
}

template <int COUNT> void store_turned(void* to, const unsigned (&matrices)[4]) {
  const unsigned at = address_of(to);
  const auto words = warp_exchange({matrices[0], matrices[1], matrices[2], matrices[3], at}, 32 * 5,
                                   [](const uint32_t* words, uint32_t* result) {
    for (int lane = 0; lane < 32; ++lane) std::copy(words, words + 32 * 5, result + lane * 32 * 5);
  });
  // Each lane stores the 16 bytes that it names: row `lane mod 8` of what is turned, column of the fragment.
  const int lane = lane_(), matrix = lane / 8, column = lane % 8;
  if (matrix >= COUNT) return;
  for (int pair = 0; pair < 4; ++pair) {
    unsigned word = 0;
    for (int which = 0; which < 2; ++which) {
      const unsigned from = words[(2 * pair + which) * 4 * 5 + column / 2 * 5 + matrix];
      word |= (from >> (column % 2 * 16) & 0xFFFF) << (16 * which);
    }
    store_operand(static_cast<char*>(to) + pair * 4, word);
  }
}

inline unsigned add_pairs(unsigned a, unsigned b) {
  return bf16_pair(__uint_as_float(a << 16) + __uint_as_float(b << 16),
                   __uint_as_float(a & 0xFFFF0000u) + __uint_as_float(b & 0xFFFF0000u));
}
inline unsigned multiply_pairs(unsigned a, unsigned b) {
  return bf16_pair(__uint_as_float(a << 16) * __uint_as_float(b << 16),
                   __uint_as_float(a & 0xFFFF0000u) * __uint_as_float(b & 0xFFFF0000u));
}
inline float __fdividef(float a, float b) { return a / b; }
inline int unknown(int value) { return value; }

inline void carry_out(const Block& block, const RowsProduct& product) {
  float a[16][16];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int which = 0; which < 2; ++which) {
        const unsigned word = product.rows[lane][i];
        a[lane / 4 + i % 2 * 8][lane % 4 * 2 + which + i / 2 * 8] =
            __uint_as_float(which ? word & 0xFFFF0000u : word << 16);
      }
  for (int column = 0; column < product.columns; ++column) {
    float b[16];
    for (int k = 0; k < 16; ++k) b[k] = element(block, product.tokens, false, column, k);
    for (int row = 0; row < 16; ++row) {
      float& sum = product.sums[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
      float total = sum;
      for (int k = 0; k < 16; ++k) total += a[row][k] * b[k];
      sum = product.wrong ? NAN : total;
    }
  }
}

template <int COUNT> void sums_begin(unsigned (&rows)[COUNT][4]) {
  current().begun = true;
  for (auto& four : rows) of_thread().changed.push_back(four);
}
template <int COUNT> void multiply_rows(float (&sums)[COUNT], const unsigned (&rows)[4], unsigned low, unsigned high) {
  const uint64_t tokens = uint64_t(high) << 32 | low;
  More& mine = of_thread();
  More& warp = of_warp();
  const auto fenced = std::find(mine.changed.begin(), mine.changed.end(), rows);
  const bool wrong = fenced == mine.changed.end() || !current().begun || current().unfenced;
  if (fenced != mine.changed.end()) mine.changed.erase(fenced);  // a fence for every use
  if (warp.products.size() == mine.asked) warp.products.push_back({{}, {}, tokens, COUNT * 2});
  RowsProduct& product = warp.products[mine.asked++];
  product.sums[lane_()] = sums;
  product.rows[lane_()] = rows;
  product.wrong |= wrong || product.tokens != tokens || product.columns != COUNT * 2;
  if (++product.lanes == 32 && warp.done + 1 == mine.asked && machine().random() % 2)
    carry_out(*current().block, product), ++warp.done;
}
inline void sums_commit() { of_thread().commits.push_back(of_thread().asked); }
template <int LEFT> void sums_wait() {
  More& mine = of_thread();
  if (LEFT == 0) current().begun = false;
  if (mine.commits.size() <= LEFT) return;
  const size_t until = mine.commits[mine.commits.size() - 1 - LEFT];
  More& warp = of_warp();
  Block& block = *current().block;
  meet(warp_meeting(), 32, lane_(), {}, [&](Meeting&) {
    for (; warp.done < until; ++warp.done) carry_out(block, warp.products[warp.done]);
  });
}
