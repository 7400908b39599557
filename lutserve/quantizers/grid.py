"""Groups of columns, and the scale of each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lutserve import formats
from lutserve.errors import UserError
from lutserve.formats import Codebook

Scheme = Literal["sym", "asym"]


def check(fmt: str | Codebook, scheme: str = "sym", full_range: bool = False) -> Codebook:
    """Return the format; UserError for a scheme that it does not have."""
    codebook = formats.get(fmt) if isinstance(fmt, str) else fmt
    if scheme not in ("sym", "asym"):
        raise UserError(f"unknown scheme {scheme!r}; allowed: sym, asym")
    if not codebook.integer and (scheme == "asym" or full_range):
        wanted = "scheme asym" if scheme == "asym" else "full range"
        raise UserError(f"{codebook.name} has no {wanted}: its values are fixed; allowed for int2 to int8")
    if scheme == "asym" and full_range:
        raise UserError("full range is a choice of the symmetric scheme; asym always uses all codes")
    return codebook


def effective_group(group_size: int, k: int) -> int:
    """Columns in a group: `group_size`, or all k of them for -1 and where there are fewer."""
    if group_size != -1 and group_size < 1:
        raise UserError(f"group size {group_size}; allowed: 1 or more, or -1 for one group a row")
    return k if group_size == -1 else min(group_size, k)


def grouped(x: Tensor, group: int) -> Tensor:
    """View or copy of x [R, K] as [R, ceil(K / group), group].

    A short last group is filled up with its own last column, which changes no maximum or minimum.
    """
    rows, k = x.shape
    missing = -k % group
    if missing:
        x = torch.cat([x, x[:, -1:].expand(rows, missing)], dim=1)
    return x.reshape(rows, -1, group)


def scales(
    groups: Tensor,
    codebook: Codebook,
    scheme: Scheme = "sym",
    full_range: bool = False,
    quantile: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Scale and, for `asym`, zero point of each group; round to nearest and activations.

    Args:
        groups: fp32 [..., g], one group in the last dimension.
        codebook: the format.
        scheme: sym, or asym for integers.
        full_range: int only: the largest magnitude takes the lowest code, so all codes are used.
        quantile: factor on the range; below 1 the ends are clipped.

    Returns:
        fp32 tensors [...]. A codebook's group of zeros has scale 0.

    """
    low, high = groups.amin(-1), groups.amax(-1)
    if scheme == "asym":
        return _affine(low.clamp(max=0) * quantile, high.clamp(min=0) * quantile, codebook)
    absmax = torch.maximum(high, -low)
    if not codebook.integer:
        return absmax * quantile / codebook.divisor, None
    empty = absmax == 0
    absmax = torch.where(empty, torch.ones_like(absmax), absmax) * quantile
    if not full_range:
        return absmax / codebook.divisor, None
    scale = absmax / -codebook.values[0]
    return torch.where(high.abs() > low.abs(), -scale, scale), None


def gptq_scales(groups: Tensor, codebook: Codebook, scheme: Scheme = "sym") -> tuple[Tensor, Tensor | None]:
    """The same as GPTQ takes them: symmetric integers span 2 * absmax in 2**bits - 1 steps."""
    low, high = groups.amin(-1), groups.amax(-1)
    if scheme == "asym":
        return _affine(low.clamp(max=0), high.clamp(min=0), codebook)
    absmax = torch.maximum(high, -low)
    if codebook.integer:
        absmax = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
    return absmax / codebook.gptq_divisor, None


def _affine(low: Tensor, high: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
    empty = (low == 0) & (high == 0)
    low = torch.where(empty, -torch.ones_like(low), low)
    high = torch.where(empty, torch.ones_like(high), high)
    scale = (high - low) / (len(codebook.values) - 1)
    return scale, torch.round(-low / scale)
