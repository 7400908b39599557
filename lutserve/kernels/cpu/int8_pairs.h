// int8_linear's tile for every instruction set without VNNI: bytes are widened to 16 bit, multiplied and added
// in pairs to 32 bit (vpmaddwd), which is exact. The instruction for pairs of bytes saturates at 16 bit.
//
// A dword of the weight holds four codes of one column. Its even and its odd bytes, taken apart by a mask and a
// shift, are two pairs of unsigned words; a row's codes are stored as the two pairs that go with them.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "int8_tile.h"
#include "simd.h"
#include "vec_float.h"

namespace lutserve {
namespace {

constexpr int kWords = 2;  // that hold one row's codes of a group: the pair of even ones, the pair of odd ones

inline void put(const int8_t* codes, int32_t* to, int64_t rows) {
  for (int odd = 0; odd < kWords; ++odd) {
    const int16_t pair[2] = {codes[odd], codes[2 + odd]};
    std::memcpy(to + odd * rows, pair, sizeof(pair));
  }
}

// Sixteen dwords, one a column. The empty assembly keeps the compiler from adding products to each other before
// it adds them to the sums, for which there are not registers enough.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

constexpr int kRows = 10;  // 20 sums of 32 registers

struct Dwords {
  __m512i v;
};

inline Dwords load_dwords(const uint8_t* p) {
  return {_mm512_loadu_si512(p)};
}

inline Dwords even_bytes(Dwords x) {
  return {_mm512_and_si512(x.v, _mm512_set1_epi16(0xFF))};
}

inline Dwords odd_bytes(Dwords x) {
  return {_mm512_srli_epi16(x.v, 8)};
}

inline Dwords add_pairs(Dwords sum, Dwords words, int32_t pair) {
  sum.v = _mm512_add_epi32(sum.v, _mm512_madd_epi16(words.v, _mm512_set1_epi32(pair)));
  asm("" : "+v"(sum.v));
  return sum;
}

inline Float16 floats(Dwords x, int32_t less) {
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(x.v, _mm512_set1_epi32(less)))};
}

#elif defined(__AVX2__)

constexpr int kRows = 3;  // 12 sums of 16 registers

struct Dwords {
  __m256i low, high;
};

inline Dwords load_dwords(const uint8_t* p) {
  const auto* half = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)};
}

inline Dwords even_bytes(Dwords x) {
  const __m256i mask = _mm256_set1_epi16(0xFF);
  return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}

inline Dwords odd_bytes(Dwords x) {
  return {_mm256_srli_epi16(x.low, 8), _mm256_srli_epi16(x.high, 8)};
}

inline Dwords add_pairs(Dwords sum, Dwords words, int32_t pair) {
  const __m256i x = _mm256_set1_epi32(pair);
  sum.low = _mm256_add_epi32(sum.low, _mm256_madd_epi16(words.low, x));
  sum.high = _mm256_add_epi32(sum.high, _mm256_madd_epi16(words.high, x));
  asm("" : "+x"(sum.low), "+x"(sum.high));
  return sum;
}

inline Float16 floats(Dwords x, int32_t less) {
  const __m256i off = _mm256_set1_epi32(less);
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(x.low, off)), _mm256_cvtepi32_ps(_mm256_sub_epi32(x.high, off))};
}

#else

constexpr int kRows = 1;

using Dwords = I32;

inline Dwords load_dwords(const uint8_t* p) {
  Dwords x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline Dwords even_bytes(const Dwords& x) {
  return x & 0x00FF00FF;
}

inline Dwords odd_bytes(const Dwords& x) {
  return (x >> 8) & 0x00FF00FF;
}

inline Dwords add_pairs(const Dwords& sum, const Dwords& words, int32_t pair) {
  return sum + (words & 0xFFFF) * int16_t(pair) + (words >> 16) * (pair >> 16);
}

inline Float16 floats(const Dwords& x, int32_t less) {
  return cast<Float16>(__builtin_convertvector(x - less, F32));
}

#endif

// The folds unroll before the compiler decides what lives in registers; a loop would leave the sums in memory.
template <size_t... R>
__attribute__((always_inline)) inline void multiply(Dwords* sum, const Dwords& weight, const int32_t* words,
                                                    std::index_sequence<R...>) {
  const Dwords even = even_bytes(weight);
  ((sum[R] = add_pairs(sum[R], even, words[R])), ...);
  const Dwords odd = odd_bytes(weight);
  ((sum[R] = add_pairs(sum[R], odd, words[sizeof...(R) + R])), ...);
}

template <size_t... R>
__attribute__((always_inline)) inline void add_outliers(Float16* y, const Float16& w, const float* side,
                                                        std::index_sequence<R...>) {
  ((y[R] = fma(w, splat(side[R]), y[R])), ...);
}

// The outliers' weights of a panel in fp32, [slots][32]: once for all tiles, which have few rows.
template <class T>
std::vector<float> widen_outliers(const Panel& p, int64_t slots) {
  std::vector<float> wide(size_t(slots * kColumns));
  for (int64_t s = 0; s < slots; ++s) {
    for (int64_t c = 0; c < kColumns; c += kLanes) {
      const int64_t left = std::clamp<int64_t>(p.width - c, 0, kLanes);
      store_floats(wide.data() + s * kColumns + c, load_some<T>(p.outliers + s * p.n + c, left));
    }
  }
  return wide;
}

template <class T, size_t... R>
__attribute__((always_inline)) inline void tile(const Panel& p, const Activations& a, int64_t row,
                                                std::index_sequence<R...> rows) {
  constexpr int64_t kRight = kLanes * kGroup;  // where the right half of a group begins
  Dwords left[sizeof...(R)] = {}, right[sizeof...(R)] = {};
  const int32_t* words = a.words;
  const uint8_t* end = p.weight + a.groups * kColumns * kGroup;
  for (const uint8_t* weight = p.weight; weight < end; weight += kColumns * kGroup) {
    multiply(left, load_dwords(weight), words, rows);
    asm("" : "+r"(words));  // read twice, because words that are kept take the registers of sums
    multiply(right, load_dwords(weight + kRight), words, rows);
    words += kWords * sizeof...(R);
  }
  const auto finish = [&](Dwords* sum, int64_t column, int64_t width) {
    const Float16 scales = load_floats(p.scales + column);
    Float16 y[] = {floats(sum[R], 128 * a.sums[R]) * (splat(a.scales[R]) * scales)...};
    for (int64_t s = 0; s < a.slots; ++s) {
      add_outliers(y, load_floats(p.wide + s * kColumns + column), a.side + s * sizeof...(R), rows);
    }
    const Float16 bias = p.bias ? load_some<T>(p.bias + column, width) : Float16{};
    (store_some<T>(p.out + (row + R) * p.n + column, p.bias ? plus(y[R], bias) : y[R], width), ...);
  };
  finish(left, 0, p.width);
  if (p.width > kLanes) finish(right, kLanes, p.width - kLanes);
}

template <class T, int R>
void tile(const Panel& p, const Activations& a, int64_t row) {
  tile<T>(p, a, row, std::make_index_sequence<R>{});
}

}  // namespace
}  // namespace lutserve
