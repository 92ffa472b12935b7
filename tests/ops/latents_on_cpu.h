// What `latent_attention_hopper.cu` asks of the chip beside what `cuda_on_cpu.h` has.

#pragma once

// --- sums that wait in fp16 ------------------------------------------------------------------------------------------
inline void summers_meet() {
  std::vector<Meeting>& groups = of_block().groups;
  if (groups.size() < 8) groups.resize(8);
  meet(groups[7], 256, current().thread.x - 128);
  if (machine().random() % 64 == 0) sleep(machine().random() % 1024);
}
inline unsigned __float_as_uint(float value) { return float_bits(value); }
inline unsigned half_pair(float low, float high) {
  const _Float16 both[2] = {_Float16(low), _Float16(high)};
  unsigned pair;
  std::memcpy(&pair, both, 4);
  return pair;
}
inline float2 floats_of(unsigned half_pair) {
  _Float16 both[2];
  std::memcpy(both, &half_pair, 4);
  return {float(both[0]), float(both[1])};
}

// --- rows of 576 numbers by the copy engine, eight at once -----------------------------------------------------------
#define __grid_constant__
struct RowMap { const uint8_t* base; uint64_t lines, line_bytes, pages, page_bytes; };
inline int make_row_map(RowMap* map, const void* base, uint64_t lines, uint64_t line_bytes, uint64_t pages,
                    uint64_t page_bytes) {
  if ((reinterpret_cast<uintptr_t>(base) | line_bytes | page_bytes) % 16 || lines == 0 || pages == 0) return 1;
  *map = {static_cast<const uint8_t*>(base), lines, line_bytes, pages, page_bytes};
  return 0;
}
inline void copy_lines(void* to, const RowMap& map, int line, int page, uint64_t* barrier, uint64_t) {
  if (address_of(to) % 1024 || line < 0 || page < 0) std::abort();
  announced()[barrier] -= 8 * 1152;
  for (unsigned chunk = 0; chunk < 9; ++chunk)
    for (unsigned row = 0; row < 8; ++row)
      for (unsigned piece = 0; piece < 8; ++piece) {
        const uint64_t from = page * map.page_bytes + (line + row) * map.line_bytes + chunk * 128 + piece * 16;
        const bool there = line + row < map.lines && unsigned(page) < map.pages;
        copy_16(static_cast<char*>(to) + chunk * 1024 + row * 128 + ((piece ^ row) << 4), map.base + from, there);
      }
  copies_arrive(barrier);
}
inline void prefetch_map(const RowMap&) {}
inline void add_release(unsigned* counter) { ++*counter; }
inline void multiply_values(float* sums, uint64_t a, uint64_t b) { ask_for_product(sums, 128, a, b, true, true); }
