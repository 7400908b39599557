"""How well a format fits data: the signal-to-noise ratio after rounding to nearest."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lutserve.formats import Codebook
from lutserve.quantizers.rtn import rtn

#: random data: normal, Student's t with 5 and 3 degrees of freedom, and one with 5 behind a ReLU
DISTRIBUTIONS = ("normal", "t5", "t3", "relu_t5")
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
        distribution: one of DISTRIBUTIONS.
        codebook: the format.
        group_size: numbers that share a scale, a divisor of 256.

    """
    data = _data()[distribution]
    return sqnr(data, rtn(data, codebook, group_size).dequantize())


@cache
def _data() -> dict[str, Tensor]:
    random = np.random.default_rng(1)
    # One generator for all of them, in this order: published figures can then be compared to the digit.
    drawn = [random.standard_normal(_SHAPE), *(random.standard_t(nu, _SHAPE) for nu in (5, 3, 5))]
    drawn[3] = np.maximum(drawn[3], 0)
    return {
        name: torch.from_numpy(values.astype(np.float32))
        for name, values in zip(DISTRIBUTIONS, drawn, strict=True)
    }
