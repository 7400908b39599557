"""`lutserve::kv4_attention` in Triton: two-pass attention that decodes its keys and values as it reads them.

A byte holds two channels of a key, or two tokens of a value, so both products are done by halves: even
channels with even channels, even tokens with even tokens, and nothing is put back in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lutserve.kernels import kv4, kv4_attention
from lutserve.kernels.attention import GROUP as LANES
from lutserve.kernels.gpu import attention_steps as steps

_LANES, _GROUP, _UNIT = tl.constexpr(LANES), tl.constexpr(kv4.GROUP), tl.constexpr(kv4.UNIT)
#: keys of a tile: a unit
_TILE = tl.constexpr(kv4.UNIT)


@triton.jit
def mapped(x, offset):
    """G_mu of `kernels.kv4_attention.class_map`; offset: mu + C."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    magnitude = bits & 0x7FFF
    top: tl.constexpr = 0x7C00 if x.dtype == tl.float16 else 0x7F80
    moved = tl.where(magnitude == 0, 0, tl.minimum(magnitude + offset, top - 1))
    result = (bits & 0x8000) | tl.where(magnitude < top, moved, magnitude)
    return result.to(tl.int16).to(x.dtype, bitcast=True)


@triton.jit
def pages_of(cache_ptr, table_ptr, keys, end, block_stride, BLOCK: tl.constexpr):
    """Pointers to the pages of keys; keys from `end` on are in none, and read nothing."""
    return cache_ptr + tl.load(table_ptr + keys // BLOCK, keys < end, 0).to(tl.int64) * block_stride


@triton.jit
def halves_at(pages, at, mask):
    """Fp32 of the fp16 numbers at `at`, counted in them, of pages that broadcast."""
    return tl.load(pages.to(tl.pointer_type(tl.float16), bitcast=True) + at, mask, 0.0).to(tl.float32)


@triton.jit
def scores_of(
    query_ptr,
    query_mask,
    cache_ptr,
    table_ptr,
    key_tables_ptr,
    offsets_ptr,
    start,
    end,
    block_stride,
    scale,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Fp32 [ROWS, TILE]: the rows at query_ptr [ROWS, 1] times the keys from `start` on."""
    keys = start + tl.arange(0, _TILE)
    inside, offset = keys < end, keys % BLOCK
    pages = pages_of(cache_ptr, table_ptr, keys, end, block_stride, BLOCK)
    pairs = tl.arange(0, _GROUP // 2)
    scores = tl.zeros([query_ptr.shape[0], _TILE], tl.float32)
    for group in tl.static_range(GROUPS):
        pair = group * (_GROUP // 2) + pairs
        held = pair < SIZE // 2
        at = (offset // _LANES * (_LANES // 2) * SIZE + offset % _LANES)[None, :] + (pair * _LANES)[:, None]
        code = tl.load(pages[None, :] + at, held[:, None] & inside[None, :], 0).to(tl.int32)
        sums = tl.zeros([query_ptr.shape[0], _TILE], tl.float32)
        for half in tl.static_range(2):
            index = (code >> (4 * half)) & 15
            x = tl.load(query_ptr + 2 * pair[None, :] + half, query_mask & held[None, :], 0.0)
            for mu in tl.static_range(CLASSES):
                # The query is fetched in every step: it stays in L1, and registers are scarce.
                q = x
                if offsets_ptr is not None:
                    q = mapped(x, tl.load(offsets_ptr + mu))
                sums = tl.dot(q, tl.load(key_tables_ptr + 16 * mu + index), sums)
        place = (offset // _LANES * GROUPS + group) * _LANES + offset % _LANES
        scores += sums * halves_at(pages, BLOCK * SIZE // 2 + place, inside)[None, :]
    return scores * scale


@triton.jit
def decoded_product(sums, weights, code, value_table_ptr):
    """Sums [ROWS, GROUP] + weights [ROWS, TILE] @ values of the bytes `code` int32 [TILE / 2, GROUP]."""
    even, odd = tl.split(weights.reshape(weights.shape[0], _TILE // 2, 2))
    sums = steps.product(sums, even, tl.load(value_table_ptr + (code & 15)))
    return steps.product(sums, odd, tl.load(value_table_ptr + (code >> 4)))


@triton.jit
def kv4_attention_kernel(
    query_ptr,
    value_ptr,
    cache_ptr,
    table_ptr,
    query_start_ptr,
    lengths_ptr,
    out_ptr,
    key_tables_ptr,
    offsets_ptr,
    value_table_ptr,
    exp_ptr,
    recip_ptr,
    maxima_ptr,
    totals_ptr,
    sums_ptr,
    requests,
    tokens,
    heads,
    table_stride,
    query_stride,
    head_stride,
    value_stride,
    value_head_stride,
    block_stride,
    kv_head_stride,
    scale,
    MAXIMA: tl.constexpr,
    SUMS: tl.constexpr,
    SPLITS: tl.constexpr,
    FP16_SUM: tl.constexpr,
    CLASSES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """See `kv4_attention`; program: a tile of rows, a kv head, a part of the keys.

    MAXIMA, SUMS: what it computes; both where SPLITS is 1. VALUE_SCALES, TAIL: bytes, see `kv4.Layout`.
    By unit where there is value_ptr.
    """
    Q: tl.constexpr = ROWS // GROUP
    program, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = steps.locate(query_start_ptr, requests, program, Q)
    start = tl.load(query_start_ptr + request)
    count = tl.load(query_start_ptr + request + 1) - start
    first = (program - start // Q - request) * Q
    if first >= count:
        return
    length = tl.load(lengths_ptr + request)
    lanes = tl.arange(0, ROWS)
    token, head = first + lanes // GROUP, kv_head * GROUP + lanes % GROUP
    valid = (lanes < Q * GROUP) & (token < count)
    history = length - count
    positions = history + token
    row = (start + token).to(tl.int64)
    query_ptr += (row * query_stride + head * head_stride)[:, None]
    lowest = history + first
    begin, end = steps.part(0, tl.minimum(length, lowest + Q), split, SPLITS, _TILE)
    # Up to here every row sees every key, and by unit as indices.
    whole = begin + tl.maximum(0, tl.minimum(end, lowest + 1) - begin) // _TILE * _TILE
    cache_ptr += kv_head.to(tl.int64) * kv_head_stride
    table_ptr += request.to(tl.int64) * table_stride
    scratch = row * heads + head
    parts = tokens * heads
    tile, channels, halves = tl.arange(0, _TILE), tl.arange(0, _GROUP), tl.arange(0, _TILE // 2)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    if MAXIMA:
        for key in range(begin, end, _TILE):
            s = scores_of(
                query_ptr, valid[:, None], cache_ptr, table_ptr, key_tables_ptr, offsets_ptr, key, end,
                block_stride, scale, CLASSES, BLOCK, SIZE, GROUPS,
            )  # fmt: skip
            seen = key + tile[None, :] <= positions[:, None]
            top = tl.maximum(top, tl.max(tl.where(seen, s, float("-inf")), 1))
        if not SUMS:
            tl.store(maxima_ptr + split.to(tl.int64) * parts + scratch, top, valid)
    else:
        for other in tl.static_range(SPLITS):
            top = tl.maximum(top, tl.load(maxima_ptr + other * parts + scratch, valid, 0.0))
    if SUMS:
        total = tl.zeros([ROWS], tl.float32)
        sums = ()
        for _ in tl.static_range(GROUPS):
            sums = sums + (tl.zeros([ROWS, _GROUP], tl.float32),)  # noqa: RUF005
        # fp16 entries of a table are their own weights, in bf16 models weights are bf16, scales included.
        DTYPE: tl.constexpr = out_ptr.dtype.element_ty
        EXACT: tl.constexpr = (tl.float16 == DTYPE) and (exp_ptr is None or value_ptr is None)
        WEIGHT: tl.constexpr = tl.float32 if EXACT else DTYPE
        for key in range(begin, end, _TILE):
            s = scores_of(
                query_ptr, valid[:, None], cache_ptr, table_ptr, key_tables_ptr, offsets_ptr, key, end,
                block_stride, scale, CLASSES, BLOCK, SIZE, GROUPS,
            )  # fmt: skip
            keys = key + tile
            seen = keys[None, :] <= positions[:, None]
            x = tl.where(seen, s - top[:, None], 0.0)
            e = tl.where(seen, steps.exponential(x, exp_ptr), 0.0)
            total += steps.total_of(e, x)
            offset = keys % BLOCK
            pages = pages_of(cache_ptr, table_ptr, keys, end, block_stride, BLOCK)
            even = key + 2 * halves
            even_pages = pages_of(cache_ptr, table_ptr, even, end, block_stride, BLOCK)
            even_offset = even % BLOCK
            at = (
                BLOCK * SIZE // 2
                + even_offset // _LANES * (_LANES // 2) * SIZE
                + even_offset % _LANES // 2 * SIZE
            )
            new = ()
            for group in tl.static_range(GROUPS):
                d = group * _GROUP + channels
                held = (d < SIZE)[None, :]
                code = tl.load(
                    even_pages[:, None] + at[:, None] + d[None, :], (even < end)[:, None] & held, 0
                )
                code = code.to(tl.int32)
                if value_ptr is None:
                    place = (offset // _LANES * GROUPS + group) * _LANES + offset % _LANES
                    by = halves_at(pages, VALUE_SCALES // 2 + place, keys < end)[None, :]
                    weights = tl.where(e == 0, 0.0, e * by).to(WEIGHT)
                    result = decoded_product(sums[group], weights, code, value_table_ptr)
                else:
                    complete = (positions + 1 >= key + _UNIT)[:, None]
                    none = tl.zeros([ROWS, _GROUP], tl.float32)
                    coded = decoded_product(none, e.to(WEIGHT), code, value_table_ptr)
                    unit = tl.load(table_ptr + key // BLOCK).to(tl.int64) * block_stride
                    by = VALUE_SCALES // 2 + key % BLOCK // _UNIT * SIZE + d[None, :]
                    result = tl.where(
                        complete, sums[group] + coded * halves_at(cache_ptr + unit, by, held), sums[group]
                    )
                    if key >= whole:
                        # Some rows see this unit as it was, from this step or from the tail.
                        recent = (keys >= history)[:, None] & (keys < length)[:, None] & held
                        from_step = (start + keys - history).to(tl.int64)[:, None] * value_stride + d[None, :]
                        raw = tl.load(value_ptr + kv_head * value_head_stride + from_step, recent, 0.0)
                        tail = (cache_ptr + unit + TAIL).to(tl.pointer_type(DTYPE), bitcast=True)
                        older = (keys < history)[:, None] & held
                        raw += tl.load(tail + tile[:, None] * SIZE + d[None, :], older, 0.0)
                        own = seen & (complete == 0)
                        w = tl.where(own, e, 0.0).to(WEIGHT)
                        result = steps.product_of_seen(result, w, raw, own)
                new = new + (result,)  # noqa: RUF005
            sums = new
        if SPLITS > 1:
            scratch += split.to(tl.int64) * parts
            tl.store(totals_ptr + scratch, total, valid)
        for group in tl.static_range(GROUPS):
            d = group * _GROUP + channels
            mask = valid[:, None] & (d < SIZE)[None, :]
            if SPLITS == 1:
                y = steps.divide(sums[group], total, recip_ptr, FP16_SUM).to(DTYPE)
                tl.store(out_ptr + scratch[:, None] * SIZE + d[None, :], y, mask)
            else:
                tl.store(sums_ptr + scratch[:, None] * SIZE + d[None, :], sums[group], mask)


def attend(
    query: torch.Tensor,
    value: torch.Tensor | None,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    key_tables: torch.Tensor,
    offsets: torch.Tensor | None,
    value_table: torch.Tensor,
    scale: float,
    exp_table: torch.Tensor | None,
    recip_table: torch.Tensor | None,
    fp16_sum: bool,
) -> None:
    """`lutserve::kv4_attention` on a GPU; `out` must be contiguous."""
    kv4_attention._fake(
        query, value, cache, block_table, query_start, lengths, out, key_tables, offsets, value_table, scale,
        exp_table, recip_table, fp16_sum,
    )  # fmt: skip
    torch._check(out.is_contiguous(), lambda: "kv4_attention: out must be contiguous")
    (tokens, heads, size), requests, (_, kv_heads, block_size, _) = query.shape, len(lengths), cache.shape
    if not tokens or not requests:
        return
    query = query if query.stride(2) == 1 else query.contiguous()
    value = value if value is None or value.stride(2) == 1 else value.contiguous()
    layout = kv4.Layout(block_size, size, value is not None)
    group = heads // kv_heads
    # Wider tiles spill where keys have classes.
    rows = max(16, triton.next_power_of_2(group))
    programs = tokens // (rows // group) + requests
    splits = steps.splits_for(programs * kv_heads, block_table.shape[1] * block_size, kv4.UNIT)
    maxima, totals, sums = steps.scratch(splits, query)
    for find_maxima, add in steps.launches(splits):
        kv4_attention_kernel[(programs, kv_heads, splits)](
            query,
            value,
            cache,
            block_table,
            query_start,
            lengths,
            out,
            key_tables,
            offsets,
            value_table,
            exp_table,
            recip_table,
            maxima,
            totals,
            sums,
            requests,
            tokens,
            heads,
            block_table.stride(0),
            *query.stride()[:2],
            *((0, 0) if value is None else value.stride()[:2]),
            *cache.stride()[:2],
            scale,
            MAXIMA=find_maxima,
            SUMS=add,
            SPLITS=splits,
            FP16_SUM=fp16_sum,
            CLASSES=len(key_tables),
            GROUP=group,
            BLOCK=block_size,
            SIZE=size,
            GROUPS=layout.groups,
            VALUE_SCALES=layout.value_scales,
            TAIL=layout.tail,
            ROWS=rows,
            num_warps=8,
            num_stages=2,
            enable_fp_fusion=False,
        )
    if splits > 1:
        steps.combine(sums, totals, query_start, recip_table, out, fp16_sum)
