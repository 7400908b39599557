// A page of a 4-bit cache (one block of one head): what lies where, and indices to 16-bit values. The layout
// is kernels/kv4.py's.
#pragma once

#include <array>

#include "attention_tile.h"

namespace lutserve {

constexpr int64_t kChannels = 64;  // channels that share a scale
constexpr int64_t kUnit = 64;      // tokens whose values share scales, where they are coded by unit
constexpr int64_t kMostSize = 256;  // largest head size
constexpr int64_t kMostClasses = 4;

struct Layout {
  int64_t block_size, size;
  bool by_unit;

  int64_t groups() const { return (size + kChannels - 1) / kChannels; }
  int64_t key_scales() const { return block_size * size; }
  int64_t value_scales() const { return key_scales() + 2 * block_size * groups(); }
  int64_t tail() const {
    return value_scales() + 2 * (by_unit ? block_size / kUnit * size : block_size * groups());
  }
  int64_t bytes_per_token() const {
    return (tail() + (by_unit ? 2 * (kUnit - 1) * size : 0) + block_size - 1) / block_size;
  }
  // Bytes at which the indices of sixteen tokens begin, and at which one token's scale (of group 0) lies in an
  // array of tokens' scales; the next group's lies 2 * kGroup bytes further.
  int64_t keys(int64_t token) const { return token / kGroup * (kGroup / 2) * size; }
  int64_t values(int64_t token) const { return block_size * size / 2 + keys(token); }
  int64_t scale(int64_t token) const { return 2 * (token / kGroup * groups() * kGroup + token % kGroup); }
};

inline F32 load_scales(const uint8_t* from) {
  return cast<F32>(widen<Half>(load(reinterpret_cast<const uint16_t*>(from))));
}

// Sixteen values of 16 bits, and sixteen bytes that are indices of them.
#if defined(__AVX2__)

struct Table {
  __m128i low, high;  // bytes of the values

  explicit Table(const uint16_t* values) {
    alignas(16) uint8_t bytes[2][16];
    for (int i = 0; i < 16; ++i) bytes[0][i] = uint8_t(values[i]), bytes[1][i] = uint8_t(values[i] >> 8);
    low = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0]));
    high = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1]));
  }
};

using Indices = __m128i;

inline std::pair<Indices, Indices> halves(const uint8_t* from) {
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), mask = _mm_set1_epi8(15);
  return {_mm_and_si128(both, mask), _mm_and_si128(_mm_srli_epi16(both, 4), mask)};
}

// The first and the last eight values.
inline std::pair<__m128i, __m128i> look_up(const Table& table, Indices indices) {
  const __m128i low = _mm_shuffle_epi8(table.low, indices), high = _mm_shuffle_epi8(table.high, indices);
  return {_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high)};
}

// Sixteen values for a row and for the next one, at their places in a packed matrix.
template <class T>
inline void put(const Table& table, Indices indices, const Table& next_table, Indices next_indices, uint16_t* to,
                int64_t width) {
  const auto [a, b] = look_up(table, indices);
  const auto [c, d] = look_up(next_table, next_indices);
  const auto store = [](uint16_t* p, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); };
  if constexpr (std::is_same_v<T, Half>) {
    store(to, a), store(to + 8, b), store(to + width, c), store(to + width + 8, d);
  } else {
    store(to, _mm_unpacklo_epi16(a, c)), store(to + 8, _mm_unpackhi_epi16(a, c));
    store(to + 16, _mm_unpacklo_epi16(b, d)), store(to + 24, _mm_unpackhi_epi16(b, d));
  }
}

#else

struct Table {
  uint16_t values[16];

  explicit Table(const uint16_t* from) { std::memcpy(values, from, sizeof(values)); }
};

using Indices = std::array<uint8_t, 16>;

inline std::pair<Indices, Indices> halves(const uint8_t* from) {
  Indices low, high;
  for (int i = 0; i < 16; ++i) low[i] = from[i] & 15, high[i] = from[i] >> 4;
  return {low, high};
}

template <class T>
inline void put(const Table& table, const Indices& indices, const Table& next_table, const Indices& next_indices,
                uint16_t* to, int64_t width) {
  for (int i = 0; i < 16; ++i) {
    to[packed<T>(0, i, width)] = table.values[indices[i]];
    to[packed<T>(1, i, width)] = next_table.values[next_indices[i]];
  }
}

#endif

// Indices of a matrix [rows, width] to the packed matrix [rows * classes, width] of their values by `tables`, one
// for each class; rows even, width a multiple of 16, classes 1 or even.
template <class T>
inline void unpack(const uint8_t* from, int64_t rows, int64_t width, const Table* tables, int64_t classes,
                   uint16_t* to) {
  for (int64_t row = 0; row < rows; row += 2) {
    for (int64_t j = 0; j < width; j += 16) {
      const auto [even, odd] = halves(from + row / 2 * width + j);
      if (classes == 1) {
        put<T>(tables[0], even, tables[0], odd, to + packed<T>(row, j, width), width);
        continue;
      }
      for (int64_t c = 0; c < classes; c += 2) {
        put<T>(tables[c], even, tables[c + 1], even, to + packed<T>(row * classes + c, j, width), width);
        put<T>(tables[c], odd, tables[c + 1], odd, to + packed<T>((row + 1) * classes + c, j, width), width);
      }
    }
  }
}

}  // namespace lutserve
