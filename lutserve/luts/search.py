"""Search for the eleven cut points of an NLI table, for any function (NLI, arXiv 2602.02988). numpy only.

The loss of a set of cut points is the mean relative error |g(x) - f(x)| / max(|f(x)|, 2**-14) over the finite
fp16 values x of the range, f rounded to fp16 and g the interpolation with the scales that the table will
have, not rounded any further. (The published search takes the ideal scales, which the published models then
round to fp16; near zero that matters.) Small numbers count as much as large ones, because fp16 values are
spread over the exponents.

A segment's part of the loss depends on its two ends alone, so the best set is a shortest path, found by
dynamic programming. The published method lets every one of up to 25,000 values be a cut point, which is
10**9 segments. Here the first pass allows the values with the shortest mantissas, at most 256 of them, and
further passes finer and finer positions around the best path, until no step of one fp16 value improves it.
Then everything is tried once more with those positions open to every cut point, until that brings nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lutserve.errors import UserError
from lutserve.luts import nli
from lutserve.luts.bits import F32

SEGMENTS = nli.CUTS - 1
FLOOR = 2.0**-14
PINS = {"none": (False, False), "left": (True, False), "right": (False, True), "both": (True, True)}
_FP16_MAX = 65504.0
_COARSE = 256  # positions of the first pass, at most
_REACH = 12  # positions to each side of a cut point in the later passes
_NEAR = 4
_SAMPLES = 8000  # values on which the first pass measures the loss
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cuts:
    """Eleven cut points (fp16 values, ascending), and their loss: mean relative error over the range."""

    cuts: tuple[float, ...]
    loss: float


def evaluate(function: Callable[[float], float], x: float) -> float:
    """`function` at x, NaN where it has no value there (ValueError, ZeroDivisionError, OverflowError)."""
    try:
        return float(function(x))
    except (ValueError, ZeroDivisionError, OverflowError):
        return math.nan


def candidates(function: Callable[[float], float], low: float, high: float) -> tuple[F64, F64]:
    """Return the fp16 values of [low, high] where the function is finite in fp16, and its fp16 values."""
    codes = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float64)
    # unique() keeps one of the two zeros.
    x = np.unique(codes[np.isfinite(codes) & (codes >= low) & (codes <= high)])
    with np.errstate(over="ignore"):
        y = np.array([evaluate(function, v) for v in x.tolist()]).astype(np.float16).astype(np.float64)
    finite = np.isfinite(y)
    return x[finite], y[finite]


class Loss:
    """The loss of a segment between two candidates, by their positions, remembered once computed.

    It is infinite where the segment's scale does not fit `scales`, and where the function has no value.
    """

    def __init__(
        self,
        function: Callable[[float], float],
        x: F64,
        y: F64,
        stride: int = 1,
        scales: nli.Scales = "float16",
    ) -> None:
        self.function, self.x, self.stride, self.scales = function, x, stride, scales
        # Every stride-th candidate is measured, and stands for stride of them.
        self._x, self._y = x[::stride], y[::stride]
        self._weight = stride / np.maximum(np.abs(self._y), FLOOR) / len(x)
        self._known: dict[tuple[int, int, int], float] = {}

    def segment(self, left: int, right: int, pieces: int) -> float:
        """Loss over the candidates left <= j < right, in equal pieces between the two."""
        key = (left, right, pieces)
        if key not in self._known:
            a, b = self.x[left], self.x[right]
            per_unit = nli.scale(np.array([b - a]), [pieces], self.scales)[0]
            if not 0 < per_unit < math.inf:
                return math.inf
            steps = np.arange(pieces + 1)
            values = self._values(a + steps * (b - a) / pieces)
            part = slice(-(-left // self.stride), -(-right // self.stride))
            # A rounded scale stretches the pieces; beyond the last one the table is flat, as interp is.
            guess = np.interp(self._x[part], a + steps / np.float64(per_unit), values)
            self._known[key] = self._sum(guess, part)
        return self._known[key]

    def outside(self, cut: int, part: slice) -> float:
        """Loss of the constant f(x[cut]) over the measured candidates `part`."""
        return self._sum(self._values(self.x[cut : cut + 1]), part)

    def left_of(self, cut: int) -> float:
        """Loss left of the first cut point."""
        return self.outside(cut, slice(0, -(-cut // self.stride)))

    def right_of(self, cut: int) -> float:
        """Loss from the last cut point on."""
        return self.outside(cut, slice(-(-cut // self.stride), None))

    def total(self, cuts: Sequence[int], points: int) -> float:
        """Loss of a whole table by the positions of its cut points."""
        inner = sum(
            self.segment(cuts[m], cuts[m + 1], 1 if m in (0, SEGMENTS - 1) else points)
            for m in range(SEGMENTS)
        )
        return self.left_of(cuts[0]) + inner + self.right_of(cuts[-1])

    def _values(self, grid: F64) -> F64:
        values = np.array([evaluate(self.function, v) for v in grid.tolist()])
        return np.clip(values, -_FP16_MAX, _FP16_MAX)

    def _sum(self, guess: F64, part: slice) -> float:
        loss = float(np.abs(guess - self._y[part]) @ self._weight[part])
        return math.inf if math.isnan(loss) else loss


def best_path(loss: Loss, allowed: Sequence[npt.NDArray[np.int_]], points: int) -> list[int]:
    """The best cut points when the m-th may lie at the positions allowed[m] (ascending)."""
    cost = np.array([loss.left_of(k) for k in allowed[0].tolist()])
    came_from = []
    for m in range(SEGMENTS):
        pieces = 1 if m in (0, SEGMENTS - 1) else points
        step = np.full((len(allowed[m]), len(allowed[m + 1])), math.inf)
        for i, left in enumerate(allowed[m].tolist()):
            for k, right in enumerate(allowed[m + 1].tolist()):
                if left < right:
                    step[i, k] = loss.segment(left, right, pieces)
        total = cost[:, None] + step
        came_from.append(total.argmin(0))
        cost = total.min(0)
    cost = cost + np.array([loss.right_of(k) for k in allowed[-1].tolist()])
    last = int(cost.argmin())
    if not math.isfinite(cost[last]):
        raise UserError(
            "no table fits: the function has no value somewhere inside the range, or a segment is too narrow "
            "or too wide for a scale in fp16; choose another range or --scales float32"
        )
    path = [last]
    for back in reversed(came_from):
        path.append(int(back[path[-1]]))
    return [int(allowed[m][p]) for m, p in enumerate(reversed(path))]


def search(
    function: Callable[[float], float],
    low: float,
    high: float,
    points: int,
    *,
    pin: tuple[bool, bool] = (False, False),
    scales: nli.Scales = "float16",
    progress: Callable[[str], None] = lambda _: None,
) -> Cuts:
    """Find the cut points with the least loss over [low, high], with `points` pieces an inner segment.

    Args:
        function: float -> float; may raise ValueError where it has no value.
        low: left end of the range.
        high: right end of the range.
        points: pieces of each of the eight inner segments; the outer two have one.
        pin: whether the first (last) cut point must be the left (right) end of the range. Without, it lies
            where the constant outside is best.
        scales: the format of the table's scales, see `nli.scale`.
        progress: told in a few words what has been found so far.

    Raises:
        UserError: fewer than eleven fp16 values of the range have a finite fp16 function value.

    """
    x, y = candidates(function, low, high)
    if len(x) <= SEGMENTS:
        raise UserError(
            f"the function has finite fp16 values at {len(x)} fp16 numbers of [{low:g}, {high:g}]; a table "
            f"needs {SEGMENTS + 1} at least"
        )
    top = len(x) - 1
    ends = [0] if pin[0] else None, [top] if pin[1] else None

    def allowed(around: Sequence[npt.NDArray[np.int_]]) -> list[npt.NDArray[np.int_]]:
        inside = [np.unique(a[(a >= 0) & (a <= top)]) for a in around]
        for m, end in zip((0, SEGMENTS), ends, strict=True):
            inside[m] = inside[m] if end is None else np.array(end)
        return inside

    # Values with a short mantissa, where kinks lie as a rule, and the ends.
    code = x.astype(np.float16).view(np.uint16)
    spacing = 1
    while len(x) // spacing > _COARSE:
        spacing *= 2
    coarse = np.union1d(np.flatnonzero(code % spacing == 0), [0, top])
    rough = Loss(function, x, y, max(1, len(x) // _SAMPLES), scales)
    loss = Loss(function, x, y, scales=scales)

    def refine(path: list[int]) -> tuple[float, list[int]]:
        total, step = loss.total(path, points), spacing
        progress(f"mean relative error {total:.4e}")
        while True:
            step = max(1, step // 4)
            around = [k + step * np.arange(-_REACH, _REACH + 1) for k in path]
            better = best_path(loss, allowed(around), points)
            if loss.total(better, points) < total:
                total, path, step = loss.total(better, points), better, step * 4
                progress(f"mean relative error {total:.4e}")
            elif step == 1:
                return total, path

    best = refine(best_path(rough, allowed([coarse] * (SEGMENTS + 1)), points))
    while True:
        # A cut point may also take the place of another one, or any coarse one.
        everywhere = np.union1d(coarse, np.add.outer(best[1], np.arange(-_NEAR, _NEAR + 1)))
        again = refine(best_path(rough, allowed([everywhere] * (SEGMENTS + 1)), points))
        if not again[0] < best[0]:
            return Cuts(tuple(x[best[1]].tolist()), best[0])
        best = again


def loss_of(
    function: Callable[[float], float],
    cuts: Sequence[float],
    low: float,
    high: float,
    points: int,
    scales: nli.Scales = "float16",
) -> float | None:
    """Loss of given cut points over a range; None where one of them is no candidate there."""
    x, y = candidates(function, low, high)
    at = np.array(cuts).astype(np.float16).astype(np.float64)
    if not np.isin(at, x).all():
        return None
    return Loss(function, x, y, scales=scales).total(np.searchsorted(x, at).tolist(), points)


def build(
    function: Callable[[float], float],
    name: str,
    low: float,
    high: float,
    points: int,
    *,
    pin: str = "none",
    scales: str = "float16",
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[nli.Table, float]:
    """Search the cut points of a function and make its table, called `name`; also return the loss.

    pin: which ends of the range must be cut points, a key of PINS. The rest is as for `search`.
    UserError for what `search` refuses and for arguments that no table file may have.
    """
    if points not in nli.FILE_POINTS:
        raise UserError(f"{points} points; allowed: {', '.join(map(str, nli.FILE_POINTS))}")
    if pin not in PINS:
        raise UserError(f"unknown pin {pin!r}; allowed: {', '.join(PINS)}")
    rounding = nli.scales_named(scales)
    if rounding is None:
        raise UserError(f"unknown scales {scales!r}; allowed: {', '.join(nli.SCALES)}")
    found = search(function, low, high, points, pin=PINS[pin], scales=rounding, progress=progress)

    def samples(grid: F32) -> F64:
        return np.array([evaluate(function, g) for g in grid.tolist()])

    table = nli.make(name, found.cuts, points, samples, rounding)
    if not np.isfinite(table.samples).all():
        raise UserError(f"the function has no value at {table.grid[~np.isfinite(table.samples)][0]:g}")
    return table, found.loss
