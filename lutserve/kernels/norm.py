"""Norms whose `1 / sqrt` is a table with exponent range reduction: RMSNorm, RMSNorm of a sum, LayerNorm.

Mean squares of real models run from 1e-3 to over 1e6, wider than any 16-bit table. So v = mean + eps is
rounded to eleven bits, v = m * 4**e with m in [1, 4), and r = table[m] * 2**-e: the 2,048 entries of
[1, 4) serve every v. 0 gives inf, inf gives 0, NaN gives NaN, as the exact function does.

Sums run in fp32 in one fixed order, so every backend gives the same bits: columns c, c + 64, c + 128, ...
are added one after another, then the 64 sums are halved six times (i with i + 32, then i + 16, ...).
"""

from __future__ import annotations

import torch

from lutserve.kernels.library import define

_STRIPE = 64


def total(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension of fp32 [..., n] in the documented order; [..., 1]."""
    stripes = torch.nn.functional.pad(x, (0, -x.shape[-1] % _STRIPE)).unflatten(-1, (-1, _STRIPE))
    lanes = torch.zeros_like(stripes[..., 0, :])
    for stripe in stripes.unbind(-2):
        lanes = lanes + stripe
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, dim=-1)
        lanes = low + high
    return lanes


def rsqrt(v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(v) of fp32 v by the table, float16 [65536] indexed by bit pattern; fp32 of v's shape."""
    tiny = v < torch.finfo(torch.float32).tiny
    word = torch.where(tiny, v * 2.0**24, v).contiguous().view(torch.int32)
    word = (word + 0xFFF + ((word >> 13) & 1)) >> 13
    exponent = (word >> 10) - 127
    entry = table[((15 + (exponent & 1)) << 10) | (word & 0x3FF)].float()
    scale = ((127 - (exponent >> 1)) << 23).view(torch.float32)
    root = entry * torch.where(tiny, scale * 2.0**12, scale)
    root = torch.where(v == torch.inf, 0.0, root)
    return torch.where(v > 0, root, torch.where(v == 0, torch.inf, torch.nan))


def _check(
    x: torch.Tensor, table: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None = None
) -> None:
    torch._check(
        x.dtype in (torch.float16, torch.bfloat16),
        lambda: f"norm: x must be float16 or bfloat16, not {x.dtype}",
    )
    torch._check(
        x.dim() >= 1 and x.shape[-1] > 0,
        lambda: f"norm: x must be [..., columns], columns > 0, not {tuple(x.shape)}",
    )
    torch._check(
        table.dtype == torch.float16 and table.shape == (65536,) and table.is_contiguous(),
        lambda: "norm: table must be a contiguous float16 [65536]",
    )
    for v in (weight, bias):
        torch._check(
            v is None
            or (v.dtype in (x.dtype, torch.float32) and v.shape == (x.shape[-1],) and v.is_contiguous()),
            lambda: "norm: weight and bias must be contiguous [columns], of x's dtype or float32",
        )


def _fake(x: torch.Tensor, weight: torch.Tensor | None, table: torch.Tensor, eps: float) -> torch.Tensor:
    _check(x, table, weight)
    return x.new_empty(x.shape)


def _scaled(
    x: torch.Tensor, weight: torch.Tensor | None, table: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """RMSNorm of fp32 x, rounded to `dtype` as vLLM rounds it."""
    x = x * rsqrt(total(x * x) / x.shape[-1] + eps, table)
    return (x if weight is None else x.to(weight.dtype) * weight).to(dtype)


def _reference(x: torch.Tensor, weight: torch.Tensor | None, table: torch.Tensor, eps: float) -> torch.Tensor:
    _check(x, table, weight)
    return _scaled(x.float(), weight, table, eps, x.dtype).contiguous()


rms_norm = define(
    "lut_rms_norm(Tensor x, Tensor? weight, Tensor table, float eps) -> Tensor", _reference, _fake
)
"""x * r * weight with r = rsqrt(mean(x**2) + eps) by the table.

x: [..., columns], float16 or bfloat16. weight: [columns] or None. table: float16 [65536].
Roundings are those of vLLM's RMSNorm: x * r in fp32; then, where the weight is of x's dtype, rounded to it
before the product; the product rounded to x's dtype. A float32 weight (Gemma's 1 + w) has only the last.
Returns a new contiguous tensor of x's shape and dtype. RuntimeError if the arguments are not so.
"""


def _add_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, table: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, table, weight)
    torch._check(
        residual.dtype == x.dtype and residual.shape == x.shape,
        lambda: "norm: residual must have x's shape and dtype",
    )
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _add_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, table: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    _add_fake(x, residual, weight, table, eps)
    added = x.float() + residual.float()
    return _scaled(added, weight, table, eps, x.dtype).contiguous(), added.to(x.dtype).contiguous()


add_rms_norm = define(
    "lut_add_rms_norm(Tensor x, Tensor residual, Tensor? weight, Tensor table, float eps)"
    " -> (Tensor, Tensor)",
    _add_reference,
    _add_fake,
)
"""`lut_rms_norm` of the fp32 sum x + residual, and that sum rounded to x's dtype: the next residual.

residual: as x, which it does not change. The norm reads the sum before it is rounded, as vLLM's does.
"""


def _layer_fake(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, table: torch.Tensor, eps: float
) -> torch.Tensor:
    _check(x, table, weight, bias)
    return x.new_empty(x.shape)


def _layer_reference(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, table: torch.Tensor, eps: float
) -> torch.Tensor:
    _check(x, table, weight, bias)
    centred = x.float() - total(x.float()) / x.shape[-1]
    y = centred * rsqrt(total(centred * centred) / x.shape[-1] + eps, table)
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).contiguous()


layer_norm = define(
    "lut_layer_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor table, float eps) -> Tensor",
    _layer_reference,
    _layer_fake,
)
"""(x - mean) * r * weight + bias with r = rsqrt(mean((x - mean)**2) + eps) by the table.

Two passes (no difference of large squares), every step in fp32, one rounding at the end to x's dtype.
Arguments, result and errors as `lut_rms_norm`.
"""
