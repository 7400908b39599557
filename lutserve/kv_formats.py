"""KV cache schemes as data: `exact`, `axcore`, or any 4-bit format of `lutserve.formats`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from lutserve import formats
from lutserve.errors import UserError
from lutserve.formats import TABLE, Codebook

EXACT = "exact"
AXCORE = "axcore"
#: Tokens of a block in AxCore's cache. Each block and head keeps up to 63 tokens' values in 16 bit: 7 bytes a
#: token at head size 64, of 75, which are 256 in 16 bit. Smaller blocks hold fewer tokens in the same memory
#: (1.95 times 16 bit at 128), larger ones waste more at a request's end.
AXCORE_BLOCK = 1152


@dataclass(frozen=True)
class Coding:
    """How one of keys and values becomes indices into sixteen values.

    values: 16, increasing (a shorter list repeats its last value; -0 and 0 are two).
    bounds: 15 float32 numbers; the index of u is how many of them are less than u.
    divisor: what the largest magnitude of a group is divided by.
    compensation: added to the mantissa of every product, in 1024ths, if products are mpFPMA's; or None.
    """

    values: tuple[float, ...]
    bounds: tuple[float, ...]
    divisor: float
    compensation: float | None = None

    @cached_property
    def classes(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """Mantissa classes (AxCore, DOI 10.1145/3725843.3756094): mu in 1024ths, and +-2^eps or 0.

        A value +-2^eps (1 + mu / 1024) has its power of two in the table of its class and 0 in the others.
        """
        parts = [math.frexp(v) for v in self.values]
        mantissas = [round(1024 * (2 * abs(m) - 1)) if m else 0 for m, _ in parts]
        return tuple(
            (
                mu,
                tuple(
                    math.copysign(2.0 ** (e - 1), m) if m and own == mu else 0.0
                    for own, (m, e) in zip(mantissas, parts, strict=True)
                ),
            )
            for mu in sorted(set(mantissas))
        )


@dataclass(frozen=True)
class Scheme:
    """How a 4-bit cache is coded: keys by token, values by token or, `by_unit`, by 64 tokens of a channel."""

    keys: Coding
    values: Coding
    by_unit: bool


def check(name: str) -> str:
    """Return the name; UserError if there is no such scheme."""
    if name not in (EXACT, AXCORE):
        try:
            formats.get(name).table  # noqa: B018
        except UserError as error:
            raise UserError(
                f"kv_cache_scheme={name!r} is not {EXACT} or {AXCORE}, and no 4-bit format: {error}"
            ) from None
    return name


def get(name: str, model_type: str = "") -> Scheme:
    """Return the scheme called `name` (not `exact`).

    model_type: as in `config.json`; AxCore's keys are E1M2 in OPT and E2M1 in every other model.
    UserError if there is no such scheme.
    """
    check(name)
    if name == AXCORE:
        return Scheme(E1M2 if model_type == "opt" else E2M1, E3M0, by_unit=True)
    coding = _from_codebook(formats.get(name))
    return Scheme(coding, coding, by_unit=False)


def _from_codebook(codebook: Codebook) -> Coding:
    """A tie goes to the lower value, in integer formats to the even one."""
    ties_up = [codebook.integer and low % 2 != 0 for low in codebook.values[:-1]]
    bounds = _bounds(codebook.values, ties_up)
    return Coding(codebook.table, bounds + (math.inf,) * (TABLE - 1 - len(bounds)), codebook.divisor)


def _float(magnitudes: tuple[float, ...], compensation: float | None = None) -> Coding:
    """A sign and eight magnitudes; a tie goes to the even significand, as IEEE's rounding has it."""
    # One mantissa bit or more: every other code is even. Without one, all of them but zero are odd.
    powers = all(b == 2 * a for a, b in pairwise(magnitudes[1:]))
    away = [i > 0 if powers else i % 2 == 1 for i in range(len(magnitudes) - 1)]
    values = (*(-m for m in reversed(magnitudes)), *magnitudes)
    # What is between -0 and 0 is 0: below every fp16 number that is not.
    bounds = _bounds(values, [*(not a for a in reversed(away)), True, *away])
    bounds = (*bounds[:7], -(2.0**-26), *bounds[8:])
    return Coding(values, bounds, magnitudes[-1], compensation)


def _bounds(values: tuple[float, ...], ties_up: list[bool]) -> tuple[float, ...]:
    """Midpoints, moved down by one float32 where a tie goes to the upper value."""
    found = []
    for low, high, up in zip(values[:-1], values[1:], ties_up, strict=True):
        middle = np.float32((low + high) / 2)
        found.append(float(np.nextafter(middle, np.float32(-np.inf)) if up else middle))
    return tuple(found)


#: AxCore's FP4 formats and compensations (DOI 10.1145/3725843.3756094, and the means over all mantissas)
E3M0 = _float((0, 0.25, 0.5, 1, 2, 4, 8, 16))
E2M1 = _float((0, 0.5, 1, 1.5, 2, 3, 4, 6), compensation=42.67)
E1M2 = _float((0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5), compensation=54.25)
