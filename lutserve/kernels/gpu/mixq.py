"""MixQ's activations in Triton: gather the outlier columns, quantise the rest, flag what was missed.

One row a program, two passes over it (the second finds it in the cache); nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lutserve.kernels import mixq
from lutserve.kernels.gpu import activation
from lutserve.kernels.reference import TINY

#: columns of a row that are read at once
_BLOCK = 2048
_TINY = tl.constexpr(TINY)


@triton.jit
def round_even(x):
    """Fp32 |x| < 2**22 to the nearest integer, ties to even; needs `enable_fp_fusion=False`."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def kept(x_ptr, keep_ptr, columns, k):
    """Fp32 values of a row, 0 in outlier columns and outside; columns: int32 [BLOCK]."""
    inside = columns < k
    word = tl.load(keep_ptr + columns // 32, mask=inside, other=0)
    bit = (word >> (columns % 32)) & 1
    return tl.load(x_ptr + columns, mask=inside & (bit != 0), other=0.0).to(tl.float32)


@triton.jit
def prepare_kernel(
    x_ptr,
    index_ptr,
    keep_ptr,
    codes_ptr,
    scales_ptr,
    side_ptr,
    ratios_ptr,
    worst_ptr,
    x_stride,
    k,
    slots,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `prepare`; program: a row. SLOTS: `slots` rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    lanes = tl.arange(0, BLOCK)
    peaks, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, k, BLOCK):
        x = kept(x_ptr, keep_ptr, start + lanes, k)
        peaks = tl.maximum(peaks, tl.abs(x))
        squares += x * x
    total = tl.sum(squares)
    # The maximum of a GPU passes NaN over, the sum does not.
    peak = tl.where(total != total, total, tl.max(peaks))
    inverse = tl.where(peak > _TINY, tl.div_rn(127.0, peak), 0.0)
    tl.store(scales_ptr + row, tl.where(peak <= _TINY, 0.0, tl.div_rn(peak, 127.0)))
    rms = tl.sqrt_rn(tl.div_rn(total, k + 0.0))
    ratio = tl.where((rms > _TINY) & (rms < float("inf")), tl.div_rn(peak, rms), 0.0)
    tl.store(ratios_ptr + row, ratio)
    tl.atomic_max(worst_ptr, ratio)
    for start in range(0, k, BLOCK):
        columns = start + lanes
        codes = round_even(kept(x_ptr, keep_ptr, columns, k) * inverse)
        codes = tl.minimum(tl.maximum(codes, -127.0), 127.0).to(tl.int8)
        tl.store(codes_ptr + row * k + columns, codes, mask=columns < k)
    places = tl.arange(0, SLOTS)
    column = tl.load(index_ptr + places, mask=places < slots, other=-1)
    outliers = tl.load(x_ptr + column, mask=column >= 0, other=0.0)
    tl.store(side_ptr + row * slots + places, outliers, mask=places < slots)


def prepare(x: torch.Tensor, index: torch.Tensor, keep: torch.Tensor) -> mixq.Prepared:
    """`lutserve::mixq_prepare` on a GPU."""
    codes, scales, side, ratios, worst = prepared = mixq._fake(x, index, keep)
    worst.zero_()
    (m, k), slots = x.shape, len(index)
    x = x if x.stride(1) == 1 else x.contiguous()
    if m:
        prepare_kernel[(m,)](
            x, index, keep, codes, scales, side, ratios, worst, x.stride(0), k, slots,
            SLOTS=triton.next_power_of_2(max(slots, 1)), BLOCK=_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return prepared


def gate_and_prepare(
    x: torch.Tensor, table: torch.Tensor, index: torch.Tensor, keep: torch.Tensor
) -> mixq.Gated:
    """`lutserve::mixq_gate_and_prepare` on a GPU, in two launches."""
    mixq._gate_fake(x, table, index, keep)
    product = activation.act_and_mul(x, table)
    return (product, *prepare(product, index, keep))


def add_outliers(out: torch.Tensor, side: torch.Tensor, weight: torch.Tensor) -> None:
    """`lutserve::mixq_add_outliers` on a GPU, where cuBLAS is fast for every number of rows."""
    mixq._add_fake(out, side, weight)
    out.addmm_(side, weight)
