"""Errors of a table against the exact function: absolute, relative, and in units of the last place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lutserve.luts.bits import PATTERNS, U16, Format, decode64
from lutserve.luts.nnlut import F64

FLOOR = 2.0**-14
"""Smallest denominator of a relative error: the smallest normal fp16 number."""
_EDGES = (-65504, -141, -40, -10, -5, -1, 1, 5, 10, 40, 141, 65504)
_MANTISSA: dict[Format, int] = {"float16": 10, "bfloat16": 7}
_LEAST: dict[Format, int] = {"float16": -24, "bfloat16": -133}  # exponent of the smallest subnormal
_LARGEST: dict[Format, float] = {"float16": 65504.0, "bfloat16": (2 - 2**-7) * 2.0**127}


@dataclass(frozen=True)
class Errors:
    """Errors over the values x of a 16-bit format with low <= x <= high and a finite exact result.

    count: how many values. Every mean is over them, so it is dense near 0, as the format is.
    at: the input of the largest absolute error. missing: how many outputs are NaN or infinite; they are
    left out of the numbers, which are NaN if nothing is left.
    """

    low: float
    high: float
    count: int
    missing: int
    max_abs: float
    at: float
    mean_abs: float
    max_relative: float
    mean_relative: float
    max_ulp: float
    mean_ulp: float


def regions(low: float, high: float) -> list[tuple[float, float]]:
    """Split [low, high] at 1, 5, 10, 40, 141 and their negatives, or in four where fewer than two lie inside.

    The edges are those of the published tables of errors.
    """
    inside = [float(e) for e in _EDGES if low < e < high]
    if len(inside) < 2:
        inside = [low + (high - low) * part / 4 for part in (1, 2, 3)]
    return list(pairwise([low, *inside, high]))


def errors(table: U16, exact: F64, fmt: Format, spans: Sequence[tuple[float, float]]) -> list[Errors]:
    """Errors of a table, uint16 [65536], against the exact values, float64 [65536], in each region."""
    return [_errors(table, exact, fmt, low, high) for low, high in spans]


def _errors(table: U16, exact: F64, fmt: Format, low: float, high: float) -> Errors:
    x = decode64(PATTERNS, fmt)
    with np.errstate(invalid="ignore"):
        wanted = (x >= low) & (x <= high) & (np.abs(exact) <= _LARGEST[fmt])
    x, true, y = x[wanted], exact[wanted], decode64(table[wanted], fmt)
    given = np.isfinite(y)
    missing = int((~given).sum())
    if not given.any():
        return Errors(low, high, len(x), missing, *[math.nan] * 7)
    x, true, y = x[given], true[given], y[given]
    off = np.abs(y - true)
    relative = off / np.maximum(np.abs(true), FLOOR)
    ulps = off / spacing(true, fmt)
    means = [float(v.mean()) for v in (off, relative, ulps)]
    tops = [float(v.max()) for v in (off, relative, ulps)]
    at = float(x[off.argmax()])
    return Errors(low, high, len(given), missing, tops[0], at, means[0], tops[1], means[1], tops[2], means[2])


def spacing(values: F64, fmt: Format) -> F64:
    """Distance between the numbers of `fmt` around each value: one unit in the last place."""
    _, exponent = np.frexp(values)
    last: F64 = np.exp2(np.maximum(exponent - 1.0 - _MANTISSA[fmt], _LEAST[fmt]))
    return np.where(values == 0, 2.0 ** _LEAST[fmt], last)
