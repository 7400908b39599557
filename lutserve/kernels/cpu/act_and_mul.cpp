// lutserve::act_and_mul: table[bits(gate)] * up, rounded once; lutserve::lut_unary: table[bits(x)].
// Schema and meaning: kernels/activation.py.

#include "gate.h"
#include "tensor.h"

namespace lutserve {
namespace {

constexpr int64_t kSpan = 1024;    // columns that one step of the parallel loop does
constexpr int64_t kGrain = 16384;  // elements a thread must have to be worth waking: about 7 us of work

void check(const char* op, const Tensor& x, const Tensor& table) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
                  ": x must be float16 or bfloat16");
  STD_TORCH_CHECK(table.scalar_type() == dtype && table.dim() == 1 && table.numel() == 65536 &&
                      table.is_contiguous(),
                  op, ": table must be a contiguous [65536] tensor of x's dtype");
}

Tensor lut_unary(const Tensor& x, const Tensor& table) {
  check("lut_unary", x, table);
  const Tensor in = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Tensor out = empty({x.sizes().begin(), x.sizes().end()}, x.scalar_type());
  const auto* from = static_cast<const uint16_t*>(in.const_data_ptr());
  const auto* entries = static_cast<const uint16_t*>(table.const_data_ptr());
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(to + i, lookup(entries, from + i));
    for (; i < end; ++i) to[i] = entries[from[i]];
  });
  return out;
}

Tensor act_and_mul(const Tensor& x, const Tensor& table) {
  check("act_and_mul", x, table);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0,
                  "act_and_mul: the last dimension of x must be even: gate and up");
  const ScalarType dtype = x.scalar_type();
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  const int64_t d = size.back() /= 2;
  const Tensor out = empty(size, dtype);
  const Rows rows = rows_of(x);
  const auto* in = static_cast<const uint16_t*>(rows.tensor.const_data_ptr());
  const auto* entries = static_cast<const uint16_t*>(table.const_data_ptr());
  auto* result = static_cast<uint16_t*>(out.mutable_data_ptr());
  const auto run = dtype == ScalarType::Half ? gate_row<Half> : gate_row<BFloat16>;
  const int64_t spans = (d + kSpan - 1) / kSpan;
  const int64_t grain = kGrain / std::clamp<int64_t>(d, 1, kSpan);
  torch::stable::parallel_for(0, rows.count * spans, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / spans, column = i % spans * kSpan;
      const uint16_t* gate = in + row * rows.stride + column;
      run(gate, gate + d, entries, result + row * d + column, std::min(kSpan, d - column));
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("act_and_mul", TORCH_BOX(&act_and_mul));
  library.impl("lut_unary", TORCH_BOX(&lut_unary));
}

}  // namespace lutserve
