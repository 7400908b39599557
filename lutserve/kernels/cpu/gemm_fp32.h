// GEMM with exact products and fp32 sums for weights of any kind: a Source turns packed weights into fp32.
//
// Few rows stream: each weight is expanded in registers and used at once. More rows share the work: a block of
// 32 columns is expanded into a scratch that the first-level cache holds, and a tile of rows whose sums fill
// the registers passes over it. Sums are scaled, once or more a group, and added to the panel's totals.
//
// A Source has kOctetBytes (32 columns by 8 rows, packed), a Table that is made of a codebook (or of nothing),
// `each(table, octet, vector, use)`, which calls use(row, weights) for the octet's rows, in any order, `word(x)`,
// what an activation becomes, and `add_product(w, x, sum)`.
#pragma once

#include "gemm_panels.h"

namespace lutserve {

#if defined(__AVX512F__)
using Vec = __m512;
constexpr int kTileRows = 12;  // with two vectors of columns: 24 sums, two weights, one activation
inline Vec spread_vec(float x) {
  return _mm512_set1_ps(x);
}
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
#elif defined(__AVX2__) && defined(__FMA__)
using Vec = __m256;
constexpr int kTileRows = 6;
inline Vec spread_vec(float x) {
  return _mm256_set1_ps(x);
}
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
#else
using Vec = float __attribute__((vector_size(16)));
constexpr int kTileRows = 6;
inline Vec spread_vec(float x) {
  return Vec{x, x, x, x};
}
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return a * b + c;
}
#endif

constexpr int kVec = int(sizeof(Vec) / sizeof(float));
constexpr int kPanelVectors = int(kColumns) / kVec;
constexpr int kStreamRows = 4;
constexpr int64_t kBlockOctets = 16;  // 16 KiB of scratch

inline Vec load_vec(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store_vec(float* p, Vec x) {
  std::memcpy(p, &x, sizeof(x));
}

// total += sum * scale, the scale being that of the column times that of the row.
inline void add_scaled(float* total, Vec sum, const float* column_scale, const float* row_scale) {
  if (row_scale) sum = sum * spread_vec(*row_scale);
  const Vec old = load_vec(total);
  store_vec(total, column_scale ? multiply_add(sum, load_vec(column_scale), old) : sum + old);
}

// total[R, 2 vectors of 32 columns] += x[steps, R] * w[steps, 32], products as the source has them.
// The folds unroll before the compiler decides what lives in registers; a loop would leave the sums in memory.
template <class Source, int R, size_t... I>
__attribute__((noinline)) void micro_tile(const float* x, const float* w, int64_t steps, const float* column_scales,
                                          const float* row_scales, float* total, std::index_sequence<I...>) {
  Vec sum[R * 2] = {};
#pragma GCC unroll 4
  for (int64_t i = 0; i < steps; ++i) {
    const Vec left = load_vec(w), right = load_vec(w + kVec);
    ((sum[I] = Source::add_product(I % 2 ? right : left, spread_vec(x[I / 2]), sum[I])), ...);
    x += R;
    w += kColumns;
  }
  (add_scaled(total + I / 2 * kColumns + I % 2 * kVec, sum[I], column_scales ? column_scales + I % 2 * kVec : nullptr,
              row_scales ? row_scales + I / 2 : nullptr),
   ...);
}

// What a Source derives from where products are exact.
struct ExactProducts {
  static float word(float x) { return x; }
  static Vec add_product(Vec w, Vec x, Vec sum) { return multiply_add(w, x, sum); }
};

template <class Source>
struct InFloat {
  static constexpr int kRows = kTileRows, kSteps = 8;
  static constexpr int64_t kOctetBytes = Source::kOctetBytes;
  using Word = float;
  using Table = typename Source::Table;

  static Word word(const float* x, int64_t step) { return Source::word(x[step]); }

  static void multiply_panel(const Panel& panel, const Activations<InFloat>& a, const Shape& shape, const float* books, float* total) {
    for (int64_t g = 0; g < shape.groups; ++g) {
      const int64_t begin = g * shape.group_octets, end = std::min(shape.octets, begin + shape.group_octets);
      const float* scales = panel.scales ? panel.scales + g * kColumns : nullptr;
      const float* book = books ? books + (panel.types ? panel.types[g] : 0) * shape.classes * 16 : nullptr;
      for (int64_t c = 0; c < shape.classes; ++c) {
        if (idle(book + c * 16, shape.classes)) continue;
        const Table table(book + c * 16);
        for (int64_t o = begin; o < end; o += kBlockOctets) {
          const int64_t octets = std::min(kBlockOctets, end - o);
          const uint8_t* weight = panel.weight + o * kOctetBytes;
          const int64_t at = (c * shape.octets + o) * kSteps;
          if (a.count <= kStreamRows) {
            with_rows<kStreamRows>(a.count, [&](auto rows) {
              const Tile<InFloat> tile = a.tile(0);
              stream<rows>(table, weight, octets, tile.words + at * rows, scales,
                           tile.scales ? tile.scales + g * rows : nullptr, total);
            });
          } else {
            share(table, weight, octets, a, at, g, scales, total);
          }
        }
      }
    }
  }

  static void share(const Table& table, const uint8_t* weight, int64_t octets, const Activations<InFloat>& a, int64_t at,
                    int64_t group, const float* scales, float* total) {
    alignas(64) float block[kBlockOctets * kOctet * kColumns];
    for (int64_t o = 0; o < octets; ++o) {
      for (int v = 0; v < kPanelVectors; ++v) {
        float* to = block + o * kOctet * kColumns + v * kVec;
        Source::each(table, weight + o * kOctetBytes, v, [&](int row, Vec w) { store_vec(to + row * kColumns, w); });
      }
    }
    for (int64_t t = 0; t < a.tiles; ++t) {
      with_rows<kTileRows>(a.rows(t), [&](auto rows) {
        const Tile<InFloat> tile = a.tile(t);
        for (int64_t column = 0; column < kColumns; column += 2 * kVec) {
          micro_tile<Source, rows>(tile.words + at * rows, block + column, octets * kOctet, scales ? scales + column : nullptr,
                           tile.scales ? tile.scales + group * rows : nullptr,
                           total + a.start(t) * kColumns + column, std::make_index_sequence<rows * 2>{});
        }
      });
    }
  }

  template <int R>
  static void stream(const Table& table, const uint8_t* weight, int64_t octets, const float* x, const float* scales,
                     const float* row_scales, float* total) {
    // Whole lines of the weight where the sums leave room for that, and enough chains of them to hide latency.
    constexpr int V = R <= 2 ? std::min(4, kPanelVectors) : 2, kChains = R * V <= 4 ? 2 : 1;
    for (int first = 0; first < kPanelVectors; first += V) {
      Vec sum[R * V * kChains] = {};
      for (int64_t o = 0; o < octets; ++o) {
        stream_octet<R, kChains>(table, weight + o * kOctetBytes, first, x + o * kOctet * R, sum,
                                 std::make_index_sequence<V>{}, std::make_index_sequence<R>{});
      }
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) {
          const int i = v * R + r, column = (first + v) * kVec;
          add_scaled(total + r * kColumns + column, kChains == 2 ? sum[i] + sum[i + R * V * (kChains - 1)] : sum[i],
                     scales ? scales + column : nullptr, row_scales ? row_scales + r : nullptr);
        }
      }
    }
  }

  template <int R, int kChains, size_t... V, size_t... I>
  __attribute__((always_inline)) static void stream_octet(const Table& table, const uint8_t* octet, int first,
                                                          const float* x, Vec* sum, std::index_sequence<V...>,
                                                          std::index_sequence<I...>) {
    const auto one = [&](int v) __attribute__((always_inline)) {
      Source::each(table, octet, first + v, [&](int row, Vec w) __attribute__((always_inline)) {
        Vec* to = sum + ((row % kChains) * int(sizeof...(V)) + v) * R;
        ((to[I] = Source::add_product(w, spread_vec(x[row * R + I]), to[I])), ...);
      });
    };
    (one(V), ...);
  }
};

}  // namespace lutserve
