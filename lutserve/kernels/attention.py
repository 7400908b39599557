"""`lutserve::lut_attention` and `lutserve::cache_write`: attention over a paged KV cache in our own layout.

The cache is what vLLM allocates, [blocks, kv heads, block size, 2 * head size] of the model's dtype; what
lies where inside one block of one head is ours. The first half holds keys, the second values, in groups of
16 keys. A group of keys is the matrix [head size, 16], a group of values the matrix [16, head size], stored
row after row in fp16, and in bf16 by pairs of rows with the two values of a column side by side, as dot
products of bf16 take them.

The rule served, for one query row q and the keys k_j and values v_j that it sees:

    s_j = fl32(fl32(q . k_j) * scale)                        accumulated in fp32, in any order
    x_j = max(fl32(s_j - max_i s_i), -65504)
    e_j = table[bits(rn16(x_j))], or exp(x_j) in fp32        the entry of minus infinity is never read
    S   = fl32(sum e_j), or that rounded to fp16 and saturated at 65504
    w_j = rnbf(e_j) for bf16 models, e_j for fp16 ones
    y   = rnD(fl32(fl32(sum w_j v_j) / S))                   D: the model's dtype

With a table of reciprocals the last line is rnD(fl32(sum) * table[bits(m)] * 2^-t), where S = m * 2^t with
an fp16 mantissa m in [1, 2) rounded to nearest; sums that are no positive normal number are divided by. A
NaN among the scores makes the row NaN, whatever the table says. Keys that are not seen contribute exactly
nothing, for every table and whatever their place in the cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lutserve.kernels.library import define

GROUP = 16
"""Keys that lie together; block sizes are multiples of it."""


def places(dtype: torch.dtype, block_size: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the elements of keys and of values lie within one block of one head.

    Returns two int64 tensors [block_size, head_size], counted in elements from the start of block and head.
    """
    group, lane = torch.arange(block_size)[:, None] // GROUP, torch.arange(block_size)[:, None] % GROUP
    d = torch.arange(head_size)[None]

    def packed(row: torch.Tensor, column: torch.Tensor, width: int) -> torch.Tensor:
        if dtype == torch.float16:
            return row * width + column
        return (row // 2 * width + column) * 2 + row % 2

    first = group * GROUP * head_size
    return first + packed(d, lane, GROUP), block_size * head_size + first + packed(lane, d, head_size)


def _check_cache(name: str, cache: torch.Tensor, x: torch.Tensor, dtypes: bool, shapes: bool) -> None:
    torch._check(
        cache.dtype in (torch.float16, torch.bfloat16) and dtypes,
        lambda: f"{name}: all tensors of values must be float16 or all bfloat16, of the cache's dtype",
    )
    torch._check(
        cache.dim() == 4 and x.dim() == 3 and cache.shape[3] == 2 * x.shape[2] and shapes,
        lambda: (
            f"{name}: the cache must be [blocks, kv heads, block size, 2 * head size] and the others "
            "[tokens, heads, head size]"
        ),
    )
    torch._check(
        x.shape[2] % 16 == 0 and 0 < x.shape[2] <= 256 and cache.shape[2] % GROUP == 0,
        lambda: f"{name}: head size must be a multiple of 16 up to 256, block size a multiple of 16",
    )


def _write_fake(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    same = key.dtype == value.dtype == cache.dtype
    fits = key.shape[1:] == value.shape[1:] and cache.shape[1] == key.shape[1]
    _check_cache("cache_write", cache, key, same, fits and min(len(key), len(value)) >= len(slots))
    torch._check(
        slots.dtype == torch.int64 and slots.dim() == 1, lambda: "cache_write: slots must be int64 [tokens]"
    )


def _write_reference(
    key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    _write_fake(key, value, cache, slots)
    blocks, heads, block_size, width = cache.shape
    torch._check(
        bool((slots < blocks * block_size).all()), lambda: "cache_write: a slot is outside the cache"
    )
    token = (slots >= 0).nonzero()[:, 0]
    block, offset = slots[token] // block_size, slots[token] % block_size
    head = torch.arange(heads)[None, :, None]
    flat = cache.view(blocks, heads, block_size * width)
    for x, place in zip((key, value), places(cache.dtype, block_size, width // 2), strict=True):
        flat[block[:, None, None], head, place[offset][:, None]] = x[token]


cache_write = define(
    "cache_write(Tensor key, Tensor value, Tensor(a!) cache, Tensor slots) -> ()",
    _write_reference,
    _write_fake,
)
"""Store keys and values in the paged cache, in the layout of this module.

key, value: [tokens, kv heads, head size]; tokens behind the last slot are padding. cache: [blocks, kv heads,
block size, 2 * head size], each block of each head contiguous. All float16 or all bfloat16. slots: int64
[at most tokens], block * block size + offset for each token, negative: not stored.
RuntimeError if the arguments are not so.
"""


def _fake(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    window: int,
    exp_table: torch.Tensor | None,
    recip_table: torch.Tensor | None,
    fp16_sum: bool,
) -> None:
    same = query.dtype == out.dtype == cache.dtype
    fits = query.shape == out.shape and query.shape[1] % cache.shape[1] == 0
    _check_cache("lut_attention", cache, query, same, fits)
    check_tables("lut_attention", exp_table, recip_table)
    check_requests("lut_attention", block_table, query_start, lengths)


def check_tables(name: str, *tables: torch.Tensor | None) -> None:
    """RuntimeError unless each is None or a table of fp16 entries; name: of the operator that has them."""
    for table in tables:
        torch._check(
            table is None
            or (table.dtype == torch.float16 and table.shape == (65536,) and table.is_contiguous()),
            lambda: f"{name}: a table must be a contiguous float16 [65536]",
        )


def check_requests(
    name: str, block_table: torch.Tensor, query_start: torch.Tensor, lengths: torch.Tensor
) -> None:
    """RuntimeError unless these tensors describe requests."""
    torch._check(
        block_table.dtype == query_start.dtype == lengths.dtype == torch.int32
        and block_table.dim() == 2
        and query_start.shape == (len(lengths) + 1,)
        and len(block_table) == len(lengths),
        lambda: (
            f"{name}: block_table [requests, blocks], query_start [requests + 1] and "
            "lengths [requests] must be int32"
        ),
    )


def look_up(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the entries (as float32) of a table [65536] for inputs of its dtype."""
    return table[x.to(table.dtype).view(torch.int16).to(torch.int32) & 0xFFFF].float()


def divide(
    weighted: torch.Tensor, total: torch.Tensor, recip_table: torch.Tensor | None, fp16_sum: bool
) -> torch.Tensor:
    """Return `weighted` / `total` as the rule above has it, both float32 and of shapes that broadcast."""
    if fp16_sum:
        total = torch.where(total.isfinite(), total.half().float().clamp(-65504, 65504), total)
    if recip_table is None:
        return weighted / total
    mantissa, exponent = torch.frexp(total)
    mantissa = (2 * mantissa).half()
    exponent = torch.where(mantissa == 2, exponent, exponent - 1)
    inverse = torch.ldexp(look_up(recip_table, torch.where(mantissa == 2, 1, mantissa)), -exponent)
    normal = total.isfinite() & (total >= torch.finfo(torch.float32).tiny)
    return torch.where(normal, weighted * inverse, weighted / total)


def _reference(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    window: int,
    exp_table: torch.Tensor | None,
    recip_table: torch.Tensor | None,
    fp16_sum: bool,
) -> None:
    _fake(
        query, cache, block_table, query_start, lengths, out, scale, window, exp_table, recip_table, fp16_sum
    )
    for rows, scores, seen, values in scored(query, cache, block_table, query_start, lengths, scale, window):
        weights, total = weigh(scores, seen, exp_table)
        weighted = _weighted(
            weights.to(query.dtype) if query.dtype == torch.bfloat16 else weights, values, seen
        )
        result = divide(weighted, total[..., None], recip_table, fp16_sum)
        out[rows] = result.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)


def scored(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield the scores of each request; arguments as of `lut_attention`.

    Yields the request's rows of `query`, scores float32 [kv heads, group, rows, keys], which keys a row sees
    [rows, keys], and the values float32 [kv heads, keys, head size].
    """
    kv_heads, block_size, width = cache.shape[1:]
    at = places(cache.dtype, block_size, width // 2)
    starts = query_start.tolist()
    for request, end in enumerate(lengths.tolist()):
        rows = slice(starts[request], starts[request + 1])
        count = rows.stop - rows.start
        if count == 0:
            continue
        # Blocks that have left the sliding window hold nothing and are not read.
        first = max(0, end - count + 1 - window) // block_size if window > 0 else 0
        blocks = block_table[request, first : -(-end // block_size)].long()
        flat = cache[blocks].flatten(2).transpose(0, 1)
        keys, values = (flat[:, :, place].flatten(1, 2).float() for place in at)
        last = torch.arange(end - count, end) - first * block_size
        place = torch.arange(keys.shape[1])
        seen = place <= last[:, None]
        if window > 0:
            seen &= place > last[:, None] - window
        grouped = query[rows].float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        yield rows, (grouped @ keys[:, None].transpose(2, 3)) * scale, seen, values


def weigh(
    scores: torch.Tensor, seen: torch.Tensor, exp_table: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [..., rows, keys] of scores of that shape, and their sums [..., rows]; seen: [rows, keys]."""
    top = scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    x = (scores - top).clamp(min=-65504)
    e = torch.exp(x) if exp_table is None else look_up(exp_table, x)
    weights = e.masked_fill(~seen, 0)
    return weights, weights.sum(-1).masked_fill((x.isnan() & seen).any(-1), torch.nan)


def _weighted(weights: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Sums of weighted values, float32 [kv heads, group, rows, head size], of seen keys only."""
    result = weights.float() @ values[:, None]
    if not result.isfinite().all():
        for row, mask in enumerate(seen):
            result[:, :, row] = weights[:, :, row, mask].float() @ values[:, mask]
    return result


lut_attention = define(
    "lut_attention(Tensor query, Tensor cache, Tensor block_table, Tensor query_start, Tensor lengths, "
    "Tensor(a!) out, float scale, int window, Tensor? exp_table, Tensor? recip_table, bool fp16_sum) -> ()",
    _reference,
    _fake,
)
"""Causal attention of new queries over the paged cache, by the rule at the top of this module.

query, out: [tokens, heads, head size]; heads are a multiple of the cache's kv heads. cache: as `cache_write`
leaves it, [blocks, kv heads, block size, 2 * head size], with the keys and values of these queries already
in it. All float16 or all bfloat16. block_table: int32 [requests, blocks]. query_start: int32 [requests + 1],
a request's rows of `query`, in order, the last of its `lengths` (int32 [requests]) keys being that of its
last row; rows of `out` that belong to no request are not written. window: a query sees that many keys with
its own, 0 or less: all. exp_table, recip_table: float16 [65536] indexed by fp16 bit pattern, None: exact.
RuntimeError if the arguments are not so.
"""
