"""Charts as numbers: which points go where on a sheet, for a template that draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

#: of the sheet, in SVG units, which are pixels where there is room
WIDTH, HEIGHT = 680, 400
LEFT, RIGHT, TOP, BOTTOM = 72, 20, 16, 56
#: an axis of positive values that spans more than this factor is logarithmic
_LOGARITHMIC = 50
_TICKS = 6
#: colours of the page, and shapes of its points
COLOURS = 8
#: of a label's font: height, and mean width of a character
_LINE, _CHARACTER = 14.0, 6.6


@dataclass(frozen=True)
class Point:
    """A point, or the bar from `low` to `y` over `x`."""

    x: float
    y: float
    name: str
    low: float | None = None
    #: written beside the point
    label: str = ""
    #: id of the record it comes from
    origin: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one kind, in one colour and shape; `line` joins them in their order."""

    name: str
    points: tuple[Point, ...]
    line: bool = False


@dataclass(frozen=True)
class Tick:
    """A place on an axis with its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Placed:
    """Where a point and its label are on the sheet."""

    point: Point
    x: float
    y: float
    low: float
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = ""


def colour(index: int) -> int:
    """The colour of a series; with its shape, `index` modulo COLOURS, no two of 64 are alike."""
    return (index + index // COLOURS) % COLOURS


class Axis:
    """The way from values to places: linear, or logarithmic for values of very different size."""

    def __init__(self, values: Iterable[float], start: float, end: float) -> None:
        found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        self.start, self.end = start, end
        self.whole = all(value == int(value) for value in found)
        low, high = min(found), max(found)
        self.log = low > 0 and high / low > _LOGARITHMIC
        if self.log:
            low, high = math.log10(low), math.log10(high)
        room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
        self.low, self.high = low - room, high + room

    def place(self, value: float) -> float:
        """Where a value is; outside the axis at its nearest end."""
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        value = min(max(value, self.low), self.high)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[Tick]:
        """Round values on the axis."""
        return [Tick(self.place(value), f"{value:g}") for value in self._round_values()]

    def _round_values(self) -> Iterator[float]:
        if self.log:
            stride = max(int((self.high - self.low) / _TICKS), 1)
            decades = range(math.floor(self.low / stride) * stride, math.ceil(self.high) + 1, stride)
            factors = (1, 2, 5) if len(decades) < 4 else (1,)
            for decade in decades:
                for factor in factors:
                    if self.low <= decade + math.log10(factor) <= self.high:
                        yield factor * 10.0**decade
            return
        rough = max((self.high - self.low) / _TICKS, 1.0 if self.whole else 0.0)
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            yield round(index * step, 12)


@dataclass(frozen=True)
class Chart:
    """A chart with everything that a reader needs who cannot see it."""

    id: str
    title: str
    #: what it shows, in words
    description: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]

    @cached_property
    def x(self) -> Axis:
        """The horizontal axis."""
        return Axis((p.x for p in self._points), LEFT, WIDTH - RIGHT)

    @cached_property
    def y(self) -> Axis:
        """The vertical axis."""
        ends = [p.y for p in self._points] + [p.low for p in self._points if p.low is not None]
        return Axis(ends, HEIGHT - BOTTOM, TOP)

    @property
    def _points(self) -> list[Point]:
        return [point for series in self.series for point in _finite(series)]

    @cached_property
    def placed(self) -> list[list[Placed]]:
        """The points of every series on the sheet, their labels where they hide nothing if that can be."""
        spots = {id(p): (self.x.place(p.x), self.y.place(p.y)) for p in self._points}
        taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots.values()]
        result = []
        for series in self.series:
            placed = []
            for point in _finite(series):
                x, y = spots[id(point)]
                low = y if point.low is None else self.y.place(point.low)
                where = _beside(point.label, x, y, taken) if point.label else ()
                placed.append(Placed(point, x, y, low, *where))
            result.append(placed)
        return result


def _finite(series: Series) -> list[Point]:
    return [p for p in series.points if math.isfinite(p.x) and math.isfinite(p.y)]


Box = tuple[float, float, float, float]


def _beside(label: str, x: float, y: float, taken: list[Box]) -> tuple[float, float, str]:
    """Where the label of a point goes; `taken` is what it should not cover, and grows by it."""
    width = _CHARACTER * len(label)
    tries: list[tuple[float, float, str]] = [(x + 9, y + 4, "start"), (x - 9, y + 4, "end")]
    for step in (1, 2, 3):
        above, below = y - 9 - _LINE * (step - 1), y + 7 + _LINE * step
        tries += [(x, above, "middle"), (x, below, "middle"), (x + 9, above, "start"), (x - 9, below, "end")]
    best, least = tries[0], math.inf
    for spot in tries:
        box = _box(*spot, width)
        outside = max(LEFT - box[0], 0) + max(box[2] - (WIDTH - 2), 0) + max(TOP - box[1], 0)
        outside += max(box[3] - (HEIGHT - BOTTOM), 0)
        hidden = outside * _LINE * 4 + sum(_overlap(box, other) for other in taken)
        if hidden < least:
            best, least = spot, hidden
    taken.append(_box(*best, width))
    return best


def _box(x: float, y: float, anchor: str, width: float) -> Box:
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return left, y - _LINE + 3, left + width, y + 3


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def frontier(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other beats, less being better in both directions, from left to right."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not best or point.y < best[-1].y:
            best.append(point)
    return tuple(best)
