"""Damage that saturates: f(S) = c (1 - prod over S of (1 - a)), and the attribution of it to its causes.

Where many layers do damage their effects overlap, and sums of isolated scores are too large. With costs
-ln(1 - a) instead the sum is exact again, and the choice between candidates stays linear (arXiv 2607.12266).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def total(ceiling: float, shares: Sequence[float] | Vector) -> float:
    """Damage of a set: `ceiling` times one minus the product of (1 - share)."""
    # Through logarithms, so that small shares keep their digits.
    return float(-ceiling * np.expm1(np.log1p(-np.asarray(shares, dtype=np.float64)).sum()))


def attribution(ceiling: float, shares: Sequence[float] | Vector) -> Vector:
    """Aumann-Shapley value of each: ceiling * a_i * integral over t in [0, 1] of prod_{j != i} (1 - t a_j).

    The values add up to `total`.
    """
    a = np.asarray(shares, dtype=np.float64)
    return ceiling * a * _integrals(a)


def shares(ceiling: float, attributed: Sequence[float] | Vector, steps: int = 1000) -> Vector:
    """The inverse of `attribution` by fixed-point iteration: the shares behind Aumann-Shapley values."""
    value = np.asarray(attributed, dtype=np.float64) / ceiling
    a = value
    for _ in range(steps):
        before, a = a, np.clip(value / _integrals(a), -1, 1 - 1e-9)
        if np.abs(a - before).max(initial=0) < 1e-14:
            break
    return a


def _integrals(a: Vector) -> Vector:
    """For each i the integral over t in [0, 1] of prod_{j != i} (1 - t a_j)."""
    # Exact for a polynomial of up to twice as many factors as nodes.
    nodes, weights = np.polynomial.legendre.leggauss(max(8, len(a) // 2 + 1))
    factors = 1 - (nodes[:, None] + 1) / 2 * a
    return np.asarray((weights / 2) @ (factors.prod(1)[:, None] / factors), dtype=np.float64)
