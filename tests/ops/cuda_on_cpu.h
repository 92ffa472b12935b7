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
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define MOONBASE_ON_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) uint8_t* name = current().block->shared.data()

struct Dim { unsigned x; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- fibers ----------------------------------------------------------------------------------------------------------

struct Meeting {  // of all members of a warp or a block; what each brought lies in `words`
  int arrived = 0, generation = 0;
  std::vector<uint32_t> words, result;
};

struct Copy { void* to; const void* from; unsigned bytes; uint64_t* barrier; };

struct Block {
  std::vector<uint8_t> shared;
  std::vector<Meeting> warps;
  Meeting all;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Block* block;
  Dim thread, block_index;
  bool ended = false;
  const int* watched = nullptr;  // it waits until this is no longer `seen`
  int seen = 0;
  long sleeps_until = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Copy> copies;
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

// 0 when every thread has ended; -2 when they wait for one another for ever.
inline int run_on_cpu(std::function<void()> kernel, int blocks, int threads, int shared_bytes) {
  Machine& m = machine();
  m.fibers.clear();
  m.copies.clear();
  m.kernel = kernel;
  m.grid = blocks;
  m.threads = threads;
  std::vector<std::unique_ptr<Block>> all;
  for (int b = 0; b < blocks; ++b) {
    all.push_back(std::make_unique<Block>());
    all[b]->shared.assign(shared_bytes + 128, 0xA5);
    all[b]->warps.resize((threads + 31) / 32);
    for (int t = 0; t < threads; ++t) {
      auto fiber = std::make_unique<Fiber>();
      fiber->stack.resize(1 << 16);
      fiber->block = all[b].get();
      fiber->thread = {unsigned(t)};
      fiber->block_index = {unsigned(b)};
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack.data();
      fiber->context.uc_stack.ss_size = fiber->stack.size();
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
    for (Fiber* fiber : alive) {
      if (stands_still[fiber->block_index.x * warps_each + fiber->thread.x / 32] > m.round) continue;
      if (fiber->sleeps_until > m.round || (fiber->watched && *fiber->watched == fiber->seen)) continue;
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
    size_t kept = 0;
    for (Fiber* fiber : alive) if (!fiber->ended) alive[kept++] = fiber;
    alive.resize(kept);
  }
  return m.copies.empty() ? 0 : -3;
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
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T, class V> T atomicAdd(T* at, V more) { const T before = *at; *at += more; return before; }
template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
inline int min(int a, int b) { return a < b ? a : b; }
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
inline void copy_start(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  std::memset(to, 0x7F, bytes);
  machine().copies.push_back({to, from, bytes, barrier});
}
inline void barrier_wait(uint64_t* barrier, unsigned parity) { while ((*barrier & 1) == parity) give_way(); }
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
