// lutserve::axcore_strict, lutserve::fpma_linear: approximate products, summed in fp16 in the published order.
// Schemas and meaning: kernels/axcore.py; the packed layout of the codes: kernels/lut_gemm.py.
//
// Sums are kept in fp32 and rounded to fp16 after every addition: fp32 holds the sum of two fp16 numbers closely
// enough that the second rounding is as good as a single one. A tile is a few rows by 32 columns, one lane of a
// register a column, so no sum ever meets another.

#include <utility>

#include "simd.h"
#include "tensor.h"

namespace lutserve {
namespace {

constexpr int kVectors = 2;
constexpr int64_t kColumns = kVectors * kLanes, kOctet = 8, kOctetBytes = kColumns * kOctet / 2;
constexpr int64_t kTile = 64;         // input columns that fpma_linear sums in fp16
constexpr int64_t kGrain = 1 << 14;   // products a thread must have to be worth waking
constexpr int32_t kBias = 0x3C00, kNan = 0x7FFF;
#if defined(__AVX512F__)
constexpr int kRows = 4;
#else
constexpr int kRows = 2;
#endif

using Octet = uint32_t __attribute__((vector_size(64)));   // 16 columns by 8 codes
using Words = uint16_t __attribute__((vector_size(32)));

// The sixteen products of one activation, looked up by the low four bits of each lane.
struct Products {
#if defined(__AVX512F__)
  __m512 values;
  explicit Products(const uint16_t* row) : values(widen<Half>(load(row)).v) {}
  F32 operator()(const Octet& index) const { return F32(_mm512_permutexvar_ps(__m512i(index), values)); }
#elif defined(__AVX2__)
  Float16 values;
  explicit Products(const uint16_t* row) : values(widen<Half>(load(row))) {}
  __m256 half(__m256i index) const {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 chooses the half
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(values.low, index),
                            _mm256_permutevar8x32_ps(values.high, index), upper);
  }
  F32 operator()(const Octet& index) const {
    struct Halves {
      __m256i low, high;
    };
    const auto halves = cast<Halves>(index);
    return cast<F32>(Float16{half(halves.low), half(halves.high)});
  }
#else
  Float16 values;
  explicit Products(const uint16_t* row) : values(widen<Half>(load(row))) {}
  F32 operator()(const Octet& index) const {
    F32 found;
    for (int i = 0; i < kLanes; ++i) found[i] = values.lane[index[i] & 15];
    return found;
  }
#endif
};

inline F32 round_to_half(const F32& x) {
  return cast<F32>(widen<Half>(narrow<Half>(cast<Float16>(x))));
}

// a * b by one integer addition, for the low 15 bits of fp16 patterns; `shift` is bias - compensation.
inline Words fpma(const Words& a, const Words& b, uint16_t shift) {
  const Words left = a & 0x7FFF, right = b & 0x7FFF, sum = left + right;
  const Words magnitude = (sum > shift ? sum - shift : Words{}) & 0x7FFF;
  return (left == 0) | (right == 0) ? Words{} : magnitude | ((a ^ b) & 0x8000);
}

struct Panel {
  const uint8_t* codes;    // [octets][2][16][4]
  const uint16_t* scales;  // [groups][32]
  const uint8_t* types;    // [groups], or null: all 0
};

struct Call {
  const uint16_t* x;  // [m][stride]
  const uint16_t *products, *bias;
  uint16_t* out;
  int64_t m, k, n, stride, group;
  bool fpma_dequant;
};

// A finished group: its fp16 sums times their scales, in fp16, into fp32.
inline F32 scaled(const F32& sum, const uint16_t* scale, bool by_fpma) {
  if (!by_fpma) return round_to_half(sum * cast<F32>(widen<Half>(load(scale))));
  const Words bits = cast<Words>(narrow<Half>(cast<Float16>(sum)));
  const Words number = (bits & 0x7FFF) > 0x7C00 ? Words{} + uint16_t(kNan) : bits;
  return cast<F32>(widen<Half>(cast<Bits16>(fpma(number, cast<Words>(load(scale)), kBias))));
}

// total[R, 32] of one panel.
template <int R>
void tile(const Panel& p, const Call& call, const uint16_t* x, F32* total) {
  for (int i = 0; i < R * kVectors; ++i) total[i] = F32{};
  const int64_t groups = call.k / call.group;
  for (int64_t g = 0; g < groups; ++g) {
    const uint16_t* table = call.products + (p.types ? p.types[g] : 0) * (int64_t(1) << 20);
    F32 sum[R * kVectors] = {};
    for (int64_t k = g * call.group; k < (g + 1) * call.group; k += kOctet) {
      const uint8_t* at = p.codes + k / kOctet * kOctetBytes;
      // Input column after column, which is not the order of the nibbles (see lut_gemm.ORDER).
      for (int c = 0; c < kOctet; ++c) {
        const int shift = 4 * (c % 2 * 4 + c / 2);
        Octet left, right;
        std::memcpy(&left, at, sizeof(left));
        std::memcpy(&right, at + sizeof(left), sizeof(right));
        left >>= shift;
        right >>= shift;
        for (int r = 0; r < R; ++r) {
          const Products products(table + x[r * call.stride + k + c] * 16);
          sum[2 * r] = round_to_half(sum[2 * r] + products(left));
          sum[2 * r + 1] = round_to_half(sum[2 * r + 1] + products(right));
        }
      }
    }
    for (int i = 0; i < R * kVectors; ++i) {
      total[i] += scaled(sum[i], p.scales + g * kColumns + i % kVectors * kLanes, call.fpma_dequant);
    }
  }
}

// The same for a weight of fp16 patterns, [k][32], and no scales.
template <int R>
void uniform_tile(const uint16_t* weight, const Call& call, uint16_t shift, const uint16_t* x, F32* total) {
  for (int i = 0; i < R * kVectors; ++i) total[i] = F32{};
  for (int64_t begin = 0; begin < call.k; begin += kTile) {
    F32 sum[R * kVectors] = {};
    for (int64_t k = begin; k < std::min(call.k, begin + kTile); ++k) {
      for (int i = 0; i < R * kVectors; ++i) {
        const Words a = Words{} + x[i / kVectors * call.stride + k];
        const auto b = cast<Words>(load(weight + k * kColumns + i % kVectors * kLanes));
        sum[i] = round_to_half(sum[i] + cast<F32>(widen<Half>(cast<Bits16>(fpma(a, b, shift)))));
      }
    }
    for (int i = 0; i < R * kVectors; ++i) total[i] += sum[i];
  }
}

// Rounds totals, adds the bias, and writes what lies inside.
void finish(const Call& call, int64_t row, int64_t rows, int64_t column, const F32* total) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = column + v * kLanes, width = std::min(kLanes, call.n - first);
      if (width <= 0) break;
      uint16_t bits[kLanes] = {};
      F32 y = round_to_half(total[r * kVectors + v]);
      if (call.bias) {
        std::memcpy(bits, call.bias + first, size_t(width) * sizeof(uint16_t));
        y += cast<F32>(widen<Half>(load(bits)));
      }
      store(bits, narrow<Half>(cast<Float16>(y)));
      std::memcpy(call.out + (row + r) * call.n + first, bits, size_t(width) * sizeof(uint16_t));
    }
  }
}

// Calls run(panel, rows as a constant, first row, totals) for every tile, panels in parallel.
template <class Run>
void over_tiles(const Call& call, const Run& run) {
  const int64_t panels = (call.n + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kColumns * call.k * call.m));
  torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    F32 total[kRows * kVectors];
    for (int64_t p = begin; p < end; ++p) {
      int64_t row = 0;
      for (; row + kRows <= call.m; row += kRows) {
        run(p, std::integral_constant<int, kRows>(), row, total);
        finish(call, row, kRows, p * kColumns, total);
      }
      for (; row < call.m; ++row) {
        run(p, std::integral_constant<int, 1>(), row, total);
        finish(call, row, 1, p * kColumns, total);
      }
    }
  });
}

bool is(const Tensor& t, ScalarType type, int64_t count) {
  return t.scalar_type() == type && t.numel() == count && t.is_contiguous();
}

const uint16_t* halves(const Tensor& t) {
  return static_cast<const uint16_t*>(t.const_data_ptr());
}

Tensor axcore_strict(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& types,
                     const Tensor& products, int64_t group_size, int64_t n, bool fpma_dequant,
                     const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half && x.dim() == 2 && x.size(1) > 0,
                  "axcore_strict: x must be float16 [M, K] with K > 0");
  const int64_t m = x.size(0), k = x.size(1);
  STD_TORCH_CHECK(group_size > 0 && group_size % kOctet == 0 && k % group_size == 0,
                  "axcore_strict: group_size must be a multiple of 8 that divides K");
  const int64_t panels = (n + kColumns - 1) / kColumns, groups = k / group_size, tables = products.size(0);
  STD_TORCH_CHECK(is(packed, ScalarType::Byte, panels * k / kOctet * kOctetBytes) &&
                      is(scales, ScalarType::Half, panels * groups * kColumns) &&
                      is(products, ScalarType::Half, tables << 20) &&
                      (types ? is(*types, ScalarType::Byte, panels * groups) : tables == 1) &&
                      (!bias || is(*bias, ScalarType::Half, n)),
                  "axcore_strict: tensors do not fit each other; see lutserve/kernels/axcore.py");
  const Rows rows = rows_of(x);
  const Tensor out = empty({m, n}, ScalarType::Half);
  const Call call{halves(rows.tensor), halves(products), bias ? halves(*bias) : nullptr,
                  static_cast<uint16_t*>(out.mutable_data_ptr()), m, k, n, rows.stride, group_size, fpma_dequant};
  const auto* codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  const auto* kinds = types ? static_cast<const uint8_t*>(types->const_data_ptr()) : nullptr;
  over_tiles(call, [&](int64_t p, auto count, int64_t row, F32* total) {
    const Panel panel{codes + p * (k / kOctet) * kOctetBytes, halves(scales) + p * groups * kColumns,
                      kinds ? kinds + p * groups : nullptr};
    tile<count>(panel, call, call.x + row * call.stride, total);
  });
  return out;
}

Tensor fpma_linear(const Tensor& x, const Tensor& weight, int64_t compensation, int64_t n,
                   const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half && x.dim() == 2, "fpma_linear: x must be float16 [M, K]");
  const int64_t m = x.size(0), k = x.size(1), panels = (n + kColumns - 1) / kColumns;
  STD_TORCH_CHECK(is(weight, ScalarType::Half, panels * k * kColumns) && compensation >= 0 && compensation <= kBias &&
                      (!bias || is(*bias, ScalarType::Half, n)),
                  "fpma_linear: tensors do not fit each other; see lutserve/kernels/axcore.py");
  const Rows rows = rows_of(x);
  const Tensor out = empty({m, n}, ScalarType::Half);
  const Call call{halves(rows.tensor), nullptr, bias ? halves(*bias) : nullptr,
                  static_cast<uint16_t*>(out.mutable_data_ptr()), m, k, n, rows.stride, kTile, false};
  const auto shift = uint16_t(kBias - compensation);
  over_tiles(call, [&](int64_t p, auto count, int64_t row, F32* total) {
    uniform_tile<count>(halves(weight) + p * k * kColumns, call, shift, call.x + row * call.stride, total);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("axcore_strict", TORCH_BOX(&axcore_strict));
  library.impl("fpma_linear", TORCH_BOX(&fpma_linear));
}

}  // namespace lutserve
