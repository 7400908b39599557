"""Codebooks built from the quantiles of a distribution (arXiv 2405.03103)."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from lutserve.errors import UserError

#: probability mass left outside, for 16 values and for 8
DELTA4 = (1 / 32 + 1 / 30) / 2
DELTA3 = (1 / 16 + 1 / 14) / 2


def with_zero(nu: float | None, delta: float, negative: int, positive: int) -> tuple[float, ...]:
    """`negative` values below zero, zero, and `positive` above; both ends are exactly -1 and 1.

    Args:
        nu: degrees of freedom of Student's t; None for the normal distribution.
        delta: probability of the outermost values.
        negative: how many values lie below zero.
        positive: how many lie above.

    """
    low = _lower_quantiles(nu, np.linspace(delta, 0.5, negative + 1)[:-1])
    high = -_lower_quantiles(nu, np.linspace(delta, 0.5, positive + 1)[:-1])[::-1]
    return _normalised(np.concatenate([low, [0.0], high]))


def without_zero(nu: float | None, delta: float, count: int) -> tuple[float, ...]:
    """An even `count` of values, symmetric around zero, which is none of them."""
    low = _lower_quantiles(nu, np.linspace(delta, 1 - delta, count)[: count // 2])
    return _normalised(np.concatenate([low, -low[::-1]]))


def _lower_quantiles(nu: float | None, p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Quantiles at probabilities below one half; the upper half is their mirror image."""
    if nu is None:
        return np.array([NormalDist().inv_cdf(q) for q in p.tolist()])
    try:
        from scipy.special import stdtrit  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise UserError("quantiles of Student's t need scipy; pip install scipy") from None
    return np.asarray(stdtrit(nu, p), dtype=np.float64)


def _normalised(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    with np.errstate(invalid="ignore"):
        return tuple((values / np.abs(values).max()).tolist())
