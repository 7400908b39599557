"""What the attention kernels over 16-bit and 4-bit caches share.

A program has a tile of rows, ROWS of them: Q tokens of one request by GROUP heads that share a kv head, token
by token. Where requests are few the keys are split between programs: one launch finds the maxima of the
parts, a second the sums, with the maximum of all parts, and a third adds them. Maxima come first because
table[a] * table[b] is not table[a + b]: nothing could be rescaled afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: programs that keep the GPUs of today busy, and the most parts of one row's keys
ENOUGH, MOST_SPLITS = 256, 32


@triton.jit
def locate(query_start_ptr, requests, program, Q: tl.constexpr):
    """Return the request that a program serves: the last whose start // Q + its number is not above it."""
    low, high = 0, requests
    while low < high:
        middle = (low + high) // 2
        before = tl.load(query_start_ptr + middle) // Q + middle <= program
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low - 1


@triton.jit
def part(begin, end, split, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """The part of the keys begin..end that is this program's, in whole tiles; it may be empty."""
    size = tl.cdiv(tl.cdiv(end - begin, TILE), SPLITS) * TILE
    first = begin + split * size
    return first, tl.minimum(end, first + size)


@triton.jit
def seen_of(keys, positions, window, WINDOW: tl.constexpr):
    """Which keys a row sees, [ROWS, TILE]."""
    seen = keys[None, :] <= positions[:, None]
    if WINDOW:
        seen = seen & (keys[None, :] > positions[:, None] - window)
    return seen


@triton.jit
def exponential(x, table_ptr):
    """Return e of fp32 x, by the table or exactly."""
    x = tl.maximum(x, -65504.0)
    if table_ptr is None:
        e = tl.exp(x)
    else:
        bits = x.to(tl.float16).to(tl.uint16, bitcast=True)
        e = tl.load(table_ptr + bits.to(tl.int32)).to(tl.float32)
    return e


@triton.jit
def total_of(e, x):
    """Sums over the keys of weights e, NaN where x is somewhere; what is not seen has weight and x 0."""
    return tl.sum(tl.where(x == x, e, float("nan")), 1)


@triton.jit
def divide(weighted, total, recip_ptr, FP16_SUM: tl.constexpr):
    """See `kernels.attention.divide`; weighted: fp32 [ROWS, D], total: fp32 [ROWS]."""
    if FP16_SUM:
        near = tl.minimum(tl.maximum(total.to(tl.float16).to(tl.float32), -65504.0), 65504.0)
        total = tl.where(tl.abs(total) < float("inf"), near, total)
    quotient = tl.div_rn(weighted, total[:, None])
    if recip_ptr is not None:
        word = total.to(tl.int32, bitcast=True)
        rounded = ((word & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True).to(tl.float16)
        up = rounded == 2.0
        exponent = (word >> 23) - 127 + up.to(tl.int32)
        bits = tl.where(up, 0x3C00, rounded.to(tl.uint16, bitcast=True).to(tl.int32))
        entry = tl.load(recip_ptr + bits).to(tl.float32)
        # 2**-exponent in two factors, each of which is a normal number.
        half = exponent >> 1
        inverse = entry * ((127 - half) << 23).to(tl.float32, bitcast=True)
        inverse *= ((127 - exponent + half) << 23).to(tl.float32, bitcast=True)
        normal = (total >= 1.1754943508222875e-38) & (total < float("inf"))
        quotient = tl.where(normal[:, None], weighted * inverse[:, None], quotient)
    return quotient


@triton.jit
def product(sums, weights, values):
    """Sums [ROWS, D] + weights [ROWS, TILE] @ values [TILE, D]."""
    if weights.dtype == tl.float32:
        # fp16 values are whole in TF32, weights are in parts of it.
        sums = tl.dot(weights, values.to(tl.float32), sums, input_precision="tf32x3")
    else:
        sums = tl.dot(weights, values, sums)
    return sums


@triton.jit
def product_of_seen(sums, weights, values, seen):
    """`product` where some rows do not see some keys.

    Their weights are 0, but 0 * inf is not, so a tile that holds what is not finite is added key by key.
    """
    wide = values.to(tl.float32)
    if tl.sum((tl.abs(wide) < float("inf")).to(tl.int32)) == wide.shape[0] * wide.shape[1]:
        sums = product(sums, weights, values)
    else:
        lanes = tl.arange(0, weights.shape[1])
        for key in range(weights.shape[1]):
            here = lanes == key
            value = tl.sum(tl.where(here[:, None], wide, 0.0), 0)
            weight = tl.sum(tl.where(here[None, :], weights.to(tl.float32), 0.0), 1)
            sees = tl.sum((seen & here[None, :]).to(tl.int32), 1) > 0
            sums += tl.where(sees[:, None], weight[:, None] * value[None, :], 0.0)
    return sums


@triton.jit
def combine_kernel(
    sums_ptr,
    totals_ptr,
    query_start_ptr,
    recip_ptr,
    out_ptr,
    requests,
    tokens,
    heads,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    FP16_SUM: tl.constexpr,
):
    """Add the parts and divide; program: a token and a head. WIDTH: SIZE up to a power of two."""
    token, head = tl.program_id(0), tl.program_id(1)
    if token >= tl.load(query_start_ptr + requests):
        return
    d = tl.arange(0, WIDTH)
    row = token.to(tl.int64) * heads + head
    weighted, total = tl.zeros([1, WIDTH], tl.float32), tl.zeros([1], tl.float32)
    for split in tl.static_range(SPLITS):
        at = split * tokens * heads + row
        weighted += tl.load(sums_ptr + at * SIZE + d, d < SIZE, 0.0)[None, :]
        total += tl.load(totals_ptr + at)
    y = divide(weighted, total, recip_ptr, FP16_SUM)
    tl.store(out_ptr + row * SIZE + d[None, :], y.to(out_ptr.dtype.element_ty), (d < SIZE)[None, :])


def splits_for(programs: int, most_keys: int, tile: int) -> int:
    """Parts of the keys, a power of two; host knowledge only, so the same in every replay of a graph."""
    wanted = triton.next_power_of_2(max(1, ENOUGH // max(1, programs)))
    return int(min(wanted, MOST_SPLITS, triton.next_power_of_2(max(1, most_keys // tile))))


def launches(splits: int) -> tuple[tuple[bool, bool], ...]:
    """What the launches over the keys compute: maxima, sums."""
    return ((True, True),) if splits == 1 else ((True, False), (False, True))


def scratch(splits: int, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maxima and totals [splits, tokens, heads] and sums [splits, tokens, heads, head size], float32."""
    tokens, heads, size = query.shape
    shape = (splits, tokens, heads) if splits > 1 else (0, 0, 0)
    maxima, totals = (torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2))
    sums = torch.empty((*shape, size), dtype=torch.float32, device=query.device)
    return maxima, totals, sums


def combine(
    sums: torch.Tensor,
    totals: torch.Tensor,
    query_start: torch.Tensor,
    recip_table: torch.Tensor | None,
    out: torch.Tensor,
    fp16_sum: bool,
) -> None:
    """Write to out [tokens, heads, head size] what the parts in `scratch`'s tensors amount to."""
    splits, tokens, heads, size = sums.shape
    combine_kernel[(tokens, heads)](
        sums,
        totals,
        query_start,
        recip_table,
        out,
        len(query_start) - 1,
        tokens,
        heads,
        SIZE=size,
        WIDTH=triton.next_power_of_2(size),
        SPLITS=splits,
        FP16_SUM=fp16_sum,
        num_warps=1,
        enable_fp_fusion=False,
    )
