"""Non-uniform linear interpolation (NLI) tables; arXiv 2602.02988. numpy only.

Eleven cut points make ten segments. The first and the last are one linear piece each, the eight between
hold n equal pieces each, so a table has 8n + 3 fp32 samples. Every step below is one fp32 (or, where it
says so, fp16) operation rounded to nearest even, never fused, so the result is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from lutserve.luts.bits import F32, PATTERNS, U16, Format, decode, encode
from lutserve.luts.functions import FUNCTIONS, Function

F64 = npt.NDArray[np.float64]

POINTS = (2, 4, 16, 32)
"""Points a segment of the tables that a name alone asks for (`nli-4`)."""
FILE_POINTS = (1, 2, 4, 8, 16, 32, 64)
"""Points a segment that a table file may have."""
Scales = Literal["float16", "float32"]
SCALES: tuple[Scales, ...] = get_args(Scales)
CUTS = 11
_FINEST = POINTS[-1]
_FP16_MAX = 65504.0
_PIECES = (1, *[0] * 8, 1)


@dataclass(frozen=True)
class Table:
    """An interpolation table with n points an inner segment.

    function: name of what it approximates. points: n.
    cuts: fp32 [11], values of fp16. scales: fp32 [10], pieces per unit of x.
    grid: fp32 [8n + 3], where the function was sampled. samples: fp32 [8n + 3].
    """

    function: str
    points: int
    cuts: F32
    scales: F32
    grid: F32
    samples: F32

    def interpolate(self, x: F32) -> F32:
        """Interpolate at x, fp32 of any shape; the result in fp32, same shape."""
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
        return np.where(x >= self.cuts[10], self.samples[-1], y)

    def __call__(self, x: F32) -> npt.NDArray[np.float16]:
        """Interpolate at x, fp32 of any shape holding fp16 values; the result in fp16, same shape."""
        limit = np.float32(_FP16_MAX)
        return np.clip(self.interpolate(x), -limit, limit).astype(np.float16)

    def patterns(self, fmt: Format, clamp: bool) -> U16:
        """Output bit pattern for every input bit pattern of `fmt`: uint16 [65536].

        The input is clamped in its own format (`clamp`; activations only) and rounded to fp16; the fp16
        output is rounded to `fmt`. So a bf16 table carries both roundings, as the published method does for
        bf16 tensors.
        """
        x = decode(PATTERNS, fmt)
        if clamp:
            low, high = decode(encode(self.cuts[[0, 10]], fmt), fmt)
            x = np.clip(x, low, high)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            x = x.astype(np.float16).astype(np.float32)
        return encode(self(x), fmt)


def grid(cuts: F32, n: int) -> F32:
    """Abscissae of the 8n + 3 samples, fp32; exact for every n that is a power of two up to 64."""
    steps = np.arange(n, dtype=np.float32)
    inner = cuts[1:9, None] + steps * (cuts[2:10] - cuts[1:9])[:, None] / np.float32(n)
    return np.concatenate([cuts[:1], inner.ravel(), cuts[9:]])


def scale(width: F64, pieces: npt.ArrayLike, rounding: Scales = "float16") -> F32:
    """Pieces per unit of x in segments of these widths; fp32, infinite or 0 where fp16 cannot hold it.

    float16, as in the published models: rounded to fp16 three times, width, reciprocal, product. float32:
    one fp32 division, for segments of less than 1e-3 or more than 65504 (published for plots only).
    """
    with np.errstate(over="ignore", divide="ignore"):
        if rounding == "float32":
            return (np.asarray(pieces, dtype=np.float32) / width.astype(np.float32)).astype(np.float32)
        # float64 holds each exact result, so every rounding is a single one.
        near = width.astype(np.float16).astype(np.float64)
        reciprocal = (1.0 / near).astype(np.float16).astype(np.float64)
        return (np.asarray(pieces, dtype=np.float64) * reciprocal).astype(np.float16).astype(np.float32)


def scales_named(name: object) -> Scales | None:
    """The format of scales of that name, None if there is none."""
    return next((known for known in SCALES if known == name), None)


def make(
    function: str,
    cuts: Sequence[float],
    n: int,
    samples: Callable[[F32], npt.NDArray[np.floating[Any]]],
    scales: Scales = "float16",
) -> Table:
    """Make a table from its cut points and from `samples`, which gives the values on a grid."""
    at = np.array(cuts, dtype=np.float64).astype(np.float16).astype(np.float32)
    wide = at.astype(np.float64)
    where = grid(at, n)
    values = np.clip(samples(where), -_FP16_MAX, _FP16_MAX).astype(np.float32)
    return Table(function, n, at, scale(np.diff(wide), [p or n for p in _PIECES], scales), where, values)


def _published(function: Function, n: int) -> Callable[[F32], npt.NDArray[np.floating[Any]]]:
    """Values on a grid: the published ones if there are any, else `exact` rounded once."""
    if function.samples is None:
        return lambda where: np.array([function.exact(g) for g in where.tolist()])
    finest = np.array(function.samples.split(), dtype=np.float64)
    return lambda _: np.concatenate([finest[:1], finest[1 : -2 : _FINEST // n], finest[-2:]])


@cache
def table(name: str, n: int) -> Table:
    """Interpolation table of the function `name` (a key of FUNCTIONS) with n in POINTS."""
    function = FUNCTIONS[name]
    return make(name, function.cuts, n, _published(function, n))
