// lutserve::kv4_attention: attention over a cache of 4-bit indices and scales. Schema and rule:
// kernels/kv4_attention.py.

#include "attention_arguments.h"
#include "attention_work.h"
#include "kv4_steps.h"

namespace lutserve {
namespace {

constexpr char kOp[] = "kv4_attention";

const uint16_t* bits(const Tensor& x) {
  return static_cast<const uint16_t*>(x.const_data_ptr());
}

void kv4_attention(const Tensor& query, const std::optional<Tensor>& value, const Tensor& cache,
                   const Tensor& block_table, const Tensor& query_start, const Tensor& lengths, const Tensor& out,
                   const Tensor& key_tables, const std::optional<Tensor>& offsets, const Tensor& value_table,
                   double scale, const std::optional<Tensor>& exp_table, const std::optional<Tensor>& recip_table,
                   bool fp16_sum) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Half || dtype == ScalarType::BFloat16) && cache.scalar_type() == ScalarType::Byte,
                  kOp, ": values must be float16 or bfloat16, the cache uint8");
  STD_TORCH_CHECK(query.dim() == 3 && out.dim() == 3 && cache.dim() == 4 && out.scalar_type() == dtype &&
                      out.size(0) == query.size(0) && out.size(1) == query.size(1) && out.size(2) == query.size(2),
                  kOp, ": query and out must be alike, [tokens, heads, head size], and the cache [blocks, kv heads, "
                  "block size, bytes]");
  const int64_t heads = query.size(1), size = query.size(2), kv_heads = cache.size(1);
  STD_TORCH_CHECK(size % 16 == 0 && size > 0 && size <= kMostSize, kOp,
                  ": the head size must be a multiple of 16 up to 256");
  const Layout layout{cache.size(2), size, value.has_value()};
  STD_TORCH_CHECK(layout.block_size > 0 && layout.block_size % (layout.by_unit ? kUnit : kGroup) == 0 &&
                      cache.size(3) == layout.bytes_per_token(),
                  kOp, ": block size must be a multiple of ", layout.by_unit ? kUnit : kGroup,
                  ", and the cache have ", layout.bytes_per_token(), " bytes a token");
  STD_TORCH_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, kOp,
                  ": query and out must be alike, and heads a multiple of the cache's");
  STD_TORCH_CHECK(!value || (value->scalar_type() == dtype && value->dim() == 3 && value->size(0) == query.size(0) &&
                             value->size(1) == kv_heads && value->size(2) == size && value->stride(2) == 1),
                  kOp, ": values by unit must be [tokens, kv heads, head size]");
  STD_TORCH_CHECK(query.stride(2) == 1 && out.stride(2) == 1 && cache.stride(3) == 1 &&
                      cache.stride(2) == cache.size(3),
                  kOp, ": the last dimension of query and out and each block of the cache must be contiguous");
  const int64_t classes = offsets ? offsets->numel() : 1;
  STD_TORCH_CHECK((classes == 1 || classes == 2 || classes == kMostClasses) && key_tables.scalar_type() == dtype &&
                      key_tables.dim() == 2 && key_tables.size(0) == classes && key_tables.size(1) == 16 &&
                      key_tables.is_contiguous() && value_table.scalar_type() == dtype && value_table.dim() == 1 &&
                      value_table.size(0) == 16 && value_table.is_contiguous(),
                  kOp, ": tables must be [1, 2 or 4, 16] and [16], offsets int32, one for each table");
  const auto table = [&](int64_t c) { return Table(bits(key_tables) + std::min(c, classes - 1) * 16); };
  const int64_t requests = lengths.numel();
  const Kv4Problem problem{
      {bits(query), static_cast<uint16_t*>(out.mutable_data_ptr()), nullptr, indices(kOp, block_table, 2),
       indices(kOp, query_start, 1), indices(kOp, lengths, 1), query.stride(0), query.stride(1), out.stride(0),
       out.stride(1), 0, 0, block_table.stride(0), layout.block_size, size, heads / kv_heads, 0, float(scale),
       fp16_table(kOp, exp_table), {fp16_table(kOp, recip_table), fp16_sum}},
      static_cast<const uint8_t*>(cache.const_data_ptr()), cache.stride(0), cache.stride(1), layout,
      value ? bits(*value) : nullptr, value ? value->stride(0) : 0, value ? value->stride(1) : 0,
      {table(0), table(1), table(2), table(3)}, Table(bits(value_table)), classes,
      offsets ? indices(kOp, *offsets, 1) : nullptr};
  check_requests(kOp, problem, block_table, query_start, requests, query.size(0), cache.size(0));
  const auto run =
      dtype == ScalarType::Half ? attend<Kv4Attention<HalfProduct>> : attend<Kv4Attention<BFloat16Product>>;
  run(problem, requests, kv_heads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("kv4_attention", TORCH_BOX(&kv4_attention));
}

}  // namespace lutserve
