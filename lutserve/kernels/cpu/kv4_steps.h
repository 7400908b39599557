// What a tile of attention computes over a cache of 4-bit indices: as attention_steps.h has it, but keys and
// values are unpacked into 16-bit matrices before the same products, and scaled after them. The rule is
// kernels/kv4_attention.py's.
#pragma once

#include <array>

#include "attention_steps.h"
#include "kv4_page.h"

namespace lutserve {

struct Kv4Problem : Problem {
  const uint8_t* pages;
  int64_t page_block, page_head;  // bytes from one to the next
  Layout layout;
  const uint16_t* value;  // of this step's tokens, or null: values are not by unit
  int64_t value_token, value_head;
  std::array<Table, kMostClasses> key_tables;
  Table value_table;
  int64_t classes;
  const int32_t* offsets;  // of each class's activation map, or null: activations as they are
};

template <class P>
struct Kv4Attention : Attention<P> {
  using Problem = Kv4Problem;
  using Base = Attention<P>;
  using T = typename P::Type;
  using Left = typename P::Left;
  using Base::context;
  using Base::rows;
  using Base::t;

  const Kv4Problem& p;
  int64_t units_end;  // keys whose values all rows see as indices, where values are by unit

  Kv4Attention(const Kv4Problem& problem, const Tile& tile) : Base(problem, tile), p(problem) {
    units_end = (context + 1) / kUnit * kUnit;
  }

  int64_t queries() const { return Base::queries() * p.classes; }
  int64_t weights() const { return Base::weights() * weight_sets(); }
  // A row of weights for each group of channels, because the tokens' scales multiply them.
  int64_t weight_sets() const { return p.layout.by_unit ? 1 : p.layout.groups(); }
  // So that all rows see the same units: the one that a position finishes is seen from that position on.
  static int64_t most_positions(int64_t context) { return kUnit - (context + 1) % kUnit; }

  const uint8_t* page(int64_t key) const {
    const int64_t block = p.blocks[t.request * p.blocks_row + key / p.block_size];
    return p.pages + block * p.page_block + t.head * p.page_head;
  }

  void pack_queries(Left* q) const {
    if (!p.offsets) return Base::pack_queries(q);
    constexpr int kInfinity = std::is_same_v<T, Half> ? 0x7C00 : 0x7F80;
    alignas(64) uint16_t mapped[kMostSize * kMostClasses];
    for (int64_t r = 0; r < rows; ++r) {
      const uint16_t* row = Base::query(r);
      for (int64_t d = 0; d < p.size; ++d) {
        const int sign = row[d] & 0x8000, magnitude = row[d] & 0x7FFF;
        for (int64_t c = 0; c < p.classes; ++c) {
          const int moved = magnitude ? std::min(magnitude + p.offsets[c], kInfinity - 1) : 0;
          mapped[d * p.classes + c] = uint16_t(sign | (magnitude <= kInfinity ? moved : magnitude));
        }
      }
      for (int64_t i = 0; i < p.size * p.classes; i += kLanes) P::pack(q + r * p.size * p.classes + i, load(mapped + i));
    }
  }

  void score(const Left* q, int64_t chunk, float* scores, float* maxima) const {
    const Range in = Base::span(chunk);
    const int64_t depth = p.size * p.classes, step = kChannels * p.classes;
    alignas(64) uint16_t keys[kColumns][kGroup * kMostSize * kMostClasses];
    in_runs<kColumns>(in.count() / kGroup, [&](auto c, int64_t first) {
      constexpr int C = decltype(c)::value;
      const int64_t g = in.begin / kGroup + first;
      const uint16_t* right[C];
      const uint8_t* scales[C];
      for (int i = 0; i < C; ++i) {
        const int64_t key = chunk * kChunk + (g + i) * kGroup, token = key % p.block_size;
        const uint8_t* from = page(key);
        unpack<T>(from + p.layout.keys(token), p.size, kGroup, p.key_tables.data(), p.classes, keys[i]);
        right[i] = keys[i];
        scales[i] = from + p.layout.key_scales() + p.layout.scale(token);
      }
      in_runs<kRows>(rows, [&](auto r, int64_t row) {
        constexpr int R = decltype(r)::value;
        F32 score[R][C] = {};
        for (int64_t begin = 0, group = 0; begin < depth; begin += step, ++group) {
          const uint16_t* part[C];
          for (int i = 0; i < C; ++i) part[i] = right[i] + begin * kGroup;
          Sums<C> sum[R] = {};
          multiply<P, R, C>(sum, q + row * depth + begin, depth, part, kGroup, std::min(step, depth - begin));
          for (int j = 0; j < C; ++j) {
            const F32 scale = load_scales(scales[j] + group * 2 * kGroup);
            for (int i = 0; i < R; ++i) score[i][j] += sixteen<C>(sum[i], j) * scale;
          }
        }
        for (int i = 0; i < R; ++i) {
          for (int j = 0; j < C; ++j) store_f32(scores + (row + i) * kStride + (g + j) * kGroup, score[i][j] * p.scale);
        }
      });
    });
    for (int64_t r = 0; r < rows; ++r) {
      const Range some = Base::valid(r, chunk);
      maxima[r] = row_maximum(scores + r * kStride, some.begin, some.end);
    }
  }

  void weigh(int64_t chunk, const float* scores, const float* maxima, Left* weights, float* sums, float* part) const {
    const Range in = Base::span(chunk);
    for (int64_t r = 0; r < rows; ++r) {
      const Range some = Base::valid(r, chunk);
      const auto of = [&](auto pack, auto* to) {
        sums[r] = row_weights<decltype(pack)>(p.table, scores + r * kStride, maxima[r], to, in.count(), some.begin,
                                              some.end);
      };
      if (p.layout.by_unit) {
        of(P{}, weights + r * kStride);
      } else {
        alignas(64) float exponentials[kChunk];
        of(Floats{}, exponentials);
        scale_weights(chunk, in.count(), exponentials, weights + r * kStride);
      }
    }
    std::fill(part, part + rows * p.size, 0.0f);
    alignas(64) uint16_t values[kUnit * kMostSize];
    for (int64_t first = 0; first < in.end; first += kUnit) {
      const int64_t key = chunk * kChunk + first, end = std::min(first + kUnit, in.end);
      if (p.layout.by_unit && key >= units_end) {
        add_unfinished(key, weights + first, values, part);
        continue;
      }
      for (int64_t k = first; k < end; k += kGroup) {
        const int64_t at = chunk * kChunk + k;
        unpack<T>(page(at) + p.layout.values(at % p.block_size), kGroup, p.size, &p.value_table, 1,
                  values + (k - first) * p.size);
      }
      const uint8_t* scales = page(key) + p.layout.value_scales() + key % p.block_size / kUnit * p.size * 2;
      add_products(0, rows, weights + first, end - first, values, p.layout.by_unit ? scales : nullptr, part);
    }
  }

 private:
  struct Floats {
    using Left = float;
    static void pack(float* to, const F32& x) { store_f32(to, x); }
  };

  // One row's weights for each group of channels: what the exponential gave, times the scales of the values.
  void scale_weights(int64_t chunk, int64_t count, const float* exponentials, Left* weights) const {
    for (int64_t k = 0; k < count; k += kGroup) {
      const int64_t key = chunk * kChunk + k;
      const uint8_t* scales = page(key) + p.layout.value_scales() + p.layout.scale(key % p.block_size);
      const F32 e = load_f32(exponentials + k);
      for (int64_t g = 0; g < weight_sets(); ++g) {
        // A weight of 0 may belong to a scale that nobody has written.
        const F32 scaled = e == 0.0f ? F32{} : e * load_scales(scales + g * 2 * kGroup);
        P::pack(weights + g * rows * kStride + k, scaled);
      }
    }
  }

  // part += weights @ values for some rows, times `scales` of the columns if given. values: packed [depth, size].
  void add_products(int64_t begin, int64_t end, const Left* weights, int64_t depth, const uint16_t* values,
                    const uint8_t* scales, float* part) const {
    constexpr int64_t kSixteens = kChannels / kLanes;
    for (int64_t g = 0; g < p.layout.groups(); ++g, weights += weight_sets() > 1 ? rows * kStride : 0) {
      in_runs<kRows>(end - begin, [&](auto r, int64_t first) {
        in_runs<kColumns>(std::min(kSixteens, p.size / kLanes - g * kSixteens), [&](auto c, int64_t column) {
          constexpr int R = decltype(r)::value, C = decltype(c)::value;
          const int64_t row = begin + first, d = g * kChannels + column * kLanes;
          Sums<C> sum[R] = {};
          for (int64_t k = 0; k < depth; k += kGroup) {
            const uint16_t* right[C];
            for (int i = 0; i < C; ++i) right[i] = values + k * p.size + (d + i * kLanes) * P::kDepth;
            multiply<P, R, C>(sum, weights + row * kStride + k, kStride, right, p.size, kGroup);
          }
          for (int j = 0; j < C; ++j) {
            const F32 scale = scales ? load_scales(scales + (d + j * kLanes) * 2) : spread(1.0f);
            for (int i = 0; i < R; ++i) {
              float* to = part + (row + i) * p.size + d + j * kLanes;
              store_f32(to, load_f32(to) + sixteen<C>(sum[i], j) * scale);
            }
          }
        });
      });
    }
  }

  // The unit that the tile's rows are in, from `key` on, by values that are not quantised yet.
  void add_unfinished(int64_t key, const Left* weights, uint16_t* values, float* part) const {
    const int64_t end = context + t.count, depth = (end - key + kGroup - 1) / kGroup * kGroup;
    if (gather(key, end, depth, values)) return add_products(0, rows, weights, depth, values, nullptr, part);
    // Times a weight of 0 those would be NaN, so each row again by what it sees.
    for (int64_t r = 0; r < rows; ++r) {
      gather(key, Base::keys(r / p.group).end, depth, values);
      add_products(r, r + 1, weights, depth, values, nullptr, part);
    }
  }

  // Values of keys from `key` to `end` as a packed matrix of `depth` rows; whether all are finite.
  bool gather(int64_t key, int64_t end, int64_t depth, uint16_t* values) const {
    const int64_t start = context - t.first;  // the first key of this step
    const auto* tail = reinterpret_cast<const uint16_t*>(page(key) + p.layout.tail());
    const uint16_t* step = p.value + p.starts[t.request] * p.value_token + t.head * p.value_head;
    std::fill(values, values + depth * p.size, uint16_t(0));
    F32 probe = {};
    for (int64_t k = key; k < end; ++k) {
      const uint16_t* from = k < start ? tail + (k - key) * p.size : step + (k - start) * p.value_token;
      for (int64_t d = 0; d < p.size; ++d) values[packed<T>(k - key, d, p.size)] = from[d];
      for (int64_t d = 0; d < p.size; d += kLanes) probe += cast<F32>(widen<T>(load(from + d))) * 0.0f;
    }
    return sum_of(probe) == 0.0f;
  }
};

}  // namespace lutserve
