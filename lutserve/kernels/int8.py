"""`lutserve::int8_linear`: an int8 linear layer whose outlier columns, scales and bias are fused in."""

from __future__ import annotations

import torch

from lutserve.kernels.library import define

#: output columns that lie together in the packed weight, and input columns that are multiplied at once
COLUMNS, GROUP = 32, 4
#: longest row whose products fit an int32 sum
MOST_COLUMNS = 65536


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Return the int8 weight [N, K] as `int8_linear` reads it: uint8 [ceil(N/32), ceil(K/4), 32, 4].

    Entry [p, g, c, j] is the code of output column 32p + c and input column 4g + j, plus 128; what lies
    outside the weight is 0 and counts for nothing.
    """
    n, k = codes.shape
    panels, groups = -(-n // COLUMNS), -(-k // GROUP)
    packed = torch.zeros((panels * COLUMNS, groups * GROUP), dtype=torch.uint8)
    packed[:n, :k] = codes.view(torch.uint8) ^ 128
    return packed.view(panels, COLUMNS, groups, GROUP).transpose(1, 2).contiguous()


def columns_of(packed: torch.Tensor, columns: torch.Tensor, n: int) -> torch.Tensor:
    """Return the codes of the input columns `columns` int64 [S] of a packed weight: int8 [S, n]."""
    picked = packed[:, columns // GROUP, :, columns % GROUP]
    return (picked.flatten(1)[:, :n] ^ 128).view(torch.int8)


def _fake(
    codes: torch.Tensor,
    scales: torch.Tensor,
    packed: torch.Tensor,
    weight_scales: torch.Tensor,
    side: torch.Tensor,
    outliers: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    (m, k), (slots, n) = codes.shape, outliers.shape
    panels = -(-n // COLUMNS)
    torch._check(k <= MOST_COLUMNS, lambda: f"int8_linear: K must be at most {MOST_COLUMNS}, not {k}")
    torch._check(
        outliers.dtype in (torch.float16, torch.bfloat16) and side.dtype == outliers.dtype,
        lambda: "int8_linear: side and outliers must be both float16 or both bfloat16",
    )
    torch._check(
        scales.numel() == m
        and packed.shape == (panels, -(-k // GROUP), COLUMNS, GROUP)
        and weight_scales.numel() == panels * COLUMNS
        and side.shape == (m, slots),
        lambda: "int8_linear: tensors do not fit each other; see its documentation",
    )
    return codes.new_empty((m, n), dtype=outliers.dtype)


def _reference(
    codes: torch.Tensor,
    scales: torch.Tensor,
    packed: torch.Tensor,
    weight_scales: torch.Tensor,
    side: torch.Tensor,
    outliers: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    _fake(codes, scales, packed, weight_scales, side, outliers, bias)
    n, k = outliers.shape[1], codes.shape[1]
    weight = columns_of(packed, torch.arange(k), n)
    # float64 holds these sums exactly
    sums = codes.double() @ weight.double()
    y = sums.float() * (scales.view(-1, 1) * weight_scales[:n]) + side.float() @ outliers.float()
    return (y if bias is None else y + bias.float()).to(outliers.dtype)


linear = define(
    "int8_linear(Tensor codes, Tensor scales, Tensor packed, Tensor weight_scales, Tensor side, "
    "Tensor outliers, Tensor? bias) -> Tensor",
    _reference,
    _fake,
)
"""Return codes @ weight^T * scales * weight_scales + side @ outliers + bias, rounded once, [M, N].

codes: int8 [M, K], K at most 65536. scales: float32 [M] or [M, 1]. packed: uint8, see `pack`.
weight_scales: float32 [N rounded up to a multiple of 32]. side: [M, S], outliers: [S, N] and bias: [N] or
None, all float16 or all bfloat16, which is the result's dtype. S may be 0. All contiguous.
The int8 sums are exact for all codes, -128 included (`quantize_rows` makes none); the rest is fp32 in any
order. RuntimeError if the arguments are not so.
"""


def _rows_fake(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    side: torch.Tensor,
    outliers: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    (m, k), (slots, n) = codes.shape, outliers.shape
    torch._check(k <= MOST_COLUMNS, lambda: f"int8_linear_rows: K must be at most {MOST_COLUMNS}, not {k}")
    torch._check(
        outliers.dtype in (torch.float16, torch.bfloat16)
        and side.dtype == outliers.dtype
        and (bias is None or bias.dtype == outliers.dtype),
        lambda: "int8_linear_rows: side, outliers and bias must be all float16 or all bfloat16",
    )
    torch._check(
        codes.dtype == weight.dtype == torch.int8
        and weight.shape == (n, k)
        and scales.numel() == m
        and weight_scales.numel() == n
        and side.shape == (m, slots)
        and (bias is None or bias.shape == (n,)),
        lambda: "int8_linear_rows: tensors do not fit each other; see its documentation",
    )
    return codes.new_empty((m, n), dtype=outliers.dtype)


def _rows_reference(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    side: torch.Tensor,
    outliers: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    _rows_fake(codes, scales, weight, weight_scales, side, outliers, bias)
    # float64 holds these sums exactly
    sums = (codes.double() @ weight.double().t()).float()
    y = sums * (scales.view(-1, 1) * weight_scales.view(1, -1)) + side.float() @ outliers.float()
    return (y if bias is None else y + bias.float()).to(outliers.dtype)


linear_rows = define(
    "int8_linear_rows(Tensor codes, Tensor scales, Tensor weight, Tensor weight_scales, Tensor side, "
    "Tensor outliers, Tensor? bias) -> Tensor",
    _rows_reference,
    _rows_fake,
)
"""`int8_linear` over a weight that lies by rows, as GPUs read it: int8 [N, K] with weight_scales float32 [N].

The other arguments, the result and the errors are those of `int8_linear`.
"""
