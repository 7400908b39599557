"""Norms by a table in Triton, summed in the order that `kernels.norm` fixes: the CPU's results, bit for bit.

That order is 64 lanes wide, so a row is the work of one warp; there are many rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lutserve.kernels import norm

#: columns that are normed at once
_BLOCK = 1024
_STRIPE = tl.constexpr(norm._STRIPE)


@triton.jit
def value_of(x_ptr, residual_ptr, columns, width):
    """Fp32 x or x + residual of some columns, 0 outside."""
    x = tl.load(x_ptr + columns, columns < width, 0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + columns, columns < width, 0.0).to(tl.float32)
    return x


@triton.jit
def halved(lanes):
    """Add the second half of lanes to the first."""
    return tl.sum(lanes.reshape(2, lanes.shape[0] // 2), 0)


@triton.jit
def total_of(x_ptr, residual_ptr, mean, width, SQUARES: tl.constexpr):
    """Fp32 [1], the sum of x, or of (x - mean)**2, in the documented order."""
    lanes = tl.zeros([_STRIPE], tl.float32)
    for start in tl.range(0, width, _STRIPE, loop_unroll_factor=8):
        columns = start + tl.arange(0, _STRIPE)
        x = value_of(x_ptr, residual_ptr, columns, width)
        if SQUARES:
            x = tl.where(columns < width, x - mean, 0.0)
            x = x * x
        lanes += x
    for _ in tl.static_range(6):
        lanes = halved(lanes)
    return lanes


@triton.jit
def rsqrt_of(v, table_ptr):
    """See `kernels.norm.rsqrt`."""
    tiny = v < 1.1754943508222875e-38
    word = tl.where(tiny, v * 16777216.0, v).to(tl.int32, bitcast=True)
    word = (word + 0xFFF + ((word >> 13) & 1)) >> 13
    exponent = (word >> 10) - 127
    entry = tl.load(table_ptr + (((15 + (exponent & 1)) << 10) | (word & 0x3FF))).to(tl.float32)
    scale = ((127 - (exponent >> 1)) << 23).to(tl.float32, bitcast=True)
    root = entry * tl.where(tiny, scale * 4096.0, scale)
    root = tl.where(v == float("inf"), 0.0, root)
    return tl.where(v > 0, root, tl.where(v == 0, float("inf"), float("nan")))


@triton.jit
def norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    table_ptr,
    out_ptr,
    sum_ptr,
    width,
    eps,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm one row of contiguous tensors, centred for LayerNorm; sum_ptr: where x + residual goes."""
    row = tl.program_id(0).to(tl.int64) * width
    x_ptr += row
    if residual_ptr is not None:
        residual_ptr += row
    n = width + tl.zeros([1], tl.float32)
    mean = tl.zeros([1], tl.float32)
    if CENTRED:
        mean = tl.div_rn(total_of(x_ptr, residual_ptr, mean, width, False), n)
    root = rsqrt_of(tl.div_rn(total_of(x_ptr, residual_ptr, mean, width, True), n) + eps, table_ptr)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = value_of(x_ptr, residual_ptr, columns, width)
        if residual_ptr is not None:
            tl.store(sum_ptr + row + columns, x.to(DTYPE), inside)
        y = (x - mean) * root if CENTRED else x * root
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + columns, inside)
            if not CENTRED:
                y = y.to(weight.dtype).to(tl.float32)
            y = y * weight.to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + columns, inside).to(tl.float32)
        tl.store(out_ptr + row + columns, y.to(DTYPE), inside)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    eps: float,
    centred: bool,
    out: torch.Tensor,
    total: torch.Tensor | None = None,
) -> None:
    if x.numel():
        width = x.shape[-1]
        residual = None if residual is None else residual.contiguous()
        norm_kernel[(x.numel() // width,)](
            x.contiguous(), residual, weight, bias, table, out, total, width, eps,
            CENTRED=centred, BLOCK=_BLOCK, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, table: torch.Tensor, eps: float) -> torch.Tensor:
    """`lutserve::lut_rms_norm` on a GPU."""
    out = norm._fake(x, weight, table, eps)
    _launch(x, None, weight, None, table, eps, False, out)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, table: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lutserve::lut_add_rms_norm` on a GPU."""
    out, total = norm._add_fake(x, residual, weight, table, eps)
    _launch(x, residual, weight, None, table, eps, False, out, total)
    return out, total


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, table: torch.Tensor, eps: float
) -> torch.Tensor:
    """`lutserve::lut_layer_norm` on a GPU."""
    out = norm._layer_fake(x, weight, bias, table, eps)
    _launch(x, None, weight, bias, table, eps, True, out)
    return out
