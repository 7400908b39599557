// lutserve::lut_gemm: activations times weights that are 4-bit indices into a table of 16 numbers.
// Schema, meaning and the packed layout: kernels/lut_gemm.py.

#include "lut_gemm_avx512.h"
#include "lut_indices.h"

namespace lutserve {
namespace {

template <class T>
void dispatch(const Call& call) {
#if defined(__AVX512VNNI__)
  if (call.quantized) return multiply_panels<Tiled<Int8Fours>, T>(call);
#endif
#if defined(__AVX512BF16__)
  if (std::is_same_v<T, BFloat16>) return multiply_panels<Tiled<Bf16Pairs>, T>(call);
#endif
  if (call.quantized || std::is_same_v<T, BFloat16>) return multiply_panels<InFloat<Indices<2>>, T>(call);
  multiply_panels<InFloat<Indices<3>>, T>(call);
}

Tensor lut_gemm(const Tensor& x, const Tensor& packed, const Tensor& codebooks, const Tensor& scales,
                const std::optional<Tensor>& types, int64_t group_size, int64_t n, const std::optional<Tensor>& bias,
                bool quantize_activations) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "lut_gemm: x must be float16 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, "lut_gemm: x must be [C, M, K] with K > 0");
  const int64_t classes = x.size(0), m = x.size(1), k = x.size(2);
  STD_TORCH_CHECK(group_size > 0 && (group_size % kOctet == 0 || group_size >= k),
                  "lut_gemm: group_size must be a multiple of 8 or cover all of K");
  const int64_t panels = (n + kColumns - 1) / kColumns, octets = (k + kOctet - 1) / kOctet;
  const int64_t groups = (k + group_size - 1) / group_size;
  const auto is = [](const Tensor& t, ScalarType type, int64_t count) {
    return t.scalar_type() == type && t.numel() == count && t.is_contiguous();
  };
  STD_TORCH_CHECK(is(packed, ScalarType::Byte, panels * octets * kColumns * kOctet / 2) &&
                      is(scales, ScalarType::Float, panels * groups * kColumns) &&
                      codebooks.dim() == 3 && codebooks.size(1) == classes && codebooks.size(2) == 16 &&
                      is(codebooks, ScalarType::Float, codebooks.numel()) &&
                      (types ? is(*types, ScalarType::Byte, panels * groups) : codebooks.size(0) == 1) &&
                      (!bias || is(*bias, dtype, n)) && (!quantize_activations || classes == 1),
                  "lut_gemm: tensors do not fit each other; see lutserve/kernels/lut_gemm.py");
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x), out = empty({m, n}, dtype);
  const auto bits = [](const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); };
  // The table takes part in the activations' precision, as a dequantised weight would.
  std::vector<float> books(size_t(codebooks.numel()));
  const auto* values = static_cast<const float*>(codebooks.const_data_ptr());
  for (size_t i = 0; i < books.size(); ++i) {
    books[i] = dtype == ScalarType::Half ? float(Half(values[i])) : float(BFloat16(values[i]));
  }
  const Call call{bits(rows),
                  static_cast<const uint8_t*>(packed.const_data_ptr()),
                  books.data(),
                  static_cast<const float*>(scales.const_data_ptr()),
                  types ? static_cast<const uint8_t*>(types->const_data_ptr()) : nullptr,
                  bias ? bits(*bias) : nullptr,
                  static_cast<uint16_t*>(out.mutable_data_ptr()),
                  m,
                  k,
                  n,
                  quantize_activations,
                  {classes, octets, groups, (std::min(group_size, k) + kOctet - 1) / kOctet}};
  if (m && n) (dtype == ScalarType::Half ? dispatch<Half> : dispatch<BFloat16>)(call);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("lut_gemm", TORCH_BOX(&lut_gemm));
}

}  // namespace lutserve
