// lutserve::mixq_prepare: split outlier columns off and quantise the rest, row by row, in two reads of
// a row that stays in cache. Schema and meaning: kernels/ops.py.

#include <cmath>
#include <cstring>
#include <tuple>

#include "tensor.h"
#include "vec.h"

namespace lutserve {
namespace {

// Rows whose largest value is below this are zero: 127 / peak would leave fp32's range.
constexpr float kTiny = 1e-30f;

// Sixteen lanes by the compiler's vector extension, which it splits or not as the instruction set allows.
using F32 = float __attribute__((vector_size(64)));
using I32 = int32_t __attribute__((vector_size(64)));
using I8 = int8_t __attribute__((vector_size(16)));
constexpr I32 kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class To, class From>
To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

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

using Prepared = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
Prepared prepare(const Rows& rows, const Tensor& index, const Tensor& keep, ScalarType dtype) {
  const int64_t m = rows.count, k = rows.columns, s = index.numel();
  const Tensor codes = empty({m, k}, ScalarType::Char), scales = empty({m, 1}, ScalarType::Float);
  const Tensor side = empty({m, s}, dtype), peak = empty({1}, ScalarType::Float);
  const auto* x = static_cast<const uint16_t*>(rows.tensor.const_data_ptr());
  const auto* slots = static_cast<const int32_t*>(index.const_data_ptr());
  const auto* words = static_cast<const int32_t*>(keep.const_data_ptr());
  auto* q = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* scale = static_cast<float*>(scales.mutable_data_ptr());
  auto* outliers = static_cast<uint16_t*>(side.mutable_data_ptr());
  std::vector<float> ratios(size_t(std::max<int64_t>(m, 1)), 0.0f);
  torch::stable::parallel_for(0, m, std::max<int64_t>(1, kGrain / k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row<T> row{x + r * rows.stride, words, k};
      const auto [top, ratio] = row.measure();
      // Written so that a NaN fails the comparison and reaches the result through the scale.
      scale[r] = top <= kTiny ? 0.0f : top / 127.0f;
      row.quantize(top > kTiny ? 127.0f / top : 0.0f, q + r * k);
      for (int64_t i = 0; i < s; ++i) outliers[r * s + i] = slots[i] < 0 ? 0 : row.x[slots[i]];
      ratios[size_t(r)] = ratio;
    }
  });
  *static_cast<float*>(peak.mutable_data_ptr()) = *std::max_element(ratios.begin(), ratios.end());
  return {codes, scales, side, peak};
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
  const Rows rows = rows_of(x);
  return dtype == ScalarType::Half ? prepare<Half>(rows, index, keep, dtype)
                                   : prepare<BFloat16>(rows, index, keep, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("mixq_prepare", TORCH_BOX(&mixq_prepare));
}

}  // namespace lutserve
