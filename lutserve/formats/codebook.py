"""What a 4-bit format is: a sorted list of values, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lutserve.errors import UserError

#: entries of a served table; shorter lists repeat their last value
TABLE = 16
#: int8 images that miss a value by less than this share of the largest count as exact
_EXACT = 1e-6


@dataclass(frozen=True)
class Int8Table:
    """A codebook on the int8 grid: `values[i] * scale` stands for the codebook's value i.

    values: 16 integers in -127..127, the last repeated where the codebook is shorter.
    scale: factor back to the codebook's own values.
    exact: whether every product is the codebook's value (up to the rounding of the product).
    """

    values: tuple[int, ...]
    scale: float
    exact: bool


@dataclass(frozen=True)
class Codebook:
    """A datatype: a weight is stored as the index of one of its values, times a scale.

    name: what `--method` says.
    values: strictly increasing, 2 to 16 of them (an integer format has 2**bits).
    bits: width of a stored index.
    paper_name: what the paper calls it (arXiv 2405.03103), empty if it does not.
    source: where the values come from.
    integer: values are consecutive integers and are found by rounding half to even, not by midpoints.

    UserError if the values are no codebook.
    """

    name: str
    values: tuple[float, ...]
    bits: int = 4
    paper_name: str = ""
    source: str = ""
    integer: bool = False

    def __post_init__(self) -> None:
        values, where = tuple(float(v) for v in self.values), f"codebook {self.name!r}"
        object.__setattr__(self, "values", values)
        limit = 2**self.bits if self.integer else min(TABLE, 2**self.bits)
        if not 2 <= len(values) <= limit:
            raise UserError(f"{where} has {len(values)} values; allowed: 2 to {limit}")
        with np.errstate(over="ignore"):
            stored = np.asarray(values, dtype=np.float32)
        if not np.isfinite(stored).all():
            raise UserError(f"{where} holds a value that is not finite in float32")
        if (np.diff(stored) <= 0).any():
            raise UserError(f"{where}: values must increase from one to the next (in float32)")
        if values[-1] <= 0:
            raise UserError(f"{where}: the largest value is {values[-1]:g}; it must be positive")

    @property
    def divisor(self) -> float:
        """What the largest weight of a group is divided by (RTN, activations): the largest value."""
        return self.values[-1]

    @property
    def gptq_divisor(self) -> float:
        """The same in GPTQ: the largest magnitude; for integers half the span, 7.5 for int4."""
        if self.integer:
            return (self.values[-1] - self.values[0]) / 2
        return max(-self.values[0], self.values[-1])

    @cached_property
    def midpoints(self) -> tuple[float, ...]:
        """Boundaries between neighbouring values, rounded once to float32.

        A value equal to a midpoint belongs to the lower index.
        """
        pairs = zip(self.values, self.values[1:], strict=False)
        return tuple(float(np.float32((a + b) / 2)) for a, b in pairs)

    @cached_property
    def zero(self) -> int:
        """Index of zero, or of the value that zero is rounded to where the list has none."""
        return sum(m < 0 for m in self.midpoints)

    @property
    def table(self) -> tuple[float, ...]:
        """Sixteen values, the last repeated; UserError for a format of more than 4 bits."""
        return _padded(self.values, self.name)

    def int8_table(self) -> Int8Table:
        """The codebook for an int8 GEMM (W4A8), exact if all values are multiples of one unit.

        Else every value v becomes round(127 * v / max|v|), an error of at most max|v| / 254.
        UserError for a format of more than 4 bits.
        """
        largest = max(-self.values[0], self.values[-1])
        table = _padded(self.values, self.name)
        image = self.integers(127)
        if image is not None:
            steps = max(-image[0], image[-1])
            return Int8Table((*image, *image[-1:] * (TABLE - len(image))), largest / steps, exact=True)
        rounded = np.round(np.asarray(table) / largest * 127)
        return Int8Table(tuple(int(i) for i in rounded), largest / 127, exact=False)

    def integers(self, limit: int) -> tuple[int, ...] | None:
        """The values in units of the largest step that divides them all; None if one exceeds `limit` then."""
        relative = np.asarray(self.values) / max(-self.values[0], self.values[-1])
        for steps in range(1, limit + 1):
            image = np.round(relative * steps)
            if np.abs(relative * steps - image).max() <= _EXACT * steps:
                return tuple(int(i) for i in image)
        return None

    def to_json(self) -> dict[str, Any]:
        """All that is known about the format, for `lutserve formats --json`."""
        image = self.int8_table() if len(self.values) <= TABLE else None
        return {
            "name": self.name,
            "paper_name": self.paper_name,
            "bits": self.bits,
            "values": list(self.values),
            "midpoints": list(self.midpoints),
            "zero": self.zero,
            "divisor": self.divisor,
            "gptq_divisor": self.gptq_divisor,
            "integer": self.integer,
            "int8": image and {"values": list(image.values), "scale": image.scale, "exact": image.exact},
            "source": self.source,
        }


def _padded(values: tuple[float, ...], name: str) -> tuple[float, ...]:
    if len(values) > TABLE:
        raise UserError(f"{name} has {len(values)} values; a look-up table holds {TABLE}")
    return values + values[-1:] * (TABLE - len(values))
