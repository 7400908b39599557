"""Executable specifications: what a method computes, in plain torch, without regard to speed.

Those of MixQ and AxCore are in modules of their own.
"""

from __future__ import annotations

import torch

from lutserve.kernels.axcore_reference import axcore_linear
from lutserve.kernels.mixq_reference import MixqLinear

__all__ = ["TINY", "MixqLinear", "axcore_linear", "quantize_rows"]


def quantize_rows(x: torch.Tensor, levels: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """Served row quantisation to int8: fp32 scale max|x| / levels, ties to even, clamped to +-levels.

    Args:
        x: [M, K], any float dtype.
        levels: 127 (8 bit) or 7 (4 bit).

    Returns:
        codes int8 [M, K] and scales fp32 [M]; a row of zeros gives codes 0 and scale 0.

    """
    wide = x.float()
    peak = wide.abs().amax(1, keepdim=True)
    # Tensor by tensor: a Python number divided by a tensor is a product with the rounded reciprocal.
    inverse = torch.where(peak > TINY, torch.full_like(peak, levels) / peak, 0.0)
    codes = (wide * inverse).round().clamp(-levels, levels)
    return codes.to(torch.int8), torch.where(peak <= TINY, 0.0, peak / levels)[:, 0]


#: rows whose largest value is below this are zero: 127 / peak would leave fp32's range
TINY = 1e-30
