// lutserve::mixq_prepare: split outlier columns off and quantise the rest, row by row, in two reads of
// a row that stays in cache. lutserve::mixq_gate_and_prepare: the same of a gated activation, while its row is
// in cache. lutserve::mixq_add_outliers: the thin product of those columns, for few rows.
// Schemas and meaning: kernels/mixq.py.

#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "gate.h"
#include "tensor.h"
#include "vec_float.h"

namespace lutserve {
namespace {

// Rows whose largest value is below this are zero: 127 / peak would leave fp32's range.
constexpr float kTiny = 1e-30f;

// Bit patterns as integers; wider vectors GCC takes apart where the instruction set lacks them.
using I16 = int16_t __attribute__((vector_size(32)));
constexpr I16 kBit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768};

template <class T>
Float16 values(const I16& bits) {
  Bits16 same;
  std::memcpy(&same, &bits, sizeof(same));
  return widen<T>(same);
}

// The low byte of each value's pattern.
inline void store_low_bytes(int8_t* p, const Float16& x) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(x.v)));
#elif defined(__AVX2__)
  const __m256i byte = _mm256_set1_epi32(0xFF);
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256(_mm256_castps_si256(x.low), byte),
                                            _mm256_and_si256(_mm256_castps_si256(x.high), byte));
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  // Packing works within 128-bit halves, so the four quarters come out as 0 2 1 3.
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi32(bytes, 0b11011000));
#else
  int32_t bits[kLanes];
  std::memcpy(bits, x.lane, sizeof(bits));
  for (int i = 0; i < kLanes; ++i) p[i] = int8_t(bits[i]);
#endif
}

template <class T>
struct Row {
  const uint16_t* x;
  const int32_t* keep;
  int64_t columns;

  // Calls step(first column, count, bits of sixteen columns, 0 where not kept); the last call may have fewer
  // columns, with zeros behind them.
  template <class Step>
  void each(Step step) const {
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) step(c, kLanes, fetch(x + c, c));
    if (c == columns) return;
    uint16_t tail[kLanes] = {};
    std::memcpy(tail, x + c, size_t(columns - c) * sizeof(uint16_t));
    step(c, columns - c, fetch(tail, c));
  }

  I16 fetch(const uint16_t* from, int64_t c) const {
    I16 bits;
    std::memcpy(&bits, from, sizeof(bits));
    const auto kept = int16_t(keep[c / 32] >> (c % 32));
    return kept == -1 ? bits : bits & ((kept & kBit) != 0);
  }

  // Largest magnitude and its ratio to the root mean square. Magnitudes are compared as integers, where
  // NaN is above infinity is above every number: nothing invalid hides behind a maximum.
  std::pair<float, float> measure() const {
    I16 top = {};
    Float16 sum = splat(0);
    each([&](int64_t, int64_t, const I16& bits) {
      const I16 magnitude = bits & 0x7FFF;
      top = magnitude > top ? magnitude : top;
      const Float16 value = values<T>(bits);
      sum = plus(sum, value * value);
    });
    float squares[kLanes];
    store_floats(squares, sum);
    float total = 0;
    int16_t largest = 0;
    for (int i = 0; i < kLanes; ++i) total += squares[i], largest = std::max<int16_t>(largest, top[i]);
    const float peak = T(uint16_t(largest), T::from_bits()), rms = std::sqrt(total / float(columns));
    // A row of zeros, and one whose squares overflow, have no outliers that a slot could help.
    return {peak, rms > kTiny ? peak / rms : 0.0f};
  }

  void quantize(float inverse, int8_t* codes) const {
    each([&](int64_t c, int64_t count, const I16& bits) {
      // Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits.
      const Float16 rounded = plus(values<T>(bits) * splat(inverse), splat(12582912.0f));
      if (count == kLanes) return store_low_bytes(codes + c, rounded);
      int8_t tail[kLanes];
      store_low_bytes(tail, rounded);
      std::memcpy(codes + c, tail, size_t(count));
    });
  }
};

constexpr int64_t kGrain = 16384;  // elements a thread must have to be worth waking

using Prepared = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// row_at(r) gives row r of the m, k values.
template <class T, class RowAt>
Prepared prepare(int64_t m, int64_t k, RowAt row_at, const Tensor& index, const Tensor& keep, ScalarType dtype) {
  const int64_t s = index.numel();
  const Tensor codes = empty({m, k}, ScalarType::Char), scales = empty({m, 1}, ScalarType::Float);
  const Tensor side = empty({m, s}, dtype), ratios = empty({m}, ScalarType::Float);
  const Tensor highest = empty({1}, ScalarType::Float);
  const auto* slots = static_cast<const int32_t*>(index.const_data_ptr());
  const auto* words = static_cast<const int32_t*>(keep.const_data_ptr());
  auto* q = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* scale = static_cast<float*>(scales.mutable_data_ptr());
  auto* outliers = static_cast<uint16_t*>(side.mutable_data_ptr());
  auto* ratio = static_cast<float*>(ratios.mutable_data_ptr());
  torch::stable::parallel_for(0, m, std::max<int64_t>(1, kGrain / k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row<T> row{row_at(r), words, k};
      const auto [top, above] = row.measure();
      // Written so that a NaN fails the comparison and reaches the result through the scale.
      scale[r] = top <= kTiny ? 0.0f : top / 127.0f;
      row.quantize(top > kTiny ? 127.0f / top : 0.0f, q + r * k);
      for (int64_t i = 0; i < s; ++i) outliers[r * s + i] = slots[i] < 0 ? 0 : row.x[slots[i]];
      ratio[r] = above;
    }
  });
  *static_cast<float*>(highest.mutable_data_ptr()) = m ? *std::max_element(ratio, ratio + m) : 0.0f;
  return {codes, scales, side, ratios, highest};
}

void check(const char* op, const Tensor& x, int64_t k, const Tensor& index, const Tensor& keep) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
                  ": x must be float16 or bfloat16");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.dim() == 1 && index.is_contiguous(), op,
                  ": index must be a contiguous int32 [S]");
  STD_TORCH_CHECK(keep.scalar_type() == ScalarType::Int && keep.dim() == 1 && keep.is_contiguous() &&
                      keep.numel() == (k + 31) / 32,
                  op, ": keep must be a contiguous int32 [ceil(K / 32)]");
}

Prepared mixq_prepare(const Tensor& x, const Tensor& index, const Tensor& keep) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "mixq_prepare: x must be [M, K] with K > 0");
  check("mixq_prepare", x, x.size(1), index, keep);
  const Rows rows = rows_of(x);
  const auto* from = static_cast<const uint16_t*>(rows.tensor.const_data_ptr());
  const auto row_at = [&](int64_t r) { return from + r * rows.stride; };
  const ScalarType dtype = x.scalar_type();
  return dtype == ScalarType::Half ? prepare<Half>(rows.count, rows.columns, row_at, index, keep, dtype)
                                   : prepare<BFloat16>(rows.count, rows.columns, row_at, index, keep, dtype);
}

using Gated = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Gated gate_and_prepare(const Rows& rows, const uint16_t* table, const Tensor& index, const Tensor& keep,
                       ScalarType dtype) {
  const int64_t k = rows.columns / 2;
  const Tensor product = empty({rows.count, k}, dtype);
  const auto* from = static_cast<const uint16_t*>(rows.tensor.const_data_ptr());
  auto* to = static_cast<uint16_t*>(product.mutable_data_ptr());
  const auto row_at = [&](int64_t r) -> const uint16_t* {
    const uint16_t* gate = from + r * rows.stride;
    gate_row<T>(gate, gate + k, table, to + r * k, k);
    return to + r * k;
  };
  return std::tuple_cat(std::make_tuple(product), prepare<T>(rows.count, k, row_at, index, keep, dtype));
}

Gated mixq_gate_and_prepare(const Tensor& x, const Tensor& table, const Tensor& index, const Tensor& keep) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.size(1) % 2 == 0,
                  "mixq_gate_and_prepare: x must be [M, 2 K] with K > 0: gate and up");
  check("mixq_gate_and_prepare", x, x.size(1) / 2, index, keep);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(table.scalar_type() == dtype && table.dim() == 1 && table.numel() == 65536 &&
                      table.is_contiguous(),
                  "mixq_gate_and_prepare: table must be a contiguous [65536] tensor of x's dtype");
  const auto* entries = static_cast<const uint16_t*>(table.const_data_ptr());
  const auto run = dtype == ScalarType::Half ? gate_and_prepare<Half> : gate_and_prepare<BFloat16>;
  return run(rows_of(x), entries, index, keep, dtype);
}

// Vectors of columns whose sums, times four rows, stay in registers.
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 1;
#endif
constexpr int64_t kWide = kVectors * kLanes;

// out[0..R, 0..width) += side[0..R, :] @ weight[:, 0..width), rounded once; width is at most 16 * V.
template <class T, int R, int V>
void add_block(uint16_t* out, const float* side, const uint16_t* weight, int64_t s, int64_t n, int64_t width) {
  Float16 sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = splat(0);
  }
  for (int64_t i = 0; i < s; ++i) {
    Float16 w[V];
    for (int v = 0; v < V; ++v) w[v] = load_some<T>(weight + i * n + v * kLanes, width - v * kLanes);
    for (int r = 0; r < R; ++r) {
      const Float16 x = splat(side[r * s + i]);
      for (int v = 0; v < V; ++v) sum[r][v] = plus(sum[r][v], w[v] * x);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      uint16_t* y = out + r * n + v * kLanes;
      const int64_t left = width - v * kLanes;
      store_some<T>(y, plus(load_some<T>(y, left), sum[r][v]), left);
    }
  }
}

// All rows of one block of columns, four rows to a read of the weight.
template <class T, int V>
void add_columns(uint16_t* out, const float* side, const uint16_t* weight, int64_t m, int64_t s, int64_t n,
                 int64_t width) {
  int64_t r = 0;
  for (; r + 4 <= m; r += 4) add_block<T, 4, V>(out + r * n, side + r * s, weight, s, n, width);
  for (; r < m; ++r) add_block<T, 1, V>(out + r * n, side + r * s, weight, s, n, width);
}

template <class T>
void add_outliers(uint16_t* out, const uint16_t* side, const uint16_t* weight, int64_t m, int64_t s, int64_t n) {
  std::vector<float> wide(size_t(m * s + kLanes));
  for (int64_t i = 0; i < m * s; i += kLanes) store_floats(wide.data() + i, load_some<T>(side + i, m * s - i));
  const int64_t grain = std::max<int64_t>(1, 8 * kGrain / std::max<int64_t>(1, m * s * kWide));
  torch::stable::parallel_for(0, (n + kWide - 1) / kWide, grain, [&](int64_t begin, int64_t end) {
    int64_t c = begin * kWide;
    const int64_t last = std::min(n, end * kWide);
    for (; c + kWide <= last; c += kWide) add_columns<T, kVectors>(out + c, wide.data(), weight + c, m, s, n, kWide);
    for (; c < last; c += kLanes) {
      add_columns<T, 1>(out + c, wide.data(), weight + c, m, s, n, std::min(kLanes, last - c));
    }
  });
}

void mixq_add_outliers(const Tensor& out, const Tensor& side, const Tensor& weight) {
  const ScalarType dtype = out.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "mixq_add_outliers: out must be float16 or bfloat16");
  STD_TORCH_CHECK(side.scalar_type() == dtype && weight.scalar_type() == dtype && out.dim() == 2 &&
                      side.dim() == 2 && weight.dim() == 2 && side.size(0) == out.size(0) &&
                      weight.size(0) == side.size(1) && weight.size(1) == out.size(1) &&
                      out.is_contiguous() && side.is_contiguous() && weight.is_contiguous(),
                  "mixq_add_outliers: out [M, N], side [M, S] and weight [S, N] must be contiguous, of one dtype");
  const int64_t m = out.size(0), n = out.size(1), s = side.size(1);
  auto* y = static_cast<uint16_t*>(out.mutable_data_ptr());
  const auto* a = static_cast<const uint16_t*>(side.const_data_ptr());
  const auto* w = static_cast<const uint16_t*>(weight.const_data_ptr());
  const auto run = dtype == ScalarType::Half ? add_outliers<Half> : add_outliers<BFloat16>;
  run(y, a, w, m, s, n);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("mixq_prepare", TORCH_BOX(&mixq_prepare));
  library.impl("mixq_gate_and_prepare", TORCH_BOX(&mixq_gate_and_prepare));
  library.impl("mixq_add_outliers", TORCH_BOX(&mixq_add_outliers));
}

}  // namespace lutserve
