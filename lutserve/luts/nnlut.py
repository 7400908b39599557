"""NN-LUT tables: a one-layer ReLU network read as a piecewise linear function (arXiv 2112.02191). numpy only.

H hidden units make H cut points and H + 1 regions, each with a slope and a bias. All of them are rounded to
fp16; the product and the sum of an evaluation are fp32 operations, rounded to nearest even and never fused,
so the result is the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lutserve.luts.bits import F32, PATTERNS, U16, Format, decode, encode
from lutserve.luts.functions import Tail

F64 = npt.NDArray[np.float64]


def to_fp16(values: npt.ArrayLike) -> F32:
    """Round to fp16 and keep as fp32."""
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float64).astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class Table:
    """A piecewise linear function with H cut points.

    function: name of what it approximates ("op" in a file).
    cuts: fp32 [H], ascending, may repeat. slopes, biases: fp32 [H + 1]. All are values of fp16.
    range: where it was fitted, (low, high); None where a file does not say.
    """

    function: str
    cuts: F32
    slopes: F32
    biases: F32
    range: tuple[float, float] | None = None

    def __call__(self, x: F32) -> F32:
        """Evaluate at x, fp32 of any shape; the result in fp32, same shape, not rounded any further.

        Outside the range the end regions go on. -inf gives NaN where the first slope is 0.
        """
        region = np.searchsorted(self.cuts, x, side="right")
        with np.errstate(invalid="ignore", over="ignore"):
            y: F32 = self.slopes[region] * x + self.biases[region]
        return y

    def patterns(self, fmt: Format, tails: tuple[Tail, Tail] | None = None) -> U16:
        """Output bit pattern for every input bit pattern of `fmt`: uint16 [65536].

        With `tails` the table is clamped: at the ends of its range and outside it gives what the tails say.
        """
        x = decode(PATTERNS, fmt)
        y = self(x)
        if tails is not None:
            if self.range is None:
                raise ValueError("a table without a range cannot be clamped")
            low, high = (np.float32(end) for end in self.range)
            y = np.where(x <= low, self._tail(tails[0], low, x), y)
            y = np.where(x >= high, self._tail(tails[1], high, x), y)
        return encode(y, fmt)

    def _tail(self, tail: Tail, end: np.float32, x: F32) -> F32 | np.float32:
        constant = {"zero": np.float32(0), "one": np.float32(1), "hold": self(np.array([end]))[0]}
        return x if tail == "identity" else constant[tail]


def regions(w: F64, b: F64, m: F64) -> tuple[F64, F64, F64]:
    """Return cut points [H], slopes [H + 1] and biases [H + 1] of sum_h m_h relu(w_h x + b_h).

    w, b, m: float64 [H]; no w is 0.
    """
    cut = -b / w
    order = np.argsort(cut, kind="stable")
    cut, w, b, m = cut[order], w[order], b[order], m[order]
    right, left = np.where(w > 0, m, 0.0), np.where(w > 0, 0.0, m)

    def sums(values: F64) -> F64:
        """Units that open to the right count beyond their cut point, the others before it."""
        forward = np.concatenate([[0.0], np.cumsum(right * values)])
        backward = np.concatenate([np.cumsum((left * values)[::-1])[::-1], [0.0]])
        return np.asarray(forward + backward, dtype=np.float64)

    return cut, sums(w), sums(b)


def to_json(table: Table, made_by: dict[str, Any]) -> dict[str, Any]:
    """Return the published JSON form, with two fields more: the range, and how the table was made."""
    return {
        "op": table.function,
        "hidden": len(table.cuts),
        "cut_points": [-np.inf, *table.cuts.tolist(), np.inf],
        "slopes": table.slopes.tolist(),
        "biases": table.biases.tolist(),
        "range": table.range,
        "made_by": made_by,
    }
