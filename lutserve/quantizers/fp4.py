"""Weights as 4-bit floats with a scale for every group of input columns, as in "AxCore" (MICRO'25).

They are rounded to nearest. There is no zero point. In the FPMA variant quotients, and products with a scale,
are FPMA as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lutserve.errors import UserError
from lutserve.kernels.axcore_reference import BLOCK, Dequant
from lutserve.luts import fpma
from lutserve.luts.fpma import FP4, Fp4


@dataclass(frozen=True, eq=False)
class Fp4Weight:
    """A weight [N out, K in].

    codes: uint8 [N, K], sign * 8 + index of a magnitude of the block's format.
    scales: fp16 [N, K / group_size].
    types: uint8 [ceil(N / 64), K / group_size], `Fp4.type_id` of each block.
    group_size: input columns that share a scale.
    """

    codes: Tensor
    scales: Tensor
    types: Tensor
    group_size: int

    def dequantize(self) -> Tensor:
        """Return value[code] * scale, fp32 [N, K]; products of a layer are only close to those with it."""
        values = torch.tensor([fmt.values for fmt in FP4])
        kinds = self.types.repeat_interleave(BLOCK, 0)[: len(self.codes)]
        wide = kinds.repeat_interleave(self.group_size, 1).long()
        return values[wide, self.codes.long()] * self.scales.float().repeat_interleave(self.group_size, 1)


def quantize(weight: Tensor, fmt: str, group_size: int = 64, dequant: Dequant = "exact") -> Fp4Weight:
    """Round a weight to nearest in one format.

    Args:
        weight: [N, K], any floating dtype; rounded to fp16 first, as published.
        fmt: e3m0, e2m1 or e1m2.
        group_size: input columns that share a scale, a divisor of K; -1 for all K.
        dequant: how scales are computed and applied: rounded fp16 quotients, or FPMA.

    A group of zeros, or one so small that its scale is 0, has codes 0.

    Raises:
        UserError: an unknown format, groups that do not divide K, values that fp16 does not hold.

    """
    half, group = checked(weight, group_size)
    form, (n, k) = fpma.get(fmt), half.shape
    groups = half.view(n, k // group, group)
    top = groups.abs().amax(-1)
    if dequant == "fpma":
        scales = _divide(top, torch.full_like(top, form.largest))
        units = _divide(groups, scales[..., None].expand_as(groups))
    else:
        scales = top / form.largest
        units = torch.where(scales[..., None] == 0, 0.0, groups / scales[..., None])
    types = torch.full((-(-n // BLOCK), k // group), form.type_id, dtype=torch.uint8)
    return Fp4Weight(_codes(units, form).view(n, k), scales, types, group)


def checked(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
    """The weight in fp16 and the size of its groups; UserError as `quantize`."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise UserError(f"a weight has two dimensions, not shape {tuple(weight.shape)}")
    k = weight.shape[1]
    group = k if group_size == -1 else group_size
    if group < 1 or k % group:
        raise UserError(f"groups of {group_size} do not divide {k} input columns; give a divisor, or -1")
    half = weight.half()
    if not half.isfinite().all():
        raise UserError("the weight holds NaN or infinity, or values beyond the range of float16")
    return half, group


def _divide(a: Tensor, b: Tensor) -> Tensor:
    left, right = (t.contiguous().numpy().view(np.uint16) for t in (a, b))
    return torch.from_numpy(fpma.divide(left, right).view(np.float16))


def _codes(units: Tensor, fmt: Fp4) -> Tensor:
    """Codes uint8 of fp16 numbers, by a table over all of them."""
    index = units.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    return _code_table(fmt).index_select(0, index.flatten()).view(units.shape)


@cache
def _code_table(fmt: Fp4) -> Tensor:
    """The code of the nearest value to each fp16 number, uint8 [65536]; ties go to the even significand."""
    u = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    size = u.abs().clamp_max(fmt.largest)
    exponent = (torch.frexp(size).exponent - 1).clamp_min(1 - fmt.bias)
    step = torch.ldexp(torch.ones_like(u), exponent - fmt.mantissa)
    rounded = (size / step).round() * step
    index = torch.bucketize(rounded, torch.tensor(fmt.magnitudes)).to(torch.uint8)
    return torch.where(u.signbit() & (index > 0), index + 8, index)
