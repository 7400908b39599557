// lutserve::linear16: a linear layer of 16-bit weights by exact fp32 products, for processors whose own 16-bit
// products are slow or absent. Schema, meaning and the packed layout: kernels/linear16.py.

#include "gemm_fp32.h"

namespace lutserve {
namespace {

// Panels of 16-bit values as a source of fp32 weights.
template <class T>
struct Values : ExactProducts {
  static constexpr int64_t kOctetBytes = kColumns * kOctet * sizeof(uint16_t);
  struct Table {
    explicit Table(const float*) {}
  };

  static Vec wide(const uint16_t* p) {
#if defined(__AVX512F__)
    return widen<T>(load(p)).v;
#elif defined(__AVX2__)
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (std::is_same_v<T, Half>) return _mm256_cvtph_ps(bits);
    return widen_bf16(bits);
#else
    Vec w;
    for (int i = 0; i < kVec; ++i) w[i] = float(T(p[i], T::from_bits()));
    return w;
#endif
  }

  template <class Use>
  __attribute__((always_inline)) static void each(const Table&, const uint8_t* octet, int vector, Use use) {
    const auto* values = reinterpret_cast<const uint16_t*>(octet) + vector * kVec;
    for (int row = 0; row < kOctet; ++row) use(row, wide(values + row * kColumns));
  }
};

Tensor linear16(const Tensor& x, const Tensor& packed, int64_t n, const std::optional<Tensor>& bias) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "linear16: x must be float16 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "linear16: x must be [M, K] with K > 0");
  const int64_t m = x.size(0), k = x.size(1);
  const int64_t panels = (n + kColumns - 1) / kColumns, octets = (k + kOctet - 1) / kOctet;
  const auto is = [&](const Tensor& t, int64_t count) {
    return t.scalar_type() == dtype && t.numel() == count && t.is_contiguous();
  };
  STD_TORCH_CHECK(is(packed, panels * octets * kOctet * kColumns) && (!bias || is(*bias, n)),
                  "linear16: tensors do not fit each other; see lutserve/kernels/linear16.py");
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x), out = empty({m, n}, dtype);
  const auto bits = [](const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); };
  const Call call{bits(rows),
                  static_cast<const uint8_t*>(packed.const_data_ptr()),
                  nullptr,
                  nullptr,
                  nullptr,
                  bias ? bits(*bias) : nullptr,
                  static_cast<uint16_t*>(out.mutable_data_ptr()),
                  m,
                  k,
                  n,
                  false,
                  {1, octets, 1, octets}};
  if (m && n) {
    (dtype == ScalarType::Half ? multiply_panels<InFloat<Values<Half>>, Half>
                               : multiply_panels<InFloat<Values<BFloat16>>, BFloat16>)(call);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("linear16", TORCH_BOX(&linear16));
}

}  // namespace lutserve
