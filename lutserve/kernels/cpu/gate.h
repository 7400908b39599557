// A gated activation as a look-up, table[bits(gate)] * up, for one row.
#pragma once

#include <cstring>

#include "vec.h"

namespace lutserve {

// Sixteen look-ups as scalar loads, four of them packed into each 64-bit register. On Zen 4 this is a
// quarter faster than the gather instruction (with its odd/even shift for 16-bit entries) and than one
// insert an entry; on Intel a gather is at best equal, and far slower under the microcode against Downfall.
inline Bits16 lookup(const uint16_t* table, const uint16_t* keys) {
#if defined(__AVX2__)
  uint64_t words[4];
  for (int i = 0; i < 4; ++i) {
    const uint16_t* k = keys + 4 * i;
    words[i] = uint64_t(table[k[0]]) | uint64_t(table[k[1]]) << 16 | uint64_t(table[k[2]]) << 32 |
               uint64_t(table[k[3]]) << 48;
  }
  return from_words(words);
#else
  Bits16 bits;
  for (int i = 0; i < kLanes; ++i) bits.lane[i] = table[keys[i]];
  return bits;
#endif
}

template <class T>
void gate_block(const uint16_t* gate, const uint16_t* up, const uint16_t* table, uint16_t* out) {
  store(out, narrow<T>(widen<T>(lookup(table, gate)) * widen<T>(load(up))));
}

// out[i] = table[gate[i]] * up[i] for n values, each rounded once.
template <class T>
void gate_row(const uint16_t* gate, const uint16_t* up, const uint16_t* table, uint16_t* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) gate_block<T>(gate + i, up + i, table, out + i);
  if (i == n) return;
  const size_t tail = size_t(n - i) * sizeof(uint16_t);
  uint16_t gates[kLanes] = {}, ups[kLanes] = {}, outs[kLanes];
  std::memcpy(gates, gate + i, tail);
  std::memcpy(ups, up + i, tail);
  gate_block<T>(gates, ups, table, outs);
  std::memcpy(out + i, outs, tail);
}

}  // namespace lutserve
