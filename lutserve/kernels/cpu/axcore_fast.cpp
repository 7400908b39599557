// lutserve::axcore_fast: approximate products by one integer addition each, summed in fp32. Schema and rule:
// kernels/axcore_fast.py; the packed layout of the codes: kernels/lut_gemm.py.

#include "lut_indices.h"

namespace lutserve {
namespace {

using Bits = int32_t __attribute__((vector_size(sizeof(Vec))));

// A code's number is what it adds to an activation's pattern, and the sum is the pattern of the product.
struct Addends : Indices<3> {
  static float word(float x) {
    constexpr int32_t kSmallest = 70 << 23, kLargest = 227 << 23;  // 2^-57, 2^100
    const int32_t bits = cast<int32_t>(x), sign = bits & int32_t(0x80000000);
    return cast<float>(sign | std::clamp(bits & 0x7FFFFFFF, kSmallest, kLargest));
  }
  static Vec add_product(Vec w, Vec x, Vec sum) { return sum + cast<Vec>(cast<Bits>(w) + cast<Bits>(x)); }
};

// Rows that hold NaN become NaN: a pattern that stands for no number is lost in additions.
void spoil(const uint16_t* x, int64_t k, uint16_t infinity, uint16_t* out, int64_t n) {
  uint16_t most = 0;
  for (int64_t i = 0; i < k; ++i) most = std::max<uint16_t>(most, x[i] & 0x7FFF);
  if (most > infinity) std::fill(out, out + n, uint16_t(0x7FFF));
}

Tensor axcore_fast(const Tensor& x, const Tensor& packed, const Tensor& addends, const Tensor& scales,
                   const std::optional<Tensor>& types, int64_t group_size, int64_t n,
                   const std::optional<Tensor>& bias) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Half || dtype == ScalarType::BFloat16) && x.dim() == 2 && x.size(1) > 0,
                  "axcore_fast: x must be float16 or bfloat16 [M, K] with K > 0");
  const int64_t m = x.size(0), k = x.size(1);
  STD_TORCH_CHECK(group_size > 0 && group_size % kOctet == 0 && k % group_size == 0,
                  "axcore_fast: group_size must be a multiple of 8 that divides K");
  const int64_t panels = (n + kColumns - 1) / kColumns, octets = k / kOctet, groups = k / group_size;
  const auto is = [](const Tensor& t, ScalarType type, int64_t count) {
    return t.scalar_type() == type && t.numel() == count && t.is_contiguous();
  };
  STD_TORCH_CHECK(is(packed, ScalarType::Byte, panels * octets * Addends::kOctetBytes) &&
                      is(scales, ScalarType::Float, panels * groups * kColumns) && addends.dim() == 2 &&
                      is(addends, ScalarType::Int, addends.size(0) * 16) &&
                      (types ? is(*types, ScalarType::Byte, panels * groups) : addends.size(0) == 1) &&
                      (!bias || is(*bias, dtype, n)),
                  "axcore_fast: tensors do not fit each other; see lutserve/kernels/axcore_fast.py");
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x), out = empty({m, n}, dtype);
  const auto bits = [](const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); };
  const Call call{bits(rows),
                  static_cast<const uint8_t*>(packed.const_data_ptr()),
                  static_cast<const float*>(addends.const_data_ptr()),
                  static_cast<const float*>(scales.const_data_ptr()),
                  types ? static_cast<const uint8_t*>(types->const_data_ptr()) : nullptr,
                  bias ? bits(*bias) : nullptr,
                  static_cast<uint16_t*>(out.mutable_data_ptr()),
                  m,
                  k,
                  n,
                  false,
                  {1, octets, groups, group_size / kOctet}};
  if (m && n) {
    (dtype == ScalarType::Half ? multiply_panels<InFloat<Addends>, Half>
                               : multiply_panels<InFloat<Addends>, BFloat16>)(call);
    for (int64_t r = 0; r < m; ++r) {
      spoil(call.x + r * k, k, dtype == ScalarType::Half ? 0x7C00 : 0x7F80, call.out + r * n, n);
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("axcore_fast", TORCH_BOX(&axcore_fast));
}

}  // namespace lutserve
