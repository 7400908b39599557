// lutserve::axcore_strict, lutserve::fpma_linear: approximate products, summed in fp16 in the published order.
// Schemas and meaning: kernels/axcore.py; the packed layout of the codes: kernels/lut_gemm.py.

#include <vector>

#include "axcore_sums.h"

namespace lutserve {
namespace {

constexpr int64_t kWork = 1 << 14;    // products a thread must have to be worth waking
constexpr int64_t kRows = 32;         // rows that one unpacking of a weight serves
constexpr int32_t kNan = 0x7FFF;
// As many sums as registers hold, and enough for additions not to wait for each other.
constexpr int kStrands = kVec == 16 ? 8 : kVec == 8 ? 3 : 1;

// a * b by one integer addition, for the low 15 bits of fp16 patterns; `shift` is bias - compensation.
inline Words fpma(const Words& a, const Words& b, uint16_t shift) {
  const Words left = a & 0x7FFF, right = b & 0x7FFF, sum = left + right;
  const Words magnitude = (sum > shift ? sum - shift : Words{}) & 0x7FFF;
  return (left == 0) | (right == 0) ? Words{} : magnitude | ((a ^ b) & 0x8000);
}

struct Layer {
  const uint16_t *x, *bias;  // x: [m][stride]
  uint16_t* out;
  int64_t m, k, n, stride;

  int64_t panels() const { return (n + kColumns - 1) / kColumns; }
};

// A finished group: its fp16 sums times their scales, in fp16, into fp32.
inline F32 scaled(const F32& sum, const uint16_t* scale, bool by_fpma) {
  const Bits16 bits = narrow<Half>(cast<Float16>(sum));
  if (!by_fpma) return round_to_half(cast<F32>(widen<Half>(bits)) * cast<F32>(widen<Half>(load(scale))));
  const Words words = cast<Words>(bits);
  const Words number = Words((words & 0x7FFF) > kInfinity) ? Words{} + uint16_t(kNan) : words;
  return cast<F32>(widen<Half>(cast<Bits16>(fpma(number, cast<Words>(load(scale)), kOne))));
}

// Rounds totals [32], adds the bias, and writes what lies inside.
void finish(const Layer& layer, int64_t row, int64_t panel, const F32* total) {
  for (int v = 0; v < 2; ++v) {
    const int64_t first = panel * kColumns + v * kLanes, width = std::min(kLanes, layer.n - first);
    if (width <= 0) break;
    uint16_t bits[kLanes] = {};
    F32 y = round_to_half(total[v]);
    if (layer.bias) {
      std::memcpy(bits, layer.bias + first, size_t(width) * sizeof(uint16_t));
      y += cast<F32>(widen<Half>(load(bits)));
    }
    store(bits, narrow<Half>(cast<Float16>(y)));
    std::memcpy(layer.out + row * layer.n + first, bits, size_t(width) * sizeof(uint16_t));
  }
}

struct Strict : Layer {
  const uint8_t *codes, *types;      // [panels][octets][2][16][4]; [panels][groups], or null: all 0
  const uint16_t *scales, *products;  // [panels][groups][32], [tables][65536][16]
  int64_t group, tables;
  bool fpma_dequant;

  int64_t groups() const { return k / group; }
  const uint16_t* table(int64_t t) const { return products + (t << 20); }
};

// Some rows as strands need them.
struct Prepared {
  const Strict& layer;
  int64_t first, rows;
  std::vector<Addends> addends;       // [tables]
  std::vector<int32_t> activations;   // [tables][rows][k]
  std::vector<uint8_t> may_overflow;  // [tables][rows][groups]

  Prepared(const Strict& strict, int64_t row)
      : layer(strict), first(row), rows(std::min(kRows, strict.m - row)),
        activations(size_t(strict.tables * rows * strict.k)),
        may_overflow(size_t(strict.tables * rows * strict.groups())) {
    for (int64_t t = 0; t < layer.tables; ++t) addends.emplace_back(layer.table(t));
    const int64_t grain = std::max<int64_t>(1, kWork / (kLanes * layer.k));
    torch::stable::parallel_for(0, layer.tables * rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t g = 0; g < layer.groups(); ++g) {
          const int64_t t = i / rows;
          may_overflow[size_t(i * layer.groups() + g)] =
              prepare(addends[size_t(t)], layer.table(t), x(i % rows, g), layer.group,
                      activations.data() + i * layer.k + g * layer.group);
        }
      }
    });
  }

  const uint16_t* x(int64_t row, int64_t g) const { return layer.x + (first + row) * layer.stride + g * layer.group; }

  // The strands of one panel, and its weights [group][32].
  Strand* add(int64_t panel, int64_t g, float* weights, Strand* to) const {
    const int64_t t = layer.types ? layer.types[panel * layer.groups() + g] : 0;
    const uint8_t* codes = layer.codes + (panel * layer.k + g * layer.group) / kOctet * Codes::kOctetBytes;
    float wide[kLanes];
    std::memcpy(wide, addends[size_t(t)].wide, sizeof(wide));
    const Codes::Table table(wide);
    for (int64_t k = 0; k < layer.group; k += kOctet) {
      look_up(table, codes + k / kOctet * Codes::kOctetBytes, weights + k * kColumns);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = t * rows + r;
      *to++ = {activations.data() + i * layer.k + g * layer.group, may_overflow[size_t(i * layer.groups() + g)] != 0,
               x(r, g), layer.table(t), codes, weights};
    }
    return to;
  }
};

// All prepared rows times the panels from begin to end - 1.
void multiply(const Prepared& rows, int64_t begin, int64_t end) {
  const Strict& layer = rows.layer;
  const int64_t panels = end - begin, count = panels * rows.rows;
  static thread_local std::vector<float> weights;
  weights.resize(size_t(panels * layer.group * kColumns));
  std::vector<Strand> strands(static_cast<size_t>(count));
  std::vector<F32> total(static_cast<size_t>(2 * count));
  for (int64_t g = 0; g < layer.groups(); ++g) {
    Strand* last = strands.data();
    for (int64_t p = begin; p < end; ++p) last = rows.add(p, g, weights.data() + (p - begin) * layer.group * kColumns, last);
    for (int64_t first = 0; first < count; first += kStrands) {
      with_rows<kStrands>(std::min<int64_t>(kStrands, count - first), [&](auto s) {
        constexpr int S = decltype(s)::value;
        const Strand* some = strands.data() + first;
        alignas(64) float sums[S * kColumns];
        const bool may = std::any_of(some, some + S, [](const Strand& strand) { return strand.may_overflow; });
        constexpr auto kAll = std::make_index_sequence<S>{};
        may ? sum_up<true>(some, layer.group, sums, kAll) : sum_up<false>(some, layer.group, sums, kAll);
        for (int64_t i = 0; i < 2 * S; ++i) {
          const int64_t panel = begin + (first + i / 2) / rows.rows;
          const uint16_t* scale = layer.scales + (panel * layer.groups() + g) * kColumns + i % 2 * kLanes;
          total[size_t(2 * first + i)] += scaled(load_f32(sums + i * kLanes), scale, layer.fpma_dequant);
        }
      });
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    finish(layer, rows.first + i % rows.rows, begin + i / rows.rows, total.data() + 2 * i);
  }
}

void run(const Strict& layer) {
  for (int64_t first = 0; first < layer.m; first += kRows) {
    const Prepared rows(layer, first);
    // With few rows, strands of several panels.
    const int64_t wide = rows.rows < kStrands ? kStrands : 1, blocks = (layer.panels() + wide - 1) / wide;
    const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, wide * kColumns * layer.k * rows.rows));
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) multiply(rows, b * wide, std::min((b + 1) * wide, layer.panels()));
    });
  }
}

// The sums of one row and one panel of a weight of fp16 patterns, [k][32], without scales.
void uniform_row(const uint16_t* weight, const Layer& layer, uint16_t shift, int64_t tile, const uint16_t* x,
                 F32* total) {
  for (int64_t begin = 0; begin < layer.k; begin += tile) {
    F32 sum[2] = {};
    for (int64_t k = begin; k < std::min(layer.k, begin + tile); ++k) {
      const Words a = Words{} + x[k];
      for (int v = 0; v < 2; ++v) {
        const auto b = cast<Words>(load(weight + k * kColumns + v * kLanes));
        sum[v] = round_to_half(sum[v] + cast<F32>(widen<Half>(cast<Bits16>(fpma(a, b, shift)))));
      }
    }
    for (int v = 0; v < 2; ++v) total[v] += sum[v];
  }
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
  STD_TORCH_CHECK(is(packed, ScalarType::Byte, panels * k / kOctet * Codes::kOctetBytes) &&
                      is(scales, ScalarType::Half, panels * groups * kColumns) &&
                      is(products, ScalarType::Half, tables << 20) &&
                      (types ? is(*types, ScalarType::Byte, panels * groups) : tables == 1) &&
                      (!bias || is(*bias, ScalarType::Half, n)),
                  "axcore_strict: tensors do not fit each other; see lutserve/kernels/axcore.py");
  const Rows rows = rows_of(x);
  const Tensor out = empty({m, n}, ScalarType::Half);
  run({{halves(rows.tensor), bias ? halves(*bias) : nullptr, static_cast<uint16_t*>(out.mutable_data_ptr()), m, k, n,
        rows.stride},
       static_cast<const uint8_t*>(packed.const_data_ptr()),
       types ? static_cast<const uint8_t*>(types->const_data_ptr()) : nullptr, halves(scales), halves(products),
       group_size, tables, fpma_dequant});
  return out;
}

Tensor fpma_linear(const Tensor& x, const Tensor& weight, int64_t compensation, int64_t tile, int64_t n,
                   const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half && x.dim() == 2, "fpma_linear: x must be float16 [M, K]");
  const int64_t m = x.size(0), k = x.size(1), panels = (n + kColumns - 1) / kColumns;
  STD_TORCH_CHECK(is(weight, ScalarType::Half, panels * k * kColumns) && compensation >= 0 && compensation <= kOne && tile > 0 &&
                      (!bias || is(*bias, ScalarType::Half, n)),
                  "fpma_linear: tensors do not fit each other; see lutserve/kernels/axcore.py");
  const Rows rows = rows_of(x);
  const Tensor out = empty({m, n}, ScalarType::Half);
  const Layer layer{halves(rows.tensor), bias ? halves(*bias) : nullptr,
                  static_cast<uint16_t*>(out.mutable_data_ptr()), m, k, n, rows.stride};
  const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, kColumns * k * m));
  torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t row = 0; row < m; ++row) {
        F32 total[2] = {};
        uniform_row(halves(weight) + p * k * kColumns, layer, uint16_t(kOne - compensation), tile,
                    layer.x + row * layer.stride, total);
        finish(layer, row, p, total);
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("axcore_strict", TORCH_BOX(&axcore_strict));
  library.impl("fpma_linear", TORCH_BOX(&fpma_linear));
}

}  // namespace lutserve
