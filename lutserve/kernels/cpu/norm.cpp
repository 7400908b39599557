// lutserve::lut_rms_norm, lut_add_rms_norm, lut_layer_norm. Schema and meaning: kernels/norm.py.

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "tensor.h"
#include "vec_float.h"

namespace lutserve {
namespace {

constexpr int64_t kStripe = 64;    // columns c, c + 64, ... are summed one after another
constexpr int64_t kGrain = 16384;  // elements a thread must have to be worth waking

// 1 / sqrt(v) by the table: v rounded to eleven bits is m * 4^e with m in [1, 4).
float rsqrt_of(float v, const uint16_t* table) {
  if (!(v > 0)) return v == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  if (std::isinf(v)) return 0;
  const bool tiny = v < std::numeric_limits<float>::min();
  if (tiny) v *= 0x1p24f;
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  bits = (bits + 0xFFF + (bits >> 13 & 1)) >> 13;
  const int exponent = int(bits >> 10) - 127;
  const int half = exponent >> 1;
  const uint16_t entry = table[(15 + (exponent & 1)) << 10 | (bits & 0x3FF)];
  const uint32_t power = uint32_t(127 - half + (tiny ? 12 : 0)) << 23;
  float scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return float(Half(entry, Half::from_bits())) * scale;
}

// A tensor [..., columns] seen as rows that lie at two strides: heads inside tokens, for example.
struct Rows2 {
  Tensor tensor;
  int64_t count, columns, inner = 1, step = 0, outer = 0;

  const uint16_t* row(int64_t i) const {
    const auto* base = static_cast<const uint16_t*>(tensor.const_data_ptr());
    return base + i / inner * outer + i % inner * step;
  }
};

// Copies only what cannot be seen so.
Rows2 rows2_of(const Tensor& x) {
  const auto size = x.sizes();
  const auto stride = x.strides();
  const int64_t last = int64_t(size.size()) - 1;
  Rows2 rows{x, x.numel() / size[last], size[last]};
  int groups = 0;
  int64_t expected = -1;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (size[i] == 1) continue;
    if (groups == 0 || (stride[i] != expected && groups == 1)) {
      (groups++ ? rows.outer : rows.step) = stride[i];
    } else if (stride[i] != expected) {
      groups = 3;
      break;
    }
    if (groups == 1) rows.inner *= size[i];
    expected = stride[i] * size[i];
  }
  if (groups < 3 && (stride[last] == 1 || rows.columns == 1)) return rows;
  return {torch::stable::contiguous(x), rows.count, rows.columns, 1, 0, rows.columns};
}

// weight or bias: absent, fp32, or of x's dtype
struct Vector {
  const void* data = nullptr;
  bool wide = false;

  template <class T>
  Float16 at(int64_t i, int64_t n) const {
    return wide ? load_some(static_cast<const float*>(data) + i, n)
                : load_some<T>(static_cast<const uint16_t*>(data) + i, n);
  }
};

Vector vector_of(const std::optional<Tensor>& v, const Tensor& x) {
  if (!v) return {};
  const bool wide = v->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK((wide || v->scalar_type() == x.scalar_type()) && v->dim() == 1 && v->is_contiguous() &&
                      v->numel() == x.size(x.dim() - 1),
                  "norm: weight and bias must be contiguous [columns], of x's dtype or float32");
  return {v->const_data_ptr(), wide};
}

// Sum of row[0 .. padded) by columns modulo 64, then the 64 sums halved six times.
template <class F>
float sum(const float* row, int64_t padded, F f) {
  Float16 sums[4] = {splat(0), splat(0), splat(0), splat(0)};
  for (int64_t i = 0; i < padded; i += kStripe) {
    for (int k = 0; k < 4; ++k) sums[k] = plus(sums[k], f(load_floats(row + i + k * kLanes)));
  }
  float lanes[kLanes];
  store_floats(lanes, plus(plus(sums[0], sums[2]), plus(sums[1], sums[3])));
  for (int i = 0; i < 8; ++i) lanes[i] += lanes[i + 8];
  for (int i = 0; i < 4; ++i) lanes[i] += lanes[i + 4];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

Float16 square(Float16 x) {
  return x * x;
}

Float16 same(Float16 x) {
  return x;
}

struct Norm {
  int64_t columns;
  Vector weight, bias;
  const uint16_t* table;
  float eps;

  int64_t padded() const { return (columns + kStripe - 1) / kStripe * kStripe; }
};

// y = round(round(x * r) * w); the inner rounding only where the weight is of 16 bits.
template <class T>
void rms_row(const Norm& norm, float* row, uint16_t* y) {
  const float mean = sum(row, norm.padded(), square) / float(norm.columns);
  const Float16 r = splat(rsqrt_of(mean + norm.eps, norm.table));
  for (int64_t i = 0; i < norm.columns; i += kLanes) {
    const int64_t n = norm.columns - i;
    Float16 x = load_floats(row + i) * r;
    if (norm.weight.data) {
      if (!norm.weight.wide) x = rounded<T>(x);
      x = x * norm.weight.at<T>(i, n);
    }
    store_some<T>(y + i, x, n);
  }
}

template <class T>
void layer_row(const Norm& norm, float* row, uint16_t* y) {
  const Float16 mean = splat(sum(row, norm.padded(), same) / float(norm.columns));
  for (int64_t i = 0; i < norm.columns; i += kLanes) store_floats(row + i, minus(load_floats(row + i), mean));
  std::fill(row + norm.columns, row + norm.padded(), 0.0f);
  const float variance = sum(row, norm.padded(), square) / float(norm.columns);
  const Float16 r = splat(rsqrt_of(variance + norm.eps, norm.table));
  for (int64_t i = 0; i < norm.columns; i += kLanes) {
    const int64_t n = norm.columns - i;
    Float16 x = load_floats(row + i) * r;
    if (norm.weight.data) x = x * norm.weight.at<T>(i, n);
    if (norm.bias.data) x = plus(x, norm.bias.at<T>(i, n));
    store_some<T>(y + i, x, n);
  }
}

// Widens a row, adds the residual to it and stores their rounded sum, if there is one.
template <class T>
void read_row(const uint16_t* x, const uint16_t* residual, uint16_t* total, int64_t columns, float* row) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    Float16 value = load_some<T>(x + i, columns - i);
    if (residual) {
      value = plus(value, load_some<T>(residual + i, columns - i));
      store_some<T>(total + i, value, columns - i);
    }
    store_floats(row + i, value);
  }
}

template <class T>
void run(const Norm& norm, bool centred, const Rows2& x, const Rows2* residual, uint16_t* total, uint16_t* y) {
  const int64_t grain = std::max<int64_t>(1, kGrain / norm.columns);
  torch::stable::parallel_for(0, x.count, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> row(size_t(norm.padded()));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * norm.columns;
      read_row<T>(x.row(i), residual ? residual->row(i) : nullptr, total + at, norm.columns, row.data());
      // The last sixteen of read_row and of the row before may reach beyond the end, but only with zeros.
      (centred ? layer_row<T> : rms_row<T>)(norm, row.data(), y + at);
    }
  });
}

void check(const Tensor& x, const Tensor& table) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16,
                  "norm: x must be float16 or bfloat16");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "norm: x must be [..., columns], columns > 0");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Half && table.dim() == 1 && table.numel() == 65536 &&
                      table.is_contiguous(),
                  "norm: table must be a contiguous float16 [65536]");
}

Tensor like(const Tensor& x) {
  return empty({x.sizes().begin(), x.sizes().end()}, x.scalar_type());
}

Norm norm_of(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
             const Tensor& table, double eps) {
  check(x, table);
  return {x.size(x.dim() - 1), vector_of(weight, x), vector_of(bias, x),
          static_cast<const uint16_t*>(table.const_data_ptr()), float(eps)};
}

Tensor normalize(const Tensor& x, const Norm& norm, bool centred) {
  const Tensor y = like(x);
  auto* out = static_cast<uint16_t*>(y.mutable_data_ptr());
  (x.scalar_type() == ScalarType::Half ? run<Half> : run<BFloat16>)(norm, centred, rows2_of(x), nullptr, out, out);
  return y;
}

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, const Tensor& table, double eps) {
  return normalize(x, norm_of(x, weight, std::nullopt, table, eps), false);
}

Tensor layer_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                  const Tensor& table, double eps) {
  return normalize(x, norm_of(x, weight, bias, table, eps), true);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const std::optional<Tensor>& weight, const Tensor& table, double eps) {
  const Norm norm = norm_of(x, weight, std::nullopt, table, eps);
  bool equal = residual.scalar_type() == x.scalar_type() && residual.dim() == x.dim();
  for (int64_t i = 0; equal && i < x.dim(); ++i) equal = residual.size(i) == x.size(i);
  STD_TORCH_CHECK(equal, "norm: residual must have x's shape and dtype");
  const Tensor y = like(x), total = like(x);
  const Rows2 rows = rows2_of(residual);
  (x.scalar_type() == ScalarType::Half ? run<Half> : run<BFloat16>)(
      norm, false, rows2_of(x), &rows, static_cast<uint16_t*>(total.mutable_data_ptr()),
      static_cast<uint16_t*>(y.mutable_data_ptr()));
  return {y, total};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("lut_rms_norm", TORCH_BOX(&rms_norm));
  library.impl("lut_add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("lut_layer_norm", TORCH_BOX(&layer_norm));
}

}  // namespace lutserve
