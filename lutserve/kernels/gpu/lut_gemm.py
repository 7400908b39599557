"""`lutserve::lut_gemm` on a GPU.

The product is turned around, weights on the left: `out^T = W @ x^T`. Then one activation row costs a tensor
core 8 columns, not 64 rows, and the weights are expanded into the registers from which it takes its left
operand. Every BLOCK_K input columns the sums are scaled and added, so a group may have any length. Where the
tiles are fewer than the processors, some processors share a tile's input columns (split-K), and a second
kernel adds their sums in one order: results do not depend on timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lutserve.kernels import lut_gemm as op
from lutserve.kernels.gpu import decode, floats
from lutserve.kernels.gpu.device import processors
from lutserve.kernels.reference import TINY

_TINY: tl.constexpr = tl.constexpr(TINY)
_ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it away rounds to even
_REDUCE, _QUANTIZE = 1024, 256


@triton.jit
def pack_tables_kernel(codebooks, tables, dtype: tl.constexpr):
    """Write `decode.planes` of one table, int32 [T C, 8]."""
    which = tl.program_id(0)
    words = decode.planes(codebooks + which * 16, dtype)
    for i in tl.static_range(8):
        tl.store(tables + which * 8 + i, words[i])


@triton.jit
def gemm_kernel(
    x,
    x_scales,
    packed,
    codebooks,
    tables,
    scales,
    types,
    bias,
    out,
    m_size,
    n_size,
    k_size,
    group_size,
    groups,
    class_stride,
    row_stride,
    CLASSES: tl.constexpr,
    TYPED: tl.constexpr,
    INT8: tl.constexpr,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    dtype: tl.constexpr,
):
    """Write a tile [BLOCK_M, BLOCK_N] of the result, or of one of SPLITS partial sums (fp32 [SPLITS, M, N]).

    tables: int32 [T, C, 8] where TYPED, otherwise the one in `codebooks` is taken. x_scales: fp32 [M, groups]
    where INT8, and x is int8 then. WHOLE: the blocks of columns fill the groups and the groups fill K.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    panel, lane = n // 32, n % 32
    octets = (k_size + 7) // 8
    inside_n, inside_m = n < n_size, m < m_size
    weights = packed + panel.to(tl.int64) * octets * 32 + lane
    factors = scales + panel * groups * 32 + lane
    octet, column = tl.arange(0, BLOCK_K // 8), tl.arange(0, BLOCK_K)
    rows = x + m.to(tl.int64)[:, None] * row_stride
    hoisted = ()
    if not TYPED:
        for c in tl.static_range(CLASSES):
            hoisted = hoisted + (decode.planes(codebooks + 16 * c, dtype),)  # noqa: RUF005

    a_group = tl.cdiv(group_size, BLOCK_K)
    chunks = groups * a_group
    begin = tl.program_id(2) * chunks // SPLITS
    end = (tl.program_id(2) + 1) * chunks // SPLITS
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for chunk in range(begin, end):
        group = chunk // a_group
        first = group * group_size + chunk % a_group * BLOCK_K
        last = tl.minimum((group + 1) * group_size, k_size)
        pointers = weights[:, None] + (first // 8 + octet)[None, :] * 32
        if WHOLE:
            words = tl.load(pointers, mask=inside_n[:, None], other=0)
        else:
            words = tl.load(pointers, mask=inside_n[:, None] & (first + octet * 8 < last)[None, :], other=0)
        factor = tl.load(factors + group * 32, mask=inside_n, other=0)
        if TYPED:
            kind = tl.load(types + panel * groups + group, mask=inside_n, other=0).to(tl.int32)
        for c in tl.static_range(CLASSES):
            places = rows + c * class_stride + (first + column)[None, :]
            if WHOLE:
                values = tl.load(places, mask=inside_m[:, None], other=0)
            else:
                values = tl.load(places, mask=inside_m[:, None] & (first + column < last)[None, :], other=0)
            if TYPED:
                planes = ()
                for i in tl.static_range(8):
                    word = tl.load(tables + (kind * CLASSES + c) * 8 + i)
                    planes = planes + (word[:, None],)  # noqa: RUF005
            else:
                planes = hoisted[c]
            weight = decode.expand(words, planes, dtype)
            if c == 0:
                sums = floats.dot(weight, values.T)
            else:
                sums += floats.dot(weight, values.T)
        if INT8:
            a_scale = tl.load(x_scales + m * groups + group, mask=inside_m, other=0)
            total += sums.to(tl.float32) * (factor[:, None] * a_scale[None, :])
        else:
            total += sums * factor[:, None]

    inside = inside_m[:, None] & inside_n[None, :]
    place = m.to(tl.int64)[:, None] * n_size + n[None, :]
    if SPLITS > 1:
        place += tl.program_id(2).to(tl.int64) * m_size * n_size
        tl.store(out + place, total.T, mask=inside)
    else:
        if BIASED:
            total += floats.widen(tl.load(bias + n, mask=inside_n, other=0))[:, None]
        tl.store(out + place, floats.narrow(total.T, out.dtype.element_ty), mask=inside)


@triton.jit
def reduce_kernel(
    partial, bias, out, size, n_size, SPLITS: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the sum of fp32 [SPLITS, size] plus bias [n_size], rounded, `size` elements in rows of n_size."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.load(partial + place, mask=inside)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial + split * size + place, mask=inside)
    if BIASED:
        total += floats.widen(tl.load(bias + place % n_size, mask=inside))
    tl.store(out + place, floats.narrow(total, out.dtype.element_ty), mask=inside)


@triton.jit
def quantize_kernel(x, codes, scales, k_size, group_size, groups, row_stride, BLOCK: tl.constexpr):
    """Quantise a row's group to int8 codes [M, K] and an fp32 scale [M, groups], as `quantize_rows` does."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = group * group_size
    end = tl.minimum(begin + group_size, k_size)
    peaks = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = floats.widen(tl.load(x + row * row_stride + column, mask=column < end, other=0))
        peaks = tl.maximum(peaks, tl.abs(values))
    peak = tl.max(peaks, 0)
    inverse = tl.where(peak > _TINY, tl.div_rn(127.0, peak), 0.0)
    for first in range(begin, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = floats.widen(tl.load(x + row * row_stride + column, mask=column < end, other=0))
        rounded = (values * inverse + _ROUND) - _ROUND
        code = tl.clamp(rounded, -127.0, 127.0).to(tl.int8)
        tl.store(codes + row * k_size + column, code, mask=column < end)
    tl.store(scales + row * groups + group, tl.where(peak > _TINY, tl.div_rn(peak, 127.0), 0.0))


@dataclass(frozen=True)
class Tile:
    """How a product is cut: the tile of a program, its warps and stages, the programs that share a tile."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    splits: int


def plan(m: int, n: int, k: int, group_size: int, available: int, classes: int = 1) -> Tile:
    """Choose a tile for x [m, k] and n output columns on a device with so many processors."""
    block_k = min(128, max(32, triton.next_power_of_2(group_size)))
    if classes > 2:
        # Every class has its own activations in shared memory.
        block_m, block_n, warps, stages = min(32, max(16, triton.next_power_of_2(m))), 64, 4, 1
        block_k = min(64, block_k)
    elif m <= 64:
        block_m, block_n, warps, stages = max(16, triton.next_power_of_2(m)), 64, 4, 4
    else:
        block_m, block_n, warps, stages, block_k = 128, 128, 8, 3, min(64, block_k)
    chunks = triton.cdiv(k, group_size) * triton.cdiv(group_size, block_k)
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    # Two programs a processor hide each other's latency; a split sums eight chunks or more.
    splits = max(1, min(2 * available // tiles, chunks // 8, 8)) if m <= 64 else 1
    return Tile(block_m, block_n, block_k, warps, stages, splits)


def lut_gemm(
    x: torch.Tensor,
    packed: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    types: torch.Tensor | None,
    group_size: int,
    n: int,
    bias: torch.Tensor | None,
    quantize_activations: bool,
) -> torch.Tensor:
    """`lutserve::lut_gemm` on a GPU."""
    out = op._fake(x, packed, codebooks, scales, types, group_size, n, bias, quantize_activations)
    classes, m, k = x.shape
    if not out.numel():
        return out
    x = x if x.stride(2) == 1 else x.contiguous()
    group_size, groups = min(group_size, k), scales.shape[1]
    tile = plan(m, n, k, group_size, processors(x.device), classes)
    dtype = tl.float16 if x.dtype == torch.float16 else tl.bfloat16
    tables = x_scales = None
    if types is not None:
        tables = torch.empty((*codebooks.shape[:2], 8), dtype=torch.int32, device=x.device)
        pack_tables_kernel[(tables.numel() // 8,)](codebooks, tables, dtype=dtype, num_warps=1)
    if quantize_activations:
        codes = torch.empty((1, m, k), dtype=torch.int8, device=x.device)
        x_scales = torch.empty((m, groups), dtype=torch.float32, device=x.device)
        quantize_kernel[(m, groups)](
            x, codes, x_scales, k, group_size, groups, x.stride(1), BLOCK=_QUANTIZE, num_warps=1
        )
        x, dtype = codes, tl.int8
    partial = out
    if tile.splits > 1:
        partial = torch.empty((tile.splits, m, n), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n, tile.n), triton.cdiv(m, tile.m), tile.splits)
    gemm_kernel[grid](
        x,
        x_scales,
        packed.view(torch.int32),
        codebooks,
        tables,
        scales,
        types,
        bias,
        partial,
        m,
        n,
        k,
        group_size,
        groups,
        x.stride(0),
        x.stride(1),
        CLASSES=classes,
        TYPED=types is not None,
        INT8=quantize_activations,
        BIASED=bias is not None,
        SPLITS=tile.splits,
        WHOLE=k % group_size == 0 and group_size % tile.k == 0,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        dtype=dtype,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tile.splits > 1:
        reduce_kernel[(triton.cdiv(out.numel(), _REDUCE),)](
            partial,
            bias,
            out,
            out.numel(),
            n,
            SPLITS=tile.splits,
            BIASED=bias is not None,
            BLOCK=_REDUCE,
        )
    return out
