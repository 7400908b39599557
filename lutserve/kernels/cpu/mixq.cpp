// lutserve::mixq_prepare: split outlier columns off and quantise the rest, row by row, in two reads of
// a row that stays in cache. lutserve::mixq_add_outliers: the thin product of those columns, for few rows.
// Schemas and meaning: kernels/mixq.py.

#include <cmath>
#include <cstring>
#include <tuple>

#include "simd.h"
#include "tensor.h"

namespace lutserve {
namespace {

// Rows whose largest value is below this are zero: 127 / peak would leave fp32's range.
constexpr float kTiny = 1e-30f;

using I8 = int8_t __attribute__((vector_size(16)));
constexpr I32 kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class T>
struct Row {
  const uint16_t* x;
  const int32_t* keep;
  int64_t columns;

  // Calls step(first column, count, bits of sixteen columns in fp32, 0 where not kept); the last call may
  // have fewer columns, with zeros behind them.
  template <class Step>
  void each(Step step) const {
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) step(c, kLanes, fetch(x + c, c));
    if (c == columns) return;
    uint16_t tail[kLanes] = {};
    std::memcpy(tail, x + c, size_t(columns - c) * sizeof(uint16_t));
    step(c, columns - c, fetch(tail, c));
  }

  I32 fetch(const uint16_t* from, int64_t c) const {
    const I32 bits = cast<I32>(widen<T>(load(from)));
    const int32_t kept = (keep[c / 32] >> (c % 32)) & 0xFFFF;
    if (kept == 0xFFFF) return bits;
    return ((kept >> kLane) & 1) != 0 ? bits : I32{};
  }

  // Largest magnitude and its ratio to the root mean square. Magnitudes are compared as integers, where
  // NaN is above infinity is above every number: nothing invalid hides behind a maximum.
  std::pair<float, float> measure() const {
    I32 top = {};
    F32 sum = {};
    each([&](int64_t, int64_t, I32 bits) {
      const I32 magnitude = bits & 0x7FFFFFFF;
      top = magnitude > top ? magnitude : top;
      sum += cast<F32>(bits) * cast<F32>(bits);
    });
    float total = 0;
    int32_t largest = 0;
    for (int i = 0; i < kLanes; ++i) total += sum[i], largest = std::max(largest, top[i]);
    const float peak = cast<float>(largest), rms = std::sqrt(total / float(columns));
    // A row of zeros, and one whose squares overflow, have no outliers that a slot could help.
    return {peak, rms > kTiny ? peak / rms : 0.0f};
  }

  void quantize(float inverse, int8_t* codes) const {
    each([&](int64_t c, int64_t count, I32 bits) {
      // Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits.
      const F32 rounded = cast<F32>(bits) * inverse + 12582912.0f;
      const I8 q = __builtin_convertvector(cast<I32>(rounded) - 0x4B400000, I8);
      if (count == kLanes) {
        std::memcpy(codes + c, &q, kLanes);
      } else {
        std::memcpy(codes + c, &q, size_t(count));
      }
    });
  }
};

constexpr int64_t kGrain = 16384;  // elements a thread must have to be worth waking

using Prepared = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Prepared prepare(const Rows& rows, const Tensor& index, const Tensor& keep, ScalarType dtype) {
  const int64_t m = rows.count, k = rows.columns, s = index.numel();
  const Tensor codes = empty({m, k}, ScalarType::Char), scales = empty({m, 1}, ScalarType::Float);
  const Tensor side = empty({m, s}, dtype), ratios = empty({m}, ScalarType::Float);
  const Tensor highest = empty({1}, ScalarType::Float);
  const auto* x = static_cast<const uint16_t*>(rows.tensor.const_data_ptr());
  const auto* slots = static_cast<const int32_t*>(index.const_data_ptr());
  const auto* words = static_cast<const int32_t*>(keep.const_data_ptr());
  auto* q = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* scale = static_cast<float*>(scales.mutable_data_ptr());
  auto* outliers = static_cast<uint16_t*>(side.mutable_data_ptr());
  auto* ratio = static_cast<float*>(ratios.mutable_data_ptr());
  torch::stable::parallel_for(0, m, std::max<int64_t>(1, kGrain / k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row<T> row{x + r * rows.stride, words, k};
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

Prepared mixq_prepare(const Tensor& x, const Tensor& index, const Tensor& keep) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "mixq_prepare: x must be float16 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "mixq_prepare: x must be [M, K] with K > 0");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.dim() == 1 && index.is_contiguous(),
                  "mixq_prepare: index must be a contiguous int32 [S]");
  STD_TORCH_CHECK(keep.scalar_type() == ScalarType::Int && keep.dim() == 1 && keep.is_contiguous() &&
                      keep.numel() == (x.size(1) + 31) / 32,
                  "mixq_prepare: keep must be a contiguous int32 [ceil(K / 32)]");
  const auto run = dtype == ScalarType::Half ? prepare<Half> : prepare<BFloat16>;
  return run(rows_of(x), index, keep, dtype);
}

constexpr int64_t kWide = 4 * kLanes;  // columns whose sums stay in registers, times four rows

template <class T>
F32 fetch(const uint16_t* p, int64_t width) {
  if (width >= kLanes) return cast<F32>(widen<T>(load(p)));
  uint16_t tail[kLanes] = {};
  std::memcpy(tail, p, size_t(width) * sizeof(uint16_t));
  return cast<F32>(widen<T>(load(tail)));
}

// out[0..R, 0..width) += side[0..R, :] @ weight[:, 0..width), rounded once; width is at most 16 * V.
template <class T, int R, int V>
void add_block(uint16_t* out, const uint16_t* side, const uint16_t* weight, int64_t s, int64_t n, int64_t width) {
  F32 sum[R][V] = {};
  for (int64_t i = 0; i < s; ++i) {
    F32 w[V];
    for (int v = 0; v < V; ++v) w[v] = fetch<T>(weight + i * n + v * kLanes, width - v * kLanes);
    for (int r = 0; r < R; ++r) {
      const float x = float(T(side[r * s + i], T::from_bits()));
      for (int v = 0; v < V; ++v) sum[r][v] += w[v] * x;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      const int64_t left = std::min<int64_t>(kLanes, width - v * kLanes);
      uint16_t* y = out + r * n + v * kLanes;
      uint16_t bits[kLanes];
      store(bits, narrow<T>(cast<Float16>(fetch<T>(y, left) + sum[r][v])));
      std::memcpy(y, bits, size_t(left) * sizeof(uint16_t));
    }
  }
}

// All rows of one block of columns, four rows to a read of the weight.
template <class T, int V>
void add_columns(uint16_t* out, const uint16_t* side, const uint16_t* weight, int64_t m, int64_t s, int64_t n,
                 int64_t width) {
  int64_t r = 0;
  for (; r + 4 <= m; r += 4) add_block<T, 4, V>(out + r * n, side + r * s, weight, s, n, width);
  for (; r < m; ++r) add_block<T, 1, V>(out + r * n, side + r * s, weight, s, n, width);
}

template <class T>
void add_span(uint16_t* out, const uint16_t* side, const uint16_t* weight, int64_t m, int64_t s, int64_t n,
              int64_t begin, int64_t end) {
  int64_t c = begin;
  for (; c + kWide <= end; c += kWide) add_columns<T, kWide / kLanes>(out + c, side, weight + c, m, s, n, kWide);
  for (; c < end; c += kLanes) {
    add_columns<T, 1>(out + c, side, weight + c, m, s, n, std::min(kLanes, end - c));
  }
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
  const auto run = dtype == ScalarType::Half ? add_span<Half> : add_span<BFloat16>;
  const int64_t grain = std::max<int64_t>(1, 8 * kGrain / std::max<int64_t>(1, m * s * kWide));
  torch::stable::parallel_for(0, (n + kWide - 1) / kWide, grain, [&](int64_t begin, int64_t end) {
    run(y, a, w, m, s, n, begin * kWide, std::min(n, end * kWide));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("mixq_prepare", TORCH_BOX(&mixq_prepare));
  library.impl("mixq_add_outliers", TORCH_BOX(&mixq_add_outliers));
}

}  // namespace lutserve
