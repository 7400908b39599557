// lutserve::lut_gemm: activations times weights that are 4-bit indices into a table of 16 numbers.
// Schema, meaning and the packed layout: kernels/lut_gemm.py.
//
// A dword of a packed octet holds the indices of one output column and eight input columns, in the order
// that lets every path look up straight from a shifted register, without masks: a word permutation reads
// only the low bits of each 16-bit word (the table lies there twice), a dword permutation those of each dword.
// A tile is a few rows by 32 columns; its sums stay in registers for a whole group and are then scaled.

#include <cmath>
#include <utility>

#include "simd.h"
#include "tensor.h"

namespace lutserve {
namespace {

constexpr int kVectors = 2;
constexpr int64_t kColumns = kVectors * kLanes, kOctet = 8, kOctetBytes = kColumns * kOctet / 2;
constexpr int64_t kGrain = 1 << 16;  // bytes of weight a thread must have to be worth waking
#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = 2;
#endif

using Octet = uint32_t __attribute__((vector_size(64)));  // 16 columns by 8 indices

// Products in fp32: for every instruction set, for fp16, and for int8 activations without VNNI.
struct InFloat {
  static constexpr int kSteps = 8, kWidth = 1;
  static constexpr int kOrder[kSteps][kWidth] = {{0}, {2}, {4}, {6}, {1}, {3}, {5}, {7}};
  using Word = float;
  using Sum = F32;
  using Weight = F32;

  struct Lookup {
#if defined(__AVX512F__)
    __m512 values;
    explicit Lookup(const float* book) : values(_mm512_loadu_ps(book)) {}
    Weight operator()(const Octet& index) const {
      return Weight(_mm512_permutexvar_ps(__m512i(index), values));
    }
#elif defined(__AVX2__)
    __m256 low, high;
    explicit Lookup(const float* book) : low(_mm256_loadu_ps(book)), high(_mm256_loadu_ps(book + 8)) {}
    __m256 half(__m256i index) const {
      // The sign of a float chooses between the halves of the table: bit 3 of the index moves there.
      const __m256 pick = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), pick);
    }
    Weight operator()(const Octet& index) const {
      const auto halves = cast<std::array<__m256i, 2>>(index);
      return cast<Weight>(std::array<__m256, 2>{half(halves[0]), half(halves[1])});
    }
#else
    const float* values;
    explicit Lookup(const float* book) : values(book) {}
    Weight operator()(const Octet& index) const {
      Weight w;
      for (int i = 0; i < kLanes; ++i) w[i] = values[index[i] & 15];
      return w;
    }
#endif
  };

  static Weight weight(const Octet& raw, int step, const Lookup& look) { return look(raw >> (4 * step)); }
  static Sum multiply(const Sum& sum, const Weight& w, Word x) { return fma(w, spread(x), sum); }
  static F32 value(const Sum& sum, int32_t) { return sum; }
};

#if defined(__AVX512BF16__)
// Pairs of bf16 products.
struct InBf16 {
  static constexpr int kSteps = 4, kWidth = 2;
  static constexpr int kOrder[kSteps][kWidth] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}};
  using Word = int32_t;
  using Sum = F32;
  using Weight = __m512i;

  struct Lookup {
    __m512i values;
    explicit Lookup(const float* book) {
      const __m256i table = narrow<BFloat16>(Float16{_mm512_loadu_ps(book)});
      values = _mm512_broadcast_i64x4(table);
    }
  };

  static Weight weight(const Octet& raw, int step, const Lookup& look) {
    return _mm512_permutexvar_epi16(__m512i(raw >> (4 * step)), look.values);
  }
  static Sum multiply(const Sum& sum, const Weight& w, Word x) {
    return Sum(_mm512_dpbf16_ps(__m512(sum), (__m512bh)w, (__m512bh)_mm512_set1_epi32(x)));
  }
  static F32 value(const Sum& sum, int32_t) { return sum; }
};
#endif

#if defined(__AVX512VNNI__)
// Fours of int8 products. VNNI wants one side unsigned: the table holds value + 128, which `value` takes off.
struct InInt8 {
  static constexpr int kSteps = 2, kWidth = 4;
  static constexpr int kOrder[kSteps][kWidth] = {{0, 4, 1, 5}, {2, 6, 3, 7}};
  using Word = int32_t;
  using Sum = __m512i;
  using Weight = __m512i;

  struct Lookup {
    __m512i values;
    explicit Lookup(const float* book) {
      const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_loadu_ps(book)), _mm512_set1_epi32(128));
      values = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(whole));
    }
  };

  static Weight weight(const Octet& raw, int step, const Lookup& look) {
    const __m512i index = _mm512_and_si512(__m512i(raw >> (4 * step)), _mm512_set1_epi8(15));
    return _mm512_shuffle_epi8(look.values, index);
  }
  static Sum multiply(const Sum& sum, const Weight& w, Word x) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x));
  }
  static F32 value(const Sum& sum, int32_t codes) {
    return F32(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(128 * codes))));
  }
};
#endif

// Of one tile's rows, regrouped so that the inner loop reads a single stream.
template <class Path>
struct Activations {
  const typename Path::Word* words;  // [classes][octets][steps][rows]
  const float* scales;               // [groups][rows], or null: not quantised
  const int32_t* sums;               // [groups][rows], of the codes
};

struct Panel {
  const uint8_t* weight;  // [octets][2][16][4]
  const float* scales;    // [groups][32]
  const uint8_t* types;   // [groups], or null: all 0
};

struct Shape {
  int64_t classes, octets, groups, group_octets;
};

// The folds unroll before the compiler decides what lives in registers; a loop would leave the sums in memory.
template <class Path, size_t... I>
__attribute__((always_inline)) inline void multiply(typename Path::Sum* sum, const typename Path::Weight& left,
                                                    const typename Path::Weight& right,
                                                    const typename Path::Word* x, std::index_sequence<I...>) {
  ((sum[I] = Path::multiply(sum[I], I % kVectors ? right : left, x[I / kVectors])), ...);
}

template <class Path, int R, int C, size_t... S>
__attribute__((always_inline)) inline void multiply_octet(typename Path::Sum* sum, const uint8_t* weight,
                                                          const typename Path::Lookup& look,
                                                          const typename Path::Word* x, std::index_sequence<S...>) {
  const Octet left = cast<Octet>(*reinterpret_cast<const std::array<uint8_t, 64>*>(weight));
  const Octet right = cast<Octet>(*reinterpret_cast<const std::array<uint8_t, 64>*>(weight + 64));
  constexpr auto kAll = std::make_index_sequence<R * kVectors>{};
  (multiply<Path>(sum + (S % C) * R * kVectors, Path::weight(left, S, look), Path::weight(right, S, look),
                  x + S * R, kAll),
   ...);
}

template <class Path, int R, int C, size_t... I>
__attribute__((always_inline)) inline void add_group(float* total, const typename Path::Sum* sum,
                                                     const Activations<Path>& a, int64_t group, const F32& left,
                                                     const F32& right, std::index_sequence<I...>) {
  const auto add = [&](int i) __attribute__((always_inline)) {
    const int64_t at = group * R + i / kVectors;
    F32 value = Path::value(sum[i], a.sums ? a.sums[at] : 0);
    if (C == 2) value += Path::value(sum[i + R * kVectors], 0);
    if (a.scales) value *= a.scales[at];
    store_f32(total + i * kLanes, fma(value, i % kVectors ? right : left, load_f32(total + i * kLanes)));
  };
  (add(I), ...);
}

// total[R, 32] = x @ W^T of one panel.
template <class Path, int R>
void tile(const Panel& p, const Activations<Path>& a, const Shape& shape, const float* books, float* total) {
  constexpr auto kAll = std::make_index_sequence<R * kVectors>{};
  // Few rows have few sums, and each must wait for the one before: two sets of them keep the multiplier busy.
  constexpr int kChains = kRows > 2 && R <= 2 ? 2 : 1;
  std::fill(total, total + R * kColumns, 0.0f);
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int64_t begin = g * shape.group_octets, end = std::min(shape.octets, begin + shape.group_octets);
    const float* book = books + (p.types ? p.types[g] : 0) * shape.classes * 16;
    typename Path::Sum sum[R * kVectors * kChains] = {};
    for (int64_t c = 0; c < shape.classes; ++c) {
      const typename Path::Lookup look(book + c * 16);
      for (int64_t o = begin; o < end; ++o) {
        multiply_octet<Path, R, kChains>(sum, p.weight + o * kOctetBytes, look,
                                         a.words + (c * shape.octets + o) * Path::kSteps * R,
                                         std::make_index_sequence<Path::kSteps>{});
      }
    }
    add_group<Path, R, kChains>(total, sum, a, g, load_f32(p.scales + g * kColumns),
                                load_f32(p.scales + g * kColumns + kLanes), kAll);
  }
}

template <class Path, int R = kRows>
void tile_of(int64_t rows, const Panel& p, const Activations<Path>& a, const Shape& shape, const float* books,
             float* total) {
  if (rows == R) return tile<Path, R>(p, a, shape, books, total);
  if constexpr (R > 1) tile_of<Path, R - 1>(rows, p, a, shape, books, total);
}

// One row's sixteen-bit values as the words of a path: bf16 pairs as they are, or in fp32.
template <class Path, class T>
void regroup(const uint16_t* x, int64_t k, int64_t octets, int64_t rows, typename Path::Word* to) {
  for (int64_t o = 0; o < octets; ++o) {
    uint16_t part[kOctet] = {};
    std::memcpy(part, x + o * kOctet, size_t(std::min(kOctet, k - o * kOctet)) * sizeof(uint16_t));
    for (int s = 0; s < Path::kSteps; ++s) {
      typename Path::Word* word = to + (o * Path::kSteps + s) * rows;
      if constexpr (Path::kWidth == 1) {
        *word = float(T(part[Path::kOrder[s][0]], T::from_bits()));
      } else {
        std::memcpy(word, part + Path::kOrder[s][0], sizeof(*word));
      }
    }
  }
}

// One row quantised to int8 by groups: scale max|x| / 127, ties to even, as quantize_rows does by rows.
template <class Path, class T>
void quantize(const uint16_t* x, int64_t k, const Shape& shape, int64_t rows, typename Path::Word* to, float* scales,
              int32_t* sums) {
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int64_t begin = g * shape.group_octets, end = std::min(shape.octets, begin + shape.group_octets);
    const auto at = [&](int64_t i) { return i < k ? float(T(x[i], T::from_bits())) : 0.0f; };
    float top = 0;
    for (int64_t i = begin * kOctet; i < end * kOctet; ++i) {
      const float size = std::fabs(at(i));
      top = size > top || size != size ? size : top;  // a NaN stays
    }
    // As in mixq.cpp: a NaN fails the comparisons and reaches the result through the scale.
    const float inverse = top > 1e-30f ? 127.0f / top : 0.0f;
    int32_t total = 0;
    for (int64_t o = begin; o < end; ++o) {
      for (int s = 0; s < Path::kSteps; ++s) {
        int8_t codes[Path::kWidth];
        for (int j = 0; j < Path::kWidth; ++j) {
          const float rounded = at(o * kOctet + Path::kOrder[s][j]) * inverse + 12582912.0f;
          codes[j] = int8_t(cast<int32_t>(rounded) - 0x4B400000);
          total += codes[j];
        }
        typename Path::Word* word = to + (o * Path::kSteps + s) * rows;
        if constexpr (Path::kWidth == 1) {
          *word = codes[0];
        } else {
          std::memcpy(word, codes, sizeof(*word));
        }
      }
    }
    scales[g * rows] = top <= 1e-30f ? 0.0f : top / 127.0f;
    sums[g * rows] = total;
  }
}

struct Call {
  const uint16_t* x;  // [classes, m, k]
  const uint8_t* packed;
  const float *books, *scales;
  const uint8_t* types;
  const uint16_t* bias;
  uint16_t* out;
  int64_t m, k, n;
  bool quantized;
  Shape shape;
};

template <class Path, class T>
void run(const Call& call) {
  using Word = typename Path::Word;
  const Shape& shape = call.shape;
  const int64_t tiles = (call.m + kRows - 1) / kRows, panels = (call.n + kColumns - 1) / kColumns;
  const int64_t row_words = shape.classes * shape.octets * Path::kSteps;
  const auto start = [&](int64_t t) { return t * call.m / tiles; };
  const int64_t coded = call.quantized ? call.m * shape.groups : 0;
  const Tensor word_store = empty({call.m * row_words}, ScalarType::Int);
  const Tensor code_scales = empty({coded}, ScalarType::Float), code_sums = empty({coded}, ScalarType::Int);
  auto* words = reinterpret_cast<Word*>(word_store.mutable_data_ptr());
  auto* scales = static_cast<float*>(code_scales.mutable_data_ptr());
  auto* sums = static_cast<int32_t*>(code_sums.mutable_data_ptr());
  const auto fill = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = start(t), rows = start(t + 1) - row;
      for (int64_t c = 0; c < shape.classes; ++c) {
        for (int64_t r = 0; r < rows; ++r) {
          const uint16_t* x = call.x + (c * call.m + row + r) * call.k;
          Word* to = words + row * row_words + c * shape.octets * Path::kSteps * rows + r;
          if constexpr (Path::kWidth != 2) {
            if (call.quantized) {
              const int64_t at = row * shape.groups + r;
              quantize<Path, T>(x, call.k, shape, rows, to, scales + at, sums + at);
              continue;
            }
          }
          if constexpr (Path::kWidth != 4) regroup<Path, T>(x, call.k, shape.octets, rows, to);
        }
      }
    }
  };
  torch::stable::parallel_for(0, tiles, std::max<int64_t>(1, kGrain / (kRows * call.k)), fill);
  const int64_t panel_bytes = shape.octets * kOctetBytes;
  const auto work = [&](int64_t begin, int64_t end) {
    alignas(64) float total[kRows * kColumns];
    for (int64_t i = begin; i < end; ++i) {
      const Panel panel{call.packed + i * panel_bytes, call.scales + i * shape.groups * kColumns,
                        call.types ? call.types + i * shape.groups : nullptr};
      const int64_t column = i * kColumns, width = std::min(kColumns, call.n - column);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = start(t), rows = start(t + 1) - row;
        const Activations<Path> a{words + row * row_words, call.quantized ? scales + row * shape.groups : nullptr,
                                  call.quantized ? sums + row * shape.groups : nullptr};
        tile_of<Path>(rows, panel, a, shape, call.books, total);
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
    }
  };
  torch::stable::parallel_for(0, panels, std::max<int64_t>(1, kGrain / panel_bytes), work);
}

template <class T>
void dispatch(const Call& call) {
#if defined(__AVX512VNNI__)
  if (call.quantized) return run<InInt8, T>(call);
#endif
#if defined(__AVX512BF16__)
  if (std::is_same_v<T, BFloat16>) return run<InBf16, T>(call);
#endif
  run<InFloat, T>(call);
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
  STD_TORCH_CHECK(is(packed, ScalarType::Byte, panels * octets * kOctetBytes) &&
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
