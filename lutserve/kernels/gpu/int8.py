"""`lutserve::int8_linear_rows` in Triton: an integer GEMM that ends with outlier columns, scales and bias.

For few rows, where one launch and one read of the weight are what counts; `quant_methods.int8_gemm` takes
vLLM's CUTLASS GEMM for many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lutserve.kernels import int8

#: input columns, and outlier columns, that are multiplied at once
_STEP, _SLOTS = 128, 32


@triton.jit
def int8_linear_rows_kernel(
    codes_ptr,
    scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    side_ptr,
    outliers_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    slots,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """See `lutserve::int8_linear_rows`; program: a tile [ROWS, COLUMNS] of the result."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, STEP)
    x_ptr = codes_ptr + rows.to(tl.int64)[:, None] * k + lanes[None, :]
    w_ptr = weight_ptr + columns.to(tl.int64)[None, :] * k + lanes[:, None]
    row_in, column_in = rows[:, None] < m, columns[None, :] < n
    sums = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, k, STEP):
        inside = start + lanes < k
        x = tl.load(x_ptr + start, row_in & inside[None, :], 0)
        w = tl.load(w_ptr + start, column_in & inside[:, None], 0)
        sums = tl.dot(x, w, sums)
    scale = tl.load(scales_ptr + rows, rows < m, 0.0)[:, None]
    y = sums.to(tl.float32) * (scale * tl.load(weight_scales_ptr + columns, columns < n, 0.0)[None, :])
    for start in range(0, slots, SLOTS):
        s = start + tl.arange(0, SLOTS)
        x = tl.load(side_ptr + rows[:, None] * slots + s[None, :], row_in & (s < slots)[None, :], 0.0)
        w = tl.load(outliers_ptr + s[:, None] * n + columns[None, :], column_in & (s < slots)[:, None], 0.0)
        y = tl.dot(x, w, y)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, columns < n, 0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), row_in & column_in)


def linear_rows(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    side: torch.Tensor,
    outliers: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`lutserve::int8_linear_rows` on a GPU."""
    out = int8._rows_fake(codes, scales, weight, weight_scales, side, outliers, bias)
    (m, n), (k, slots) = out.shape, (codes.shape[1], side.shape[1])
    rows, columns = _tile(m)
    if m:
        int8_linear_rows_kernel[(triton.cdiv(n, columns), triton.cdiv(m, rows))](
            codes, scales, weight, weight_scales, side, outliers, bias, out, m, n, k, slots,
            ROWS=rows, COLUMNS=columns, STEP=_STEP, SLOTS=_SLOTS,
            num_warps=4, num_stages=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _tile(m: int) -> tuple[int, int]:
    """Rows and columns of a tile of the result: narrow for few rows, so that all of the GPU reads weights."""
    return (16, 32) if m <= 16 else (32, 64) if m <= 32 else (64, 64)
