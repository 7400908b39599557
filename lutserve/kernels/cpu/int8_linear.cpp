// lutserve::int8_linear: int8 activations x int8 weights, scales, outlier columns and bias in one pass over the
// weight. Schema, meaning and the packed layout: kernels/int8.py.
//
// A tile is a few rows by the columns of a panel, whose sums stay in registers for the whole of K. The packed
// weight is code + 128, and 128 times the sum of the row's own codes is taken off at the end.

#include "tensor.h"
#if defined(__AVX512VNNI__)
#include "int8_vnni.h"
#else
#include "int8_pairs.h"
#endif

namespace lutserve {
namespace {

constexpr int64_t kGrain = 1 << 17;  // products a thread must have to be worth waking, in bytes of weight

// Rows are regrouped by tiles: in a tile all rows' first four codes lie together, then all second fours, so
// that the inner loop reads the activations in one stream too.
struct Tiles {
  int64_t m, count;
  explicit Tiles(int64_t rows) : m(rows), count((rows + kRows - 1) / kRows) {}
  int64_t start(int64_t tile) const { return tile * m / count; }
};

template <class T, int R = kRows>
void tile_of(int64_t rows, const Panel& p, const Activations& a, int64_t row) {
  if (rows == R) return tile<T, R>(p, a, row);
  if constexpr (R > 1) tile_of<T, R - 1>(rows, p, a, row);
}

// Regroups one tile's codes and outliers, and sums each row's codes.
template <class T>
void gather(const int8_t* codes, const uint16_t* side, int64_t rows, int64_t k, int64_t slots, int32_t* to,
            float* side_to, int32_t* sums) {
  const int64_t whole = k / kGroup, groups = (k + kGroup - 1) / kGroup;
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* row = codes + r * k;
    for (int64_t g = 0; g < whole; ++g) put(row + g * kGroup, to + g * kWords * rows + r, rows);
    if (groups > whole) {
      int8_t tail[kGroup] = {};
      std::memcpy(tail, row + whole * kGroup, size_t(k - whole * kGroup));
      put(tail, to + whole * kWords * rows + r, rows);
    }
    for (int64_t s = 0; s < slots; ++s) side_to[s * rows + r] = float(T(side[r * slots + s], T::from_bits()));
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += row[i];
    sums[r] = sum;
  }
}

template <class T>
void run(const int8_t* codes, const float* scales, const uint16_t* side, int64_t m, int64_t k, int64_t slots,
         Panel all) {
  const Tiles tiles(m);
  const int64_t groups = (k + kGroup - 1) / kGroup, panels = (all.n + kColumns - 1) / kColumns;
  const int64_t words = groups * kWords;  // of a row
  const Tensor regrouped = empty({m, words}, ScalarType::Int), wide = empty({m, slots}, ScalarType::Float);
  const Tensor row_sums = empty({m}, ScalarType::Int);
  auto* x = static_cast<int32_t*>(regrouped.mutable_data_ptr());
  auto* outliers = static_cast<float*>(wide.mutable_data_ptr());
  auto* sums = static_cast<int32_t*>(row_sums.mutable_data_ptr());
  const int64_t tile_grain = std::max<int64_t>(1, kGrain / (k * kRows));
  torch::stable::parallel_for(0, tiles.count, tile_grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = tiles.start(t), rows = tiles.start(t + 1) - row;
      gather<T>(codes + row * k, side + row * slots, rows, k, slots, x + row * words, outliers + row * slots,
                sums + row);
    }
  });
  const int64_t panel_bytes = groups * kGroup * kColumns;
  torch::stable::parallel_for(0, panels, std::max<int64_t>(1, kGrain / panel_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i * kColumns;
      Panel panel{all.weight + i * panel_bytes, all.scales + column,  all.outliers + column,
                  all.bias ? all.bias + column : nullptr, all.out + column, all.n,
                  std::min(kColumns, all.n - column), nullptr};
      const std::vector<float> widened = widen_outliers<T>(panel, slots);
      panel.wide = widened.data();
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t row = tiles.start(t);
        const Activations a{x + row * words, outliers + row * slots, scales + row, sums + row, groups, slots};
        tile_of<T>(tiles.start(t + 1) - row, panel, a, row);
      }
    }
  });
}

Tensor int8_linear(const Tensor& codes, const Tensor& scales, const Tensor& packed, const Tensor& weight_scales,
                   const Tensor& side, const Tensor& outliers, const std::optional<Tensor>& bias) {
  const ScalarType dtype = outliers.scalar_type();
  const int64_t m = codes.size(0), k = codes.size(1), n = outliers.size(1), slots = outliers.size(0);
  const int64_t panels = (n + kColumns - 1) / kColumns, groups = (k + kGroup - 1) / kGroup;
  const auto is = [](const Tensor& t, ScalarType type, int64_t count) {
    return t.scalar_type() == type && t.numel() == count && t.is_contiguous();
  };
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "int8_linear: outliers must be float16 or bfloat16 [S, N]");
  STD_TORCH_CHECK(k <= 65536, "int8_linear: K must be at most 65536");
  STD_TORCH_CHECK(is(codes, ScalarType::Char, m * k) && is(scales, ScalarType::Float, m) &&
                      is(packed, ScalarType::Byte, panels * groups * kColumns * kGroup) &&
                      is(weight_scales, ScalarType::Float, panels * kColumns) && is(side, dtype, m * slots) &&
                      is(outliers, dtype, slots * n) && (!bias || is(*bias, dtype, n)),
                  "int8_linear: tensors do not fit each other; see lutserve/kernels/int8.py");
  const Tensor out = empty({m, n}, dtype);
  const auto bits = [](const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); };
  const Panel all{static_cast<const uint8_t*>(packed.const_data_ptr()),
                  static_cast<const float*>(weight_scales.const_data_ptr()),
                  bits(outliers),
                  bias ? bits(*bias) : nullptr,
                  static_cast<uint16_t*>(out.mutable_data_ptr()),
                  n,
                  kColumns,
                  nullptr};
  const auto launch = dtype == ScalarType::Half ? run<Half> : run<BFloat16>;
  if (m && n) {
    launch(static_cast<const int8_t*>(codes.const_data_ptr()), static_cast<const float*>(scales.const_data_ptr()),
           bits(side), m, k, slots, all);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("int8_linear", TORCH_BOX(&int8_linear));
}

}  // namespace lutserve
