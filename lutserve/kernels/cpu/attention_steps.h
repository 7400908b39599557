// What a tile of attention computes, step by step; attention.cpp decides who computes which tile when.
#pragma once

#include "attention_softmax.h"

namespace lutserve {

constexpr int64_t kTileRows = 24;
constexpr int64_t kStride = kChunk + 16;  // between rows of scores and weights: no power of two, for the cache

struct Problem {
  const uint16_t* query;
  uint16_t* out;
  const uint16_t* cache;
  const int32_t *blocks, *starts, *lengths;
  int64_t query_token, query_head, out_token, out_head;  // strides in elements
  int64_t cache_block, cache_head, blocks_row;
  int64_t block_size, size, group, window;
  float scale;
  const uint16_t* table;  // of the exponential, or null
  Denominator denominator;
};

struct Tile {
  int64_t request, head, first, count;  // kv head; query positions from the first one of this step
};

struct Range {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
  Range within(int64_t a, int64_t b) const { return {std::clamp(begin, a, b), std::clamp(end, a, b)}; }
};

template <class P>
struct Attention {
  using Problem = lutserve::Problem;
  using T = typename P::Type;
  using Left = typename P::Left;

  const lutserve::Problem& p;
  const Tile& t;
  int64_t rows, context;  // keys before the tile's first position

  Attention(const lutserve::Problem& problem, const Tile& tile) : p(problem), t(tile), rows(tile.count * problem.group) {
    const int64_t queries = p.starts[t.request + 1] - p.starts[t.request];
    context = p.lengths[t.request] - queries + t.first;
  }

  // Values that packed queries and one chunk's weights take.
  int64_t queries() const { return rows * p.size; }
  int64_t weights() const { return rows * kStride; }
  // Positions that one tile may have which begins behind `context` keys.
  static int64_t most_positions(int64_t) { return kTileRows; }

  // Keys that a position sees, and those that any position of the tile sees.
  Range keys(int64_t position) const {
    const int64_t end = context + position + 1;
    return {p.window > 0 ? std::max<int64_t>(0, end - p.window) : 0, end};
  }
  Range keys() const { return {keys(0).begin, keys(t.count - 1).end}; }
  Range chunks() const { return {keys().begin / kChunk, (keys().end + kChunk - 1) / kChunk}; }

  // Keys of a chunk that are computed, in whole groups and counted from the chunk's first.
  Range span(int64_t chunk) const {
    const Range all = keys().within(chunk * kChunk, (chunk + 1) * kChunk);
    return {all.begin / kGroup * kGroup - chunk * kChunk,
            (all.end + kGroup - 1) / kGroup * kGroup - chunk * kChunk};
  }
  Range valid(int64_t row, int64_t chunk) const {
    const Range all = keys(row / p.group).within(chunk * kChunk, (chunk + 1) * kChunk);
    return {all.begin - chunk * kChunk, all.end - chunk * kChunk};
  }

  const uint16_t* query(int64_t row) const {
    const int64_t token = p.starts[t.request] + t.first + row / p.group;
    return p.query + token * p.query_token + (t.head * p.group + row % p.group) * p.query_head;
  }

  void pack_queries(Left* q) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < p.size; d += kLanes) P::pack(q + r * p.size + d, load(query(r) + d));
    }
  }

  // Where the keys of a chunk's groups lie; their values lie block_size * size further.
  void locate(int64_t chunk, Range span, const uint16_t** groups) const {
    for (int64_t g = span.begin / kGroup; g < span.end / kGroup; ++g) {
      const int64_t key = chunk * kChunk + g * kGroup;
      const int64_t block = p.blocks[t.request * p.blocks_row + key / p.block_size];
      groups[g] = p.cache + block * p.cache_block + t.head * p.cache_head + key % p.block_size * p.size;
    }
  }

  // scores [rows, kStride] of one chunk, and the rows' maxima over it.
  void score(const Left* q, int64_t chunk, float* scores, float* maxima) const {
    const Range in = span(chunk);
    const uint16_t* groups[kChunk / kGroup];
    locate(chunk, in, groups);
    in_runs<kColumns>(in.count() / kGroup, [&](auto c, int64_t first) {
      constexpr int C = decltype(c)::value;
      const int64_t g = in.begin / kGroup + first;
      const uint16_t* right[C];
      for (int i = 0; i < C; ++i) right[i] = groups[g + i];
      in_runs<kRows>(rows, [&](auto r, int64_t row) {
        constexpr int R = decltype(r)::value;
        Sums<C> sum[R] = {};
        multiply<P, R, C>(sum, q + row * p.size, p.size, right, kGroup, p.size);
        for (int i = 0; i < R; ++i) store_sums<C>(scores + (row + i) * kStride + g * kGroup, sum[i], p.scale);
      });
    });
    for (int64_t r = 0; r < rows; ++r) {
      const Range some = valid(r, chunk);
      maxima[r] = row_maximum(scores + r * kStride, some.begin, some.end);
    }
  }

  // From scores and final maxima: the sums of weights [rows] and of weighted values [rows, size] of one chunk.
  void weigh(int64_t chunk, const float* scores, const float* maxima, Left* weights, float* sums, float* part) const {
    const Range in = span(chunk);
    const uint16_t* groups[kChunk / kGroup];
    locate(chunk, in, groups);
    for (int64_t r = 0; r < rows; ++r) {
      const Range some = valid(r, chunk);
      const int64_t at = r * kStride + in.begin, begin = some.begin - in.begin, end = some.end - in.begin;
      sums[r] = row_weights<P>(p.table, scores + at, maxima[r], weights + at, in.count(), begin, end);
    }
    in_runs<kRows>(rows, [&](auto r, int64_t row) {
      in_runs<kColumns>(p.size / kLanes, [&](auto c, int64_t column) {
        constexpr int R = decltype(r)::value, C = decltype(c)::value;
        Sums<C> sum[R] = {};
        for (int64_t g = in.begin / kGroup; g < in.end / kGroup; ++g) {
          const uint16_t* right[C];
          for (int i = 0; i < C; ++i) {
            right[i] = groups[g] + p.block_size * p.size + (column + i) * kLanes * P::kDepth;
          }
          multiply<P, R, C>(sum, weights + row * kStride + g * kGroup, kStride, right, p.size, kGroup);
        }
        for (int i = 0; i < R; ++i) store_sums<C>(part + (row + i) * p.size + column * kLanes, sum[i], 1);
      });
    });
    for (int64_t r = 0; r < rows; ++r) {
      if (!finite(part + r * p.size)) weigh_only_valid(chunk, groups, weights + r * kStride, r, part + r * p.size);
    }
  }

  bool finite(const float* row) const {
    F32 probe = {};
    for (int64_t d = 0; d < p.size; d += kLanes) probe += load_f32(row + d) * 0.0f;
    return sum_of(probe) == 0.0f;
  }

  // One row again, reading no value that it does not see: what lies there, times 0, is NaN if it is not finite.
  void weigh_only_valid(int64_t chunk, const uint16_t* const* groups, const Left* weights, int64_t row,
                        float* part) const {
    const Range some = valid(row, chunk);
    std::fill(part, part + p.size, 0.0f);
    for (int64_t g = some.begin / kGroup; g * kGroup < some.end; ++g) {
      uint16_t values[kGroup * 256] = {};
      const uint16_t* from = groups[g] + p.block_size * p.size;
      for (int64_t k = std::max(some.begin, g * kGroup); k < std::min(some.end, (g + 1) * kGroup); ++k) {
        for (int64_t d = 0; d < p.size; ++d) {
          const int64_t i = packed<T>(k % kGroup, d, p.size);
          values[i] = from[i];
        }
      }
      for (int64_t d = 0; d < p.size; d += kLanes) {
        Sums<1> sum[1];
        std::memcpy(sum, part + d, sizeof(sum));
        const uint16_t* const right[1] = {values + d * P::kDepth};
        multiply<P, 1, 1>(sum, weights + g * kGroup, kStride, right, p.size, kGroup);
        store_sums<1>(part + d, sum[0], 1);
      }
    }
  }

  void finish(const float* sums, const float* total) const {
    uint16_t* to = p.out + (p.starts[t.request] + t.first) * p.out_token + t.head * p.group * p.out_head;
    for (int64_t r = 0; r < rows; ++r) {
      const auto [factor, multiplies] = p.denominator.of(sums[r]);
      uint16_t* row = to + r / p.group * p.out_token + r % p.group * p.out_head;
      for (int64_t d = 0; d < p.size; d += kLanes) {
        const F32 x = load_f32(total + r * p.size + d);
        store(row + d, narrow<T>(cast<Float16>(multiplies ? x * factor : x / factor)));
      }
    }
  }
};

}  // namespace lutserve
