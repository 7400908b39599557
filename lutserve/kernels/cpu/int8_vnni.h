// int8_linear's tile for AVX512-VNNI: up to 12 rows by 32 columns, whose sums stay in registers for the whole
// of K. VNNI multiplies unsigned by signed bytes and adds four products without saturating.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "int8_tile.h"

namespace lutserve {
namespace {

constexpr int kRows = 12;    // 24 sums, two weights and one activation: 27 of 32 registers
constexpr int kVectors = 2;  // of 16 columns
constexpr int kWords = 1;    // that hold one row's codes of a group

inline void put(const int8_t* codes, int32_t* to, int64_t) {
  std::memcpy(to, codes, kGroup);
}

// Not used: a tile of 12 rows widens them itself.
template <class T>
std::vector<float> widen_outliers(const Panel&, int64_t) {
  return {};
}

// The folds unroll before the compiler decides what lives in registers; a loop would leave the sums in memory.
template <int R, size_t... I, size_t... V>
__attribute__((always_inline)) inline void multiply(__m512i (&sum)[R * kVectors], const uint8_t* weight,
                                                    const int32_t* codes, std::index_sequence<I...>,
                                                    std::index_sequence<V...>) {
  const __m512i w[kVectors] = {_mm512_loadu_si512(weight + V * 64)...};
  ((sum[I] = _mm512_dpbusd_epi32(sum[I], w[I % kVectors], _mm512_set1_epi32(codes[I / kVectors]))), ...);
}

template <int R, size_t... I>
__attribute__((always_inline)) inline void add_outliers(__m512 (&y)[R * kVectors], const __m512 (&w)[kVectors],
                                                        const float* side, std::index_sequence<I...>) {
  ((y[I] = _mm512_fmadd_ps(w[I % kVectors], _mm512_set1_ps(side[I / kVectors]), y[I])), ...);
}

template <size_t... I>
__attribute__((always_inline)) inline void keep(const __m512i* sum, int32_t* to, std::index_sequence<I...>) {
  (_mm512_store_si512(to + I * kLanes, sum[I]), ...);
}

template <size_t... I>
__attribute__((always_inline)) inline void fetch(__m512* y, const float* from, std::index_sequence<I...>) {
  ((y[I] = _mm512_load_ps(from + I * kLanes)), ...);
}

template <size_t... I>
__attribute__((always_inline)) inline void keep(const __m512* y, float* to, std::index_sequence<I...>) {
  (_mm512_store_ps(to + I * kLanes, y[I]), ...);
}

template <class T, int R>
void tile(const Panel& p, const Activations& a, int64_t row) {
  constexpr auto kAll = std::make_index_sequence<R * kVectors>{};
  constexpr auto kOne = std::make_index_sequence<kVectors>{};
  alignas(64) int32_t sums[R * kColumns];
  alignas(64) float y[R * kColumns];
  {
    __m512i sum[R * kVectors] = {};
    for (int64_t g = 0; g < a.groups; ++g) {
      multiply<R>(sum, p.weight + g * kColumns * kGroup, a.words + g * R, kAll, kOne);
    }
    keep(sum, sums, kAll);
  }
  __mmask16 mask[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = std::clamp<int64_t>(p.width - v * kLanes, 0, kLanes);
    mask[v] = __mmask16((1u << left) - 1);
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const __m512i exact = _mm512_sub_epi32(_mm512_load_si512(sums + r * kColumns + v * kLanes),
                                             _mm512_set1_epi32(128 * a.sums[r]));
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(a.scales[r]), _mm512_loadu_ps(p.scales + v * kLanes));
      _mm512_store_ps(y + r * kColumns + v * kLanes, _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale));
    }
  }
  const auto widened = [&](const uint16_t* from, int v) {
    return widen<T>(_mm256_maskz_loadu_epi16(mask[v], from + v * kLanes)).v;
  };
  if (a.slots) {
    __m512 total[R * kVectors];
    fetch(total, y, kAll);
    for (int64_t s = 0; s < a.slots; ++s) {
      const __m512 w[kVectors] = {widened(p.outliers + s * p.n, 0), widened(p.outliers + s * p.n, 1)};
      add_outliers<R>(total, w, a.side + s * R, kAll);
    }
    keep(total, y, kAll);
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      __m512 value = _mm512_load_ps(y + r * kColumns + v * kLanes);
      if (p.bias) value = _mm512_add_ps(value, widened(p.bias, v));
      _mm256_mask_storeu_epi16(p.out + (row + r) * p.n + v * kLanes, mask[v], narrow<T>(Float16{value}));
    }
  }
}

}  // namespace
}  // namespace lutserve
