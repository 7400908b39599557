"""KV cache schemes as data: `exact`, `axcore`, or any 4-bit format of `lutserve.formats`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lutserve import formats
from lutserve.errors import UserError
from lutserve.formats import TABLE, Codebook
from lutserve.luts import fpma
from lutserve.luts.fpma import Fp4

#: the `--kv-cache-dtype` of vLLM that makes it allocate bytes, however they are used
CACHE_DTYPE = "int4_per_token_head"
#: the `--attention-backend` of vLLM on CUDA that is ours
ATTENTION_BACKEND = "LUTSERVE"
EXACT = "exact"
AXCORE = "axcore"
#: codes of a 4-bit float in the order of their values
SORTED = (*range(15, 7, -1), *range(8))
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
    fp4: the 4-bit float that they are, if products with them are mpFPMA's; or None.
    """

    values: tuple[float, ...]
    bounds: tuple[float, ...]
    divisor: float
    fp4: Fp4 | None = None


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


def _float(fmt: Fp4, approximate: bool = True) -> Coding:
    """A 4-bit float; a tie goes to the even significand, as IEEE's rounding has it."""
    # One mantissa bit or more: every other code is even. Without one, all of them but zero are odd.
    away = [i > 0 if fmt.mantissa == 0 else i % 2 == 1 for i in range(len(fmt.magnitudes) - 1)]
    values = tuple(fmt.values[code] for code in SORTED)
    # What is between -0 and 0 is 0: below every fp16 number that is not.
    bounds = _bounds(values, [*(not a for a in reversed(away)), True, *away])
    bounds = (*bounds[:7], -(2.0**-26), *bounds[8:])
    return Coding(values, bounds, fmt.largest, fmt if approximate else None)


def _bounds(values: tuple[float, ...], ties_up: list[bool]) -> tuple[float, ...]:
    """Midpoints, moved down by one float32 where a tie goes to the upper value."""
    found = []
    for low, high, up in zip(values[:-1], values[1:], ties_up, strict=True):
        middle = np.float32((low + high) / 2)
        found.append(float(np.nextafter(middle, np.float32(-np.inf)) if up else middle))
    return tuple(found)


#: AxCore's: keys, and values, whose products with powers of two are exact
E3M0 = _float(fpma.get("e3m0"), approximate=False)
E2M1 = _float(fpma.get("e2m1"))
E1M2 = _float(fpma.get("e1m2"))
