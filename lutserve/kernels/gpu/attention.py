"""`lutserve::lut_attention` and `cache_write` in Triton, in the CPUs' cache layout (`kernels.attention`).

In bf16 the layout has two rows side by side, so the cache is read as dwords of two numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lutserve.kernels import attention
from lutserve.kernels.attention import GROUP as LANES
from lutserve.kernels.gpu import attention_steps as steps

_LANES = tl.constexpr(LANES)


@triton.jit
def cache_write_kernel(
    key_ptr,
    value_ptr,
    cache_ptr,
    slots_ptr,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    block_stride,
    head_stride,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store one token's key and value of one head; program: a token and a head."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    d = tl.arange(0, WIDTH)
    inside = d < SIZE
    k = tl.load(key_ptr + token * key_stride + head * key_head_stride + d, inside)
    v = tl.load(value_ptr + token * value_stride + head * value_head_stride + d, inside)
    offset = (slot % BLOCK).to(tl.int32)
    lane = offset % _LANES
    page = cache_ptr + slot // BLOCK * block_stride + head * head_stride + offset // _LANES * _LANES * SIZE
    if PAIRED:
        key_at, value_at = (d // 2 * _LANES + lane) * 2 + d % 2, (lane // 2 * SIZE + d) * 2 + lane % 2
    else:
        key_at, value_at = d * _LANES + lane, lane * SIZE + d
    tl.store(page + key_at, k, inside)
    tl.store(page + BLOCK * SIZE + value_at, v, inside)


@triton.jit
def unpaired(words, DTYPE: tl.constexpr):
    """[2 R, C] numbers of int32 [R, C] that hold row 2r in their low and row 2r + 1 in their high half."""
    low = (words & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    high = ((words >> 16) & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    return tl.join(low, high).permute(0, 2, 1).reshape(2 * words.shape[0], words.shape[1])


@triton.jit
def page_of(table_ptr, keys, end, block_stride, BLOCK: tl.constexpr):
    """Where the blocks of keys begin, int64; keys from `end` on are in no block, and read nothing."""
    return tl.load(table_ptr + keys // BLOCK, keys < end, 0).to(tl.int64) * block_stride


@triton.jit
def scores_of(
    query,
    cache_ptr,
    table_ptr,
    start,
    end,
    block_stride,
    scale,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Fp32 [ROWS, TILE], query [ROWS, WIDTH] times the keys from `start` on; cache_ptr: of the kv head."""
    keys = start + tl.arange(0, TILE)
    offset = keys % BLOCK
    page = page_of(table_ptr, keys, end, block_stride, BLOCK)
    if PAIRED:
        pairs = tl.arange(0, WIDTH // 2)
        at = page // 2 + offset // _LANES * (_LANES * SIZE // 2) + offset % _LANES
        mask = (keys < end)[None, :] & (pairs < SIZE // 2)[:, None]
        words = tl.load(cache_ptr + at[None, :] + (pairs * _LANES)[:, None], mask, 0)
        key = unpaired(words, query.dtype)
    else:
        d = tl.arange(0, WIDTH)
        at = page + offset // _LANES * (_LANES * SIZE) + offset % _LANES
        mask = (keys < end)[None, :] & (d < SIZE)[:, None]
        key = tl.load(cache_ptr + at[None, :] + (d * _LANES)[:, None], mask, 0.0)
    return tl.dot(query, key) * scale


@triton.jit
def values_of(
    cache_ptr,
    table_ptr,
    start,
    end,
    block_stride,
    DTYPE: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """The values [TILE, WIDTH] of the keys from `start` on; of those from `end` on 0."""
    d = tl.arange(0, WIDTH)
    if PAIRED:
        keys = start + 2 * tl.arange(0, TILE // 2)
        offset = keys % BLOCK
        page = page_of(table_ptr, keys, end, block_stride, BLOCK) // 2 + BLOCK * SIZE // 2
        at = page + offset // _LANES * (_LANES * SIZE // 2) + offset % _LANES // 2 * SIZE
        mask = (keys < end)[:, None] & (d < SIZE)[None, :]
        values = unpaired(tl.load(cache_ptr + at[:, None] + d[None, :], mask, 0), DTYPE)
        # The last pair may be half a key.
        inside = start + tl.arange(0, TILE) < end
        return tl.where(inside[:, None], values, tl.zeros([TILE, WIDTH], DTYPE))
    else:
        keys = start + tl.arange(0, TILE)
        offset = keys % BLOCK
        at = page_of(table_ptr, keys, end, block_stride, BLOCK) + BLOCK * SIZE
        at += offset // _LANES * (_LANES * SIZE) + offset % _LANES * SIZE
        mask = (keys < end)[:, None] & (d < SIZE)[None, :]
        return tl.load(cache_ptr + at[:, None] + d[None, :], mask, 0.0)


@triton.jit
def lut_attention_kernel(
    query_ptr,
    cache_ptr,
    table_ptr,
    query_start_ptr,
    lengths_ptr,
    out_ptr,
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
    block_stride,
    kv_head_stride,
    scale,
    window,
    MAXIMA: tl.constexpr,
    SUMS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    FP16_SUM: tl.constexpr,
    PAIRED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """See `lut_attention`; program: a tile of rows, a kv head, a part of the keys.

    MAXIMA, SUMS: what it computes; both where SPLITS is 1.
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
    positions = length - count + token
    row = (start + token).to(tl.int64)
    d = tl.arange(0, WIDTH)
    at = row * query_stride + head * head_stride
    query = tl.load(query_ptr + at[:, None] + d[None, :], valid[:, None] & (d < SIZE)[None, :], 0.0)

    lowest = length - count + first
    end = tl.minimum(length, lowest + Q)
    begin = 0
    if WINDOW:
        begin = tl.maximum(0, lowest - window + 1) // TILE * TILE
    begin, end = steps.part(begin, end, split, SPLITS, TILE)
    # Up to here every row sees every key.
    whole = begin
    if not WINDOW:
        whole += tl.maximum(0, tl.minimum(end, lowest + 1) - begin) // TILE * TILE
    cache_ptr += kv_head * kv_head_stride
    table_ptr += request.to(tl.int64) * table_stride
    scratch = row * heads + head
    parts = tokens * heads

    top = tl.full([ROWS], float("-inf"), tl.float32)
    if MAXIMA:
        for key in range(begin, whole, TILE):
            s = scores_of(
                query, cache_ptr, table_ptr, key, end, block_stride, scale, PAIRED, BLOCK, SIZE, WIDTH, TILE
            )
            top = tl.maximum(top, tl.max(s, 1))
        for key in range(whole, end, TILE):
            s = scores_of(
                query, cache_ptr, table_ptr, key, end, block_stride, scale, PAIRED, BLOCK, SIZE, WIDTH, TILE
            )
            seen = steps.seen_of(key + tl.arange(0, TILE), positions, window, WINDOW)
            top = tl.maximum(top, tl.max(tl.where(seen, s, float("-inf")), 1))
        if not SUMS:
            tl.store(maxima_ptr + split.to(tl.int64) * parts + scratch, top, valid)
    else:
        for other in tl.static_range(SPLITS):
            top = tl.maximum(top, tl.load(maxima_ptr + other * parts + scratch, valid, 0.0))
    if SUMS:
        total, sums = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
        # fp16 entries of a table are their own weights, in bf16 models weights are bf16.
        WEIGHT: tl.constexpr = tl.float32 if exp_ptr is None and not PAIRED else query.dtype
        for key in range(begin, whole, TILE):
            s = scores_of(
                query, cache_ptr, table_ptr, key, end, block_stride, scale, PAIRED, BLOCK, SIZE, WIDTH, TILE
            )
            x = s - top[:, None]
            e = steps.exponential(x, exp_ptr)
            total += steps.total_of(e, x)
            values = values_of(
                cache_ptr, table_ptr, key, end, block_stride, query.dtype, PAIRED, BLOCK, SIZE, WIDTH, TILE
            )
            sums = steps.product(sums, e.to(WEIGHT), values)
        for key in range(whole, end, TILE):
            s = scores_of(
                query, cache_ptr, table_ptr, key, end, block_stride, scale, PAIRED, BLOCK, SIZE, WIDTH, TILE
            )
            seen = steps.seen_of(key + tl.arange(0, TILE), positions, window, WINDOW)
            x = tl.where(seen, s - top[:, None], 0.0)
            e = tl.where(seen, steps.exponential(x, exp_ptr), 0.0)
            total += steps.total_of(e, x)
            values = values_of(
                cache_ptr, table_ptr, key, end, block_stride, query.dtype, PAIRED, BLOCK, SIZE, WIDTH, TILE
            )
            sums = steps.product_of_seen(sums, e.to(WEIGHT), values, seen)
        mask = valid[:, None] & (d < SIZE)[None, :]
        if SPLITS == 1:
            y = steps.divide(sums, total, recip_ptr, FP16_SUM)
            tl.store(out_ptr + scratch[:, None] * SIZE + d[None, :], y.to(out_ptr.dtype.element_ty), mask)
        else:
            scratch += split.to(tl.int64) * parts
            tl.store(totals_ptr + scratch, total, valid)
            tl.store(sums_ptr + scratch[:, None] * SIZE + d[None, :], sums, mask)


def cache_write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """`lutserve::cache_write` on a GPU."""
    attention._write_fake(key, value, cache, slots)
    _, heads, block_size, width = cache.shape
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    if len(slots):
        cache_write_kernel[(len(slots), heads)](
            key,
            value,
            cache,
            slots,
            *key.stride()[:2],
            *value.stride()[:2],
            *cache.stride()[:2],
            PAIRED=cache.dtype == torch.bfloat16,
            BLOCK=block_size,
            SIZE=width // 2,
            WIDTH=triton.next_power_of_2(width // 2),
            num_warps=1,
        )


def lut_attention(
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
    """`lutserve::lut_attention` on a GPU; `out` must be contiguous."""
    attention._fake(
        query, cache, block_table, query_start, lengths, out, scale, window, exp_table, recip_table, fp16_sum
    )
    torch._check(out.is_contiguous(), lambda: "lut_attention: out must be contiguous")
    (tokens, heads, size), requests, (_, kv_heads, block_size, _) = query.shape, len(lengths), cache.shape
    if not tokens or not requests:
        return
    query = query if query.stride(2) == 1 else query.contiguous()
    group = heads // kv_heads
    # Few rows where no request can have more than about one token.
    rows = max(16 if tokens <= 2 * requests else 64, triton.next_power_of_2(group))
    tile = 64 if size <= 128 else 32
    programs = tokens // (rows // group) + requests
    splits = steps.splits_for(programs * kv_heads, block_table.shape[1] * block_size, tile)
    maxima, totals, sums = steps.scratch(splits, query)
    paired = cache.dtype == torch.bfloat16
    for find_maxima, add in steps.launches(splits):
        lut_attention_kernel[(programs, kv_heads, splits)](
            query,
            cache.view(torch.int32) if paired else cache,
            block_table,
            query_start,
            lengths,
            out,
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
            cache.stride(0),
            cache.stride(1) // (2 if paired else 1),
            scale,
            window,
            MAXIMA=find_maxima,
            SUMS=add,
            SPLITS=splits,
            WINDOW=window > 0,
            FP16_SUM=fp16_sum,
            PAIRED=paired,
            GROUP=group,
            BLOCK=block_size,
            SIZE=size,
            WIDTH=triton.next_power_of_2(size),
            ROWS=rows,
            TILE=tile,
            num_warps=4 if rows == 16 else 8,
            num_stages=2,
            enable_fp_fusion=False,
        )
    if splits > 1:
        steps.combine(sums, totals, query_start, recip_table, out, fp16_sum)
