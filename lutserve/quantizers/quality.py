"""How well a format fits data: the signal-to-noise ratio after rounding to nearest."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lutserve.formats import Codebook
from lutserve.quantizers.rtn import rtn

#: degrees of freedom of Student's t behind each name; None is the normal distribution
DISTRIBUTIONS: dict[str, float | None] = {"normal": None, "t5": 5.0, "t3": 3.0}
_SHAPE = (1024, 256)


def sqnr(exact: Tensor, rounded: Tensor) -> float:
    """Signal-to-quantisation-noise ratio in dB: 10 log10(sum x^2 / sum (x - q)^2); inf if nothing is lost."""
    exact = exact.double()
    noise = float((rounded.double() - exact).square_().sum())
    signal = float(exact.square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def sqnr_on(distribution: str, codebook: Codebook, group_size: int = 128) -> float:
    """SQNR in dB of a format on 262,144 random numbers, the same ones every time.

    Args:
        distribution: a key of DISTRIBUTIONS.
        codebook: the format.
        group_size: numbers that share a scale, a divisor of 256.

    """
    data = _data()[distribution]
    return sqnr(data, rtn(data, codebook, group_size).dequantize())


@cache
def _data() -> dict[str, Tensor]:
    random = np.random.default_rng(1)
    # One generator for all of them, in this order: published figures can then be compared to the digit.
    drawn = {
        name: random.standard_normal(_SHAPE) if nu is None else random.standard_t(nu, _SHAPE)
        for name, nu in DISTRIBUTIONS.items()
    }
    return {name: torch.from_numpy(values.astype(np.float32)) for name, values in drawn.items()}
