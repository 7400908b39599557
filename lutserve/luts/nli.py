"""Non-uniform linear interpolation (NLI) tables; arXiv 2602.02988. numpy only.

Eleven cut points make ten segments. The first and the last are one linear piece each, the eight between
hold n equal pieces each, so a table has 8n + 3 fp32 samples. Every step below is one fp32 (or, where it
says so, fp16) operation rounded to nearest even, never fused, so the result is the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from lutserve.luts.bits import F32, PATTERNS, U16, Format, decode, encode
from lutserve.luts.functions import FUNCTIONS, Function

POINTS = (2, 4, 16, 32)
_FINEST = POINTS[-1]
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class Table:
    """An interpolation table with n points an inner segment.

    cuts: fp32 [11], values of fp16. scales: fp32 [10], values of fp16, pieces per unit of x.
    grid: fp32 [8n + 3], where the function was sampled. samples: fp32 [8n + 3].
    """

    points: int
    cuts: F32
    scales: F32
    grid: F32
    samples: F32

    def __call__(self, x: F32) -> npt.NDArray[np.float16]:
        """Interpolate at x, fp32 of any shape holding fp16 values; the result in fp16, same shape."""
        n = self.points
        segment = np.clip(np.searchsorted(self.cuts, x, side="right") - 1, 0, 9)
        inner = (segment > 0) & (segment < 9)
        last = np.where(inner, n, 1)
        base = np.where(inner, 1 + (segment - 1) * n, np.where(segment == 0, 0, 8 * n + 1))
        # inf - inf and NaN occur here; both ends are overwritten below and NaN is meant to pass through.
        with np.errstate(invalid="ignore"):
            position = (x - self.cuts[segment]) * self.scales[segment]
            floor = np.floor(position)
            # A scale rounded upwards lets the position reach n: there the piece is flat.
            piece = np.nan_to_num(np.clip(floor, 0, last), nan=0.0).astype(np.intp)
            left = self.samples[base + piece]
            right = self.samples[base + np.minimum(piece + 1, last)]
            y = (right - left) * (position - floor) + left
        y = np.where(x <= self.cuts[0], self.samples[0], y)
        y = np.where(x >= self.cuts[10], self.samples[-1], y)
        return np.clip(y, np.float32(-_FP16_MAX), np.float32(_FP16_MAX)).astype(np.float16)


def _grid(cuts: F32, n: int) -> F32:
    """Abscissae of the 8n + 3 samples, fp32; exact for every n in POINTS."""
    inner = cuts[1:9, None] + np.arange(n, dtype=np.float32) * (cuts[2:10] - cuts[1:9])[:, None] / np.float32(
        n
    )
    return np.concatenate([cuts[:1], inner.ravel(), cuts[9:]])


def _scales(cuts: F32, n: int) -> F32:
    """Pieces per unit of x in each segment, rounded to fp16 three times: width, reciprocal, product."""
    wide = cuts.astype(np.float64)  # float64 holds each exact result, so every rounding is a single one
    width = (wide[1:] - wide[:-1]).astype(np.float16).astype(np.float64)
    reciprocal = (1.0 / width).astype(np.float16).astype(np.float64)
    pieces = np.array([1, *[n] * 8, 1], dtype=np.float64)
    return (pieces * reciprocal).astype(np.float16).astype(np.float32)


def _samples(function: Function, grid: F32, n: int) -> F32:
    """Values on the grid, fp32: the published ones if there are any, else `exact` rounded once."""
    if function.samples is None:
        values = np.array([function.exact(float(g)) for g in grid])
    else:
        finest = np.array(function.samples.split(), dtype=np.float64)
        values = np.concatenate([finest[:1], finest[1 : -2 : _FINEST // n], finest[-2:]])
    return np.clip(values, -_FP16_MAX, _FP16_MAX).astype(np.float32)


@cache
def table(name: str, n: int) -> Table:
    """Interpolation table of the function `name` (a key of FUNCTIONS) with n in POINTS."""
    function = FUNCTIONS[name]
    cuts = np.array(function.cuts, dtype=np.float64).astype(np.float16).astype(np.float32)
    grid = _grid(cuts, n)
    return Table(n, cuts, _scales(cuts, n), grid, _samples(function, grid, n))


def patterns(name: str, n: int, fmt: Format) -> U16:
    """Output bit pattern for every input bit pattern of `fmt`: uint16 [65536].

    The input is clamped in its own format (activations only) and rounded to fp16; the fp16 output is
    rounded to `fmt`. So a bf16 table carries both roundings, as the published method does for bf16 tensors.
    """
    interpolate = table(name, n)
    x = decode(PATTERNS, fmt)
    if FUNCTIONS[name].clamp:
        low, high = decode(encode(interpolate.cuts[[0, 10]], fmt), fmt)
        x = np.clip(x, low, high)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        x = x.astype(np.float16).astype(np.float32)
    return encode(interpolate(x), fmt)
