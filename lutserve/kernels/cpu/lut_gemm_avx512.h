// lutserve::lut_gemm for AVX512-BF16 and AVX512-VNNI: pairs of bf16 products, or fours of int8 ones. A tile is
// a few rows by 32 columns; its sums stay in registers for a whole group, and it looks up as it multiplies.
#pragma once

#include <array>
#include <utility>

#include "gemm_panels.h"

#if defined(__AVX512F__)

namespace lutserve {

constexpr int kVectors = 2;
using Octet = uint32_t __attribute__((vector_size(64)));  // 16 columns by 8 indices

#if defined(__AVX512BF16__)
// Pairs of bf16 products.
struct Bf16Pairs {
  static constexpr int kSteps = 4;
  using Word = int32_t;
  using Sum = F32;
  using Weight = __m512i;

  static Word word(const float* x, int64_t step) {
    // bf16 in, so the low halves are empty.
    return int32_t(cast<uint32_t>(x[2 * step]) >> 16 | cast<uint32_t>(x[2 * step + 1]));
  }

  struct Lookup {
    __m512i values;
    explicit Lookup(const float* book) {
      const __m256i table = narrow<BFloat16>(Float16{_mm512_loadu_ps(book)});
      values = _mm512_broadcast_i64x4(table);
    }
  };

  static Weight weight(const Octet& raw, int step, const Lookup& look) {
    return _mm512_permutexvar_epi16(__m512i(raw >> (4 * step)), look.values);
  }
  static Sum multiply(const Sum& sum, const Weight& w, Word x) {
    return Sum(_mm512_dpbf16_ps(__m512(sum), (__m512bh)w, (__m512bh)_mm512_set1_epi32(x)));
  }
  static F32 value(const Sum& sum, int32_t) { return sum; }
};
#endif

#if defined(__AVX512VNNI__)
// Fours of int8 products. VNNI wants one side unsigned: the table holds value + 128, which `value` takes off.
struct Int8Fours {
  static constexpr int kSteps = 2;
  using Word = int32_t;
  using Sum = __m512i;
  using Weight = __m512i;

  static Word word(const float* x, int64_t step) {
    const float* octet = x + step / 2 * kOctet + step % 2 * 2;
    return cast<Word>(std::array<int8_t, 4>{int8_t(octet[0]), int8_t(octet[4]), int8_t(octet[1]), int8_t(octet[5])});
  }

  struct Lookup {
    __m512i values;
    explicit Lookup(const float* book) {
      const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_loadu_ps(book)), _mm512_set1_epi32(128));
      values = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(whole));
    }
  };

  static Weight weight(const Octet& raw, int step, const Lookup& look) {
    const __m512i index = _mm512_and_si512(__m512i(raw >> (4 * step)), _mm512_set1_epi8(15));
    return _mm512_shuffle_epi8(look.values, index);
  }
  static Sum multiply(const Sum& sum, const Weight& w, Word x) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x));
  }
  static F32 value(const Sum& sum, int32_t codes) {
    return F32(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(128 * codes))));
  }
};
#endif

// The folds unroll before the compiler decides what lives in registers; a loop would leave the sums in memory.
template <class Path, size_t... I>
__attribute__((always_inline)) inline void multiply(typename Path::Sum* sum, const typename Path::Weight& left,
                                                    const typename Path::Weight& right,
                                                    const typename Path::Word* x, std::index_sequence<I...>) {
  ((sum[I] = Path::multiply(sum[I], I % kVectors ? right : left, x[I / kVectors])), ...);
}

template <class Path, int R, int C, size_t... S>
__attribute__((always_inline)) inline void multiply_octet(typename Path::Sum* sum, const uint8_t* weight,
                                                          const typename Path::Lookup& look,
                                                          const typename Path::Word* x, std::index_sequence<S...>) {
  const Octet left = cast<Octet>(*reinterpret_cast<const std::array<uint8_t, 64>*>(weight));
  const Octet right = cast<Octet>(*reinterpret_cast<const std::array<uint8_t, 64>*>(weight + 64));
  constexpr auto kAll = std::make_index_sequence<R * kVectors>{};
  (multiply<Path>(sum + (S % C) * R * kVectors, Path::weight(left, S, look), Path::weight(right, S, look),
                  x + S * R, kAll),
   ...);
}

template <class Path, int R, int C, size_t... I>
__attribute__((always_inline)) inline void add_group(float* total, const typename Path::Sum* sum,
                                                     const Tile<Path>& a, int64_t group, const F32& left,
                                                     const F32& right, std::index_sequence<I...>) {
  const auto add = [&](int i) __attribute__((always_inline)) {
    const int64_t at = group * R + i / kVectors;
    F32 value = Path::value(sum[i], a.sums ? a.sums[at] : 0);
    if (C == 2) value += Path::value(sum[i + R * kVectors], 0);
    if (a.scales) value *= a.scales[at];
    store_f32(total + i * kLanes, fma(value, i % kVectors ? right : left, load_f32(total + i * kLanes)));
  };
  (add(I), ...);
}

// total[R, 32] += x @ W^T of one panel.
template <class Path, int R>
void tile(const Panel& p, const Tile<Path>& a, const Shape& shape, const float* books, float* total) {
  constexpr auto kAll = std::make_index_sequence<R * kVectors>{};
  // Few rows have few sums, and each must wait for the one before: two sets of them keep the multiplier busy.
  constexpr int kChains = R <= 2 ? 2 : 1;
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int64_t begin = g * shape.group_octets, end = std::min(shape.octets, begin + shape.group_octets);
    const float* book = books + (p.types ? p.types[g] : 0) * shape.classes * 16;
    typename Path::Sum sum[R * kVectors * kChains] = {};
    for (int64_t c = 0; c < shape.classes; ++c) {
      if (idle(book + c * 16, shape.classes)) continue;
      const typename Path::Lookup look(book + c * 16);
      for (int64_t o = begin; o < end; ++o) {
        multiply_octet<Path, R, kChains>(sum, p.weight + o * Path::kOctetBytes, look,
                                         a.words + (c * shape.octets + o) * Path::kSteps * R,
                                         std::make_index_sequence<Path::kSteps>{});
      }
    }
    add_group<Path, R, kChains>(total, sum, a, g, load_f32(p.scales + g * kColumns),
                                load_f32(p.scales + g * kColumns + kLanes), kAll);
  }
}

template <class Products>
struct Tiled : Products {
  static constexpr int kRows = 12;
  static constexpr int64_t kOctetBytes = kColumns * kOctet / 2;

  static void multiply_panel(const Panel& panel, const Activations<Tiled>& a, const Shape& shape, const float* books,
                             float* total) {
    for (int64_t t = 0; t < a.tiles; ++t) {
      with_rows<kRows>(a.rows(t), [&](auto rows) {
        tile<Tiled, rows>(panel, a.tile(t), shape, books, total + a.start(t) * kColumns);
      });
    }
  }
};

}  // namespace lutserve

#endif
