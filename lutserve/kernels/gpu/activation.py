"""Activations as one gather on a GPU. The table's 128 KiB stay in the L1 caches, shared by all warps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lutserve.kernels import activation
from lutserve.kernels.gpu import floats

_BLOCK, _WARPS = 1024, 4


@triton.jit
def act_and_mul_kernel(x, table, out, width, row_stride, BLOCK: tl.constexpr):
    """Write table[bits(gate)] * up of one row's BLOCK columns. x: [M, 2 width], out: [M, width]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x + row * row_stride + column, mask=inside)
    up = tl.load(x + row * row_stride + width + column, mask=inside)
    entry = tl.load(table + gate.to(tl.uint16, bitcast=True).to(tl.int32))
    # A product of two 16-bit floats fits into fp32, so it is rounded once.
    product = floats.widen(entry) * floats.widen(up)
    tl.store(out + row * width + column, floats.narrow(product, x.dtype.element_ty), mask=inside)


@triton.jit
def unary_kernel(x, table, out, length, BLOCK: tl.constexpr):
    """Write table[bits(x)] of BLOCK elements of a flat tensor."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(x + place, mask=place < length).to(tl.uint16, bitcast=True)
    tl.store(out + place, tl.load(table + bits.to(tl.int32)), mask=place < length)


def act_and_mul(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`lutserve::act_and_mul` on a GPU."""
    out = activation._fake(x, table)
    if out.numel():
        width = out.shape[-1]
        flat = x.reshape(-1, 2 * width)
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        grid = (len(flat), triton.cdiv(width, _BLOCK))
        act_and_mul_kernel[grid](flat, table, out, width, flat.stride(0), BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def unary(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`lutserve::lut_unary` on a GPU."""
    out = activation._unary_fake(x, table)
    if out.numel():
        grid = (triton.cdiv(out.numel(), _BLOCK),)
        unary_kernel[grid](x.contiguous(), table, out, out.numel(), BLOCK=_BLOCK, num_warps=_WARPS)
    return out
