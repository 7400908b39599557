"""AxCore's layers on a GPU in the published order of sums, to the last bit: for studies, not for speed.

A thread keeps the fp16 sums of its outputs and adds product after product; programs never share a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lutserve.kernels import axcore as op
from lutserve.luts import fpma

_BIAS: tl.constexpr = tl.constexpr(fpma.BIAS["float16"])
_BLOCK_N, _WARPS = 64, 4


@triton.jit
def multiply(a, b, compensation):
    """FPMA of two fp16 tensors, as integers: see `lutserve.luts.fpma`."""
    left = a.to(tl.uint16, bitcast=True).to(tl.int32)
    right = b.to(tl.uint16, bitcast=True).to(tl.int32)
    n = tl.maximum((left & 0x7FFF) + (right & 0x7FFF) - _BIAS + compensation, 0) & 0x7FFF
    zero = ((left & 0x7FFF) == 0) | ((right & 0x7FFF) == 0)
    bits = tl.where(zero, 0, n | ((left ^ right) & 0x8000))
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def strict_kernel(
    x,
    packed,
    scales,
    types,
    products,
    bias,
    out,
    m_size,
    n_size,
    octets,
    group_octets,
    row_stride,
    TYPED: tl.constexpr,
    FPMA: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write a tile of `axcore_reference.strict`; products: fp16 [T, 65536, 16]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_n, inside_m = n < n_size, m < m_size
    panel, lane = n // 32, n % 32
    groups = octets // group_octets
    rows = x + m.to(tl.int64) * row_stride
    words = packed + panel.to(tl.int64) * octets * 32 + lane
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(groups):
        table = products + tl.zeros((BLOCK_N,), tl.int32)
        if TYPED:
            kind = tl.load(types + panel * groups + group, mask=inside_n, other=0)
            table = products + kind.to(tl.int32) * (65536 * 16)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float16)
        for octet in range(group * group_octets, (group + 1) * group_octets):
            word = tl.load(words + octet * 32, mask=inside_n, other=0)
            for column in tl.static_range(8):
                # Nibbles lie in the order of columns 0 2 4 6 1 3 5 7.
                code = word >> (4 * (column // 2 + column % 2 * 4)) & 15
                value = tl.load(rows + octet * 8 + column, mask=inside_m, other=0)
                place = value.to(tl.uint16, bitcast=True).to(tl.int32) * 16
                sums += tl.load(table[None, :] + (place[:, None] + code[None, :]))
        scale = tl.load(scales + (panel * groups + group) * 32 + lane, mask=inside_n, other=0)[None, :]
        if FPMA:
            # On the published hardware NaN is a pattern like others, this one.
            nan = tl.full((BLOCK_M, BLOCK_N), 0x7FFF, tl.int16).to(tl.float16, bitcast=True)
            total += multiply(tl.where(sums != sums, nan, sums), scale, 0).to(tl.float32)
        else:
            total += (sums * scale).to(tl.float32)
    result = total.to(tl.float16)
    if BIASED:
        result += tl.load(bias + n, mask=inside_n, other=0)[None, :]
    place = m.to(tl.int64)[:, None] * n_size + n[None, :]
    tl.store(out + place, result, mask=inside_m[:, None] & inside_n[None, :])


@triton.jit
def uniform_kernel(
    x,
    weight,
    bias,
    out,
    m_size,
    n_size,
    k_size,
    row_stride,
    compensation,
    tile,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write a tile of `axcore_reference.uniform`, which sums `tile` input columns in fp16."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_n, inside_m = n < n_size, m < m_size
    rows = x + m.to(tl.int64) * row_stride
    columns = weight + (n // 32).to(tl.int64) * k_size * 32 + n % 32
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, k_size, tile):
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float16)
        for k in range(first, tl.minimum(first + tile, k_size)):
            a = tl.load(rows + k, mask=inside_m, other=0)
            b = tl.load(columns + k * 32, mask=inside_n, other=0)
            sums += multiply(a[:, None], b[None, :], compensation)
        total += sums.to(tl.float32)
    result = total.to(tl.float16)
    if BIASED:
        result += tl.load(bias + n, mask=inside_n, other=0)[None, :]
    place = m.to(tl.int64)[:, None] * n_size + n[None, :]
    tl.store(out + place, result, mask=inside_m[:, None] & inside_n[None, :])


def _rows_of_a_tile(m: int) -> int:
    return min(16, triton.next_power_of_2(m))


def axcore_strict(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    types: torch.Tensor | None,
    products: torch.Tensor,
    group_size: int,
    n: int,
    fpma_dequant: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`lutserve::axcore_strict` on a GPU."""
    out = op._fake(x, packed, scales, types, products, group_size, n, fpma_dequant, bias)
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    m, block_m = len(x), _rows_of_a_tile(len(x))
    strict_kernel[triton.cdiv(n, _BLOCK_N), triton.cdiv(m, block_m)](
        x,
        packed.view(torch.int32),
        scales,
        types,
        products,
        bias,
        out,
        m,
        n,
        x.shape[1] // 8,
        group_size // 8,
        x.stride(0),
        TYPED=types is not None,
        FPMA=fpma_dequant,
        BIASED=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK_N,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return out


def fpma_linear(
    x: torch.Tensor, weight: torch.Tensor, compensation: int, tile: int, n: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """`lutserve::fpma_linear` on a GPU."""
    out = op._uniform_fake(x, weight, compensation, tile, n, bias)
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    m, block_m = len(x), _rows_of_a_tile(len(x))
    uniform_kernel[triton.cdiv(n, _BLOCK_N), triton.cdiv(m, block_m)](
        x,
        weight,
        bias,
        out,
        m,
        n,
        x.shape[1],
        x.stride(0),
        compensation,
        tile,
        BIASED=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK_N,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return out
