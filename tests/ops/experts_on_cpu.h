// What `experts_hopper.cu` asks of the chip beside what `cuda_on_cpu.h` has: tensor copies, clusters of two blocks, and
// products with 256 columns.

#pragma once
#include "cuda_on_cpu.h"

#include <map>

#define __grid_constant__
#define __cluster_dims__(...)

// Rows of bf16 numbers, and the box that is copied at a time: rows, and columns in sixty-fours.
struct Map {
  const uint8_t* matrix;
  long rows;
  int blocks, box_rows, box_blocks;
};

// A product of 64 rows by 256 columns, a warp's 16 rows of it: carried out as late as the warp waits, or at once.
struct Tile {
  float* sums[32];
  uint64_t a, b;
  int lanes = 0;
  bool m_major, n_major, add, wrong = false;
};
struct Tiles { std::deque<Tile> all; size_t done = 0; };
struct Asked { size_t count = 0; std::vector<size_t> commits; };

struct State {
  std::map<const Block*, Meeting> clusters;
  std::map<const uint64_t*, long> awaited;  // bytes of a barrier's phase
  std::map<const Meeting*, Tiles> tiles;    // of a warp
  std::map<const Fiber*, Asked> asked;      // tiles of a thread, and how many they were at each commit
};
inline State& state() { static State state; return state; }

inline int describe(Map& map, const void* matrix, int64_t rows, int columns, int box_rows, int box_blocks) {
  state() = {};  // a launch begins
  if (reinterpret_cast<uintptr_t>(matrix) % 16 || columns % 64 || rows <= 0 || box_rows > 256) return -1;
  map = {static_cast<const uint8_t*>(matrix), long(rows), columns / 64, box_rows, box_blocks};
  return 0;
}

inline int rank_in_cluster() { return current().block_index.x % 2; }
inline Block& block_of(int rank) {
  Machine& m = machine();
  const unsigned mine = current().block_index.x - m.fibers[0]->block_index.x;
  return *m.fibers[(mine / 2 * 2 + rank) * m.threads]->block;
}
template <class T> T* same_place(T* here, int rank) {
  return reinterpret_cast<T*>(block_of(rank).shared.data() + address_of(here));
}

inline void cluster_meets() {
  Meeting& meeting = state().clusters[&block_of(0)];
  meet(meeting, 2 * machine().threads, rank_in_cluster() * machine().threads + current().thread.x);
}
inline void barrier_arrive_at(uint64_t* barrier, int rank) { barrier_arrive(same_place(barrier, rank)); }

// A phase ends once it has been announced and so many boxes have come; the bytes are right then.
inline void barrier_init_boxes(uint64_t* barrier, unsigned boxes) {
  barrier_init(barrier, boxes + 1);
  state().awaited[barrier] = 0;
}
inline void boxes_announce(uint64_t* barrier, unsigned bytes) {
  state().awaited[barrier] += bytes;
  arrive_at(barrier);
}
template <bool EVERYWHERE> void copy_box(void* to, const Map& map, int row, int block, uint64_t* barrier) {
  for (int rank = 0; rank < 2; ++rank) {
    if (!EVERYWHERE && rank != rank_in_cluster()) continue;
    if (address_of(to) % 1024) std::abort();
    uint8_t* target = same_place(static_cast<uint8_t*>(to), rank);
    for (int line = 0; line < map.box_rows * map.box_blocks; ++line) {
      const long from_row = row + line % map.box_rows;
      const int from_block = block + line / map.box_rows;
      const bool there = from_row >= 0 && from_row < map.rows && from_block < map.blocks;
      for (int piece = 0; piece < 8; ++piece)
        copy_16(target + line * 128 + (piece ^ (line % 8)) * 16,
                map.matrix + ((from_row * map.blocks + from_block) * 64 + piece * 8) * 2, there);
    }
    uint64_t* theirs = same_place(barrier, rank);
    copies_arrive(theirs);
    state().awaited[theirs] -= map.box_rows * map.box_blocks * 128;
    if ((*theirs >> 32 & 0xFFFF) == 1 && state().awaited[theirs] != 0) std::abort();
  }
}

inline void store(uint16_t* to, const unsigned (&pairs)[4]) { std::memcpy(to, pairs, 16); }
inline void load(unsigned (&pairs)[4], const uint16_t* from) { std::memcpy(pairs, from, 16); }
inline void fetch_ahead(const void*) {}
inline void clear_16(void* to) {
  for (int word = 0; word < 4; ++word) store_operand(static_cast<unsigned*>(to) + word, 0);
}

inline void carry_out(const Block& block, const Tile& tile, int warp) {
  float a[16][16];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k) a[row][k] = element(block, tile.a, tile.m_major, warp % 4 * 16 + row, k);
  for (int column = 0; column < 256; ++column) {
    float b[16];
    for (int k = 0; k < 16; ++k) b[k] = element(block, tile.b, tile.n_major, column, k);
    for (int row = 0; row < 16; ++row) {
      float& sum = tile.sums[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
      float total = tile.add ? sum : 0;
      for (int k = 0; k < 16; ++k) total += a[row][k] * b[k];
      sum = tile.wrong ? NAN : total;
    }
  }
}

inline void tiles_begin() { current().begun = true; }
template <bool M_MAJOR, bool N_MAJOR> void multiply_tile(float (&sums)[128], uint64_t a, uint64_t b, bool add) {
  Tiles& tiles = state().tiles[&warp_meeting()];
  Asked& mine = state().asked[&current()];
  if (tiles.all.size() == mine.count) tiles.all.push_back({{}, a, b, 0, M_MAJOR, N_MAJOR, add});
  Tile& tile = tiles.all[mine.count++];
  tile.sums[lane_()] = sums;
  tile.wrong |= !current().begun || current().unfenced || tile.a != a || tile.b != b || tile.add != add;
  if (++tile.lanes == 32 && tiles.done + 1 == mine.count && machine().random() % 2)
    carry_out(*current().block, tile, current().thread.x / 32), ++tiles.done;
}
inline void tiles_commit() { state().asked[&current()].commits.push_back(state().asked[&current()].count); }
template <int LEFT> void tiles_wait() {
  const Asked& mine = state().asked[&current()];
  if (LEFT == 0) current().begun = false;
  if (mine.commits.size() <= LEFT) return;
  const size_t until = mine.commits[mine.commits.size() - 1 - LEFT];
  meet(warp_meeting(), 32, lane_(), {}, [&](Meeting&) {
    Tiles& tiles = state().tiles[&warp_meeting()];
    for (; tiles.done < until; ++tiles.done)
      carry_out(*current().block, tiles.all[tiles.done], current().thread.x / 32);
  });
}
inline float reciprocal(float x) { return 1.0f / x; }

// In a cluster an address also names the block.
inline unsigned address_in_cluster(const void* shared) { return address_of(shared) | rank_in_cluster() << 24; }
#define address_of address_in_cluster
