// The frame of every GEMM whose weight lies in panels of 32 output columns: activations regrouped by tiles,
// a loop over blocks of rows and panels, bias, one rounding. What happens inside a panel is a Path's business:
// gemm_fp32.h, lut_gemm_avx512.h.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "simd.h"
#include "tensor.h"

namespace lutserve {

constexpr int64_t kColumns = 32, kOctet = 8;  // a weight has whole panels of columns and octets of rows
constexpr int64_t kBlockRows = 240;           // rows that share one pass over the weight, unless their words
constexpr int64_t kBlockWords = 1 << 20;      // outgrow the caches
constexpr int64_t kGrain = 1 << 16;           // bytes of weight a thread must have to be worth waking

struct Shape {
  int64_t classes, octets, groups, group_octets;
};

// Whether a class has no part in a kind of block: its table is all 0. A class alone is always multiplied.
inline bool idle(const float* book, int64_t classes) {
  return classes > 1 && std::all_of(book, book + 16, [](float value) { return value == 0; });
}

struct Call {
  const uint16_t* x;       // [classes, m, k]
  const uint8_t* weight;   // [panels][octets][Path::kOctetBytes]
  const float* books;      // [kinds][classes][16], or null: the weight holds its values itself
  const float* scales;     // [panels][groups][32], or null: all 1
  const uint8_t* types;    // [panels][groups], which kind of table, or null: all 0
  const uint16_t* bias;    // or null
  uint16_t* out;           // [m, n]
  int64_t m, k, n;
  bool quantized;          // quantise the activations to int8 by row and group first
  Shape shape;
};

struct Panel {
  const uint8_t* weight;
  const float* scales;
  const uint8_t* types;
};

// Of one tile's rows, regrouped so that an inner loop reads a single stream.
template <class Path>
struct Tile {
  typename Path::Word* words;  // [classes][octets][Path::kSteps][rows]
  float* scales;               // [groups][rows], or null: not quantised
  int32_t* sums;               // [groups][rows], of the codes; or null
};

// A block of rows in tiles of nearly equal size.
template <class Path>
struct Activations {
  int64_t count, tiles, row_words, groups;
  Tile<Path> all;

  int64_t start(int64_t t) const { return t * count / tiles; }
  int64_t rows(int64_t t) const { return start(t + 1) - start(t); }
  Tile<Path> tile(int64_t t) const {
    const int64_t row = start(t), coded = all.scales ? row * groups : 0;
    return {all.words + row * row_words, all.scales + coded, all.sums + coded};
  }
};

// Calls use(std::integral_constant<int, R>) for R = rows.
template <int Most, class Use>
void with_rows(int64_t rows, Use use) {
  if (rows == Most) return use(std::integral_constant<int, Most>{});
  if constexpr (Most > 1) with_rows<Most - 1>(rows, use);
}

// One row quantised in place to int8 codes by groups: scale max|x| / 127, ties to even, as quantize_rows does by
// rows. Scales and the sums of the codes lie `rows` apart.
inline void quantize(float* row, const Shape& shape, int64_t rows, float* scales, int32_t* sums) {
  for (int64_t g = 0; g < shape.groups; ++g) {
    float* x = row + g * shape.group_octets * kOctet;
    const int64_t count = std::min(shape.octets - g * shape.group_octets, shape.group_octets) * kOctet;
    int32_t bits = 0;  // those of the largest magnitude, or of a NaN: they order as the numbers do
    for (int64_t i = 0; i < count; ++i) bits = std::max(bits, cast<int32_t>(x[i]) & 0x7FFFFFFF);
    const float top = cast<float>(bits);
    // As in mixq.cpp: a NaN fails the comparisons and reaches the result through the scale.
    const float inverse = top > 1e-30f ? 127.0f / top : 0.0f;
    int32_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t code = int8_t(cast<int32_t>(x[i] * inverse + 12582912.0f) - 0x4B400000);
      x[i] = float(code);
      total += code;
    }
    scales[g * rows] = top <= 1e-30f ? 0.0f : top / 127.0f;
    sums[g * rows] = total;
  }
}

// A tile's rows as the words of a path: fp32, bf16 pairs as they are, fours of int8 codes.
template <class Path, class T>
void fill(const Call& call, int64_t first, int64_t rows, const Tile<Path>& tile) {
  const Shape& shape = call.shape;
  const int64_t columns = shape.octets * kOctet;
  std::vector<float> wide(size_t(columns + kLanes));
  for (int64_t c = 0; c < shape.classes; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint16_t* x = call.x + (c * call.m + first + r) * call.k;
      typename Path::Word* to = tile.words + c * shape.octets * Path::kSteps * rows + r;
      for (int64_t i = 0; i < columns; i += kLanes) {
        uint16_t part[kLanes] = {};
        if (i < call.k) std::memcpy(part, x + i, size_t(std::min(kLanes, call.k - i)) * sizeof(uint16_t));
        store_f32(wide.data() + i, cast<F32>(widen<T>(load(part))));
      }
      if (call.quantized) quantize(wide.data(), shape, rows, tile.scales + r, tile.sums + r);
      for (int64_t s = 0; s < shape.octets * Path::kSteps; ++s) to[s * rows] = Path::word(wide.data(), s);
    }
  }
}

// Rounds rows of 32 sums, bias added, to the part of a panel that is inside the result.
template <class T>
void write(const Call& call, const float* total, int64_t row, int64_t rows, int64_t column) {
  const int64_t width = std::min(kColumns, call.n - column);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const size_t bytes = size_t(std::min(kLanes, width - c)) * sizeof(uint16_t);
      F32 y = load_f32(total + r * kColumns + c);
      uint16_t bits[kLanes] = {};
      if (call.bias) {
        std::memcpy(bits, call.bias + column + c, bytes);
        y += cast<F32>(widen<T>(load(bits)));
      }
      store(bits, narrow<T>(cast<Float16>(y)));
      std::memcpy(call.out + (row + r) * call.n + column + c, bits, bytes);
    }
  }
}

template <class Path, class T>
void multiply_panels(const Call& call) {
  const Shape& shape = call.shape;
  const int64_t panels = (call.n + kColumns - 1) / kColumns, panel_bytes = shape.octets * Path::kOctetBytes;
  const int64_t row_words = shape.classes * shape.octets * Path::kSteps;
  const int64_t most = std::min({call.m, kBlockRows, std::max<int64_t>(kBlockRows / 5, kBlockWords / row_words)});
  const int64_t blocks = (call.m + most - 1) / most, coded = call.quantized ? most * shape.groups : 0;
  const Tensor words = empty({most * row_words}, ScalarType::Int);
  const Tensor scales = empty({coded}, ScalarType::Float), sums = empty({coded}, ScalarType::Int);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * call.m / blocks, rows = (b + 1) * call.m / blocks - first;
    const Activations<Path> a{rows,
                              (rows + Path::kRows - 1) / Path::kRows,
                              row_words,
                              shape.groups,
                              {reinterpret_cast<typename Path::Word*>(words.mutable_data_ptr()),
                               coded ? static_cast<float*>(scales.mutable_data_ptr()) : nullptr,
                               coded ? static_cast<int32_t*>(sums.mutable_data_ptr()) : nullptr}};
    const int64_t tile_grain = std::max<int64_t>(1, kGrain / (Path::kRows * call.k));
    torch::stable::parallel_for(0, a.tiles, tile_grain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) fill<Path, T>(call, first + a.start(t), a.rows(t), a.tile(t));
    });
    const int64_t panel_grain = std::max<int64_t>(1, kGrain / panel_bytes);
    torch::stable::parallel_for(0, panels, panel_grain, [&](int64_t begin, int64_t end) {
      alignas(64) float total[kBlockRows * kColumns];
      for (int64_t i = begin; i < end; ++i) {
        const Panel panel{call.weight + i * panel_bytes,
                          call.scales ? call.scales + i * shape.groups * kColumns : nullptr,
                          call.types ? call.types + i * shape.groups : nullptr};
        std::fill(total, total + rows * kColumns, 0.0f);
        Path::multiply_panel(panel, a, shape, call.books, total);
        write<T>(call, total, first, rows, i * kColumns);
      }
    });
  }
}

}  // namespace lutserve
