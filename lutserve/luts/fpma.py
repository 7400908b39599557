"""Approximate multiplication by one integer addition (FPMA): the product of two 16-bit floats is close to the
sum of their bit patterns, because a pattern is nearly a logarithm.

Everything works on the low 15 bits n of a pattern, for float16 and bfloat16 alike:

    FPMA    n = n(a) + n(b) - bias + C, sign by exclusive or; below 0 it is 0; a zero operand gives +0
    mpFPMA  one operand is a 4-bit float: n = n(a) + offset(code) + C

C compensates the mean error. Infinities, NaN and subnormals are integers like any other, and 15 bits wrap
around: that is the published arithmetic ("AxCore", MICRO'25; L-Mul: arXiv 2410.00907), which `products` gives
to the last bit. A server multiplies by `lutserve.luts.fpma_classes`: the same products where they make sense.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from lutserve.errors import UserError
from lutserve.luts.bits import PATTERNS, U16, Format, decode, encode

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]
#: none, one constant for a format, or one for each mantissa of the 4-bit operand
Compensation = bool | Literal["class"]

MANTISSA: dict[Format, int] = {"float16": 10, "bfloat16": 7}
BIAS: dict[Format, int] = {"float16": 0x3C00, "bfloat16": 0x3F80}
#: compensation of L-Mul: 2**-4 of a mantissa
L_MUL: dict[Format, int] = {"float16": 64, "bfloat16": 8}
#: one constant for all formats in the published hardware
_HARDWARE = 43


@dataclass(frozen=True)
class Fp4:
    """A 4-bit float: bit 3 of a code is the sign, the rest indexes `magnitudes`; no infinities.

    mantissa: stored bits. bias: of the exponent; an exponent of 0 is subnormal. type_id: as stored.
    """

    name: str
    mantissa: int
    bias: int
    type_id: int
    magnitudes: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The largest value."""
        return self.magnitudes[-1]

    @property
    def values(self) -> tuple[float, ...]:
        """The value of each of the 16 codes."""
        return (*self.magnitudes, *(-float(m) for m in self.magnitudes))


#: by type id
FP4 = (
    Fp4("e3m0", 0, 3, 0, (0, 0.25, 0.5, 1, 2, 4, 8, 16)),
    Fp4("e2m1", 1, 1, 1, (0, 0.5, 1, 1.5, 2, 3, 4, 6)),
    Fp4("e1m2", 2, 0, 2, (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)),
)


@dataclass(frozen=True)
class Arithmetic:
    """A method: formats to choose from, and the options of `products`."""

    formats: tuple[Fp4, ...] = FP4
    snc: bool = True
    compensation: Compensation = True


#: by the name of the method
ARITHMETICS = {
    "axcore": Arithmetic(),
    "axcore-plus": Arithmetic(compensation="class"),
    "mpfpma": Arithmetic(FP4[1:2], snc=False, compensation=False),
    "mpfpma-s": Arithmetic(FP4[1:2], compensation=False),
    "mpfpma-sc": Arithmetic(FP4[1:2]),
}


def get(name: str) -> Fp4:
    """The format called `name`; UserError otherwise."""
    for fmt in FP4:
        if fmt.name == name:
            return fmt
    raise UserError(f"unknown 4-bit float {name!r}; allowed: {', '.join(fmt.name for fmt in FP4)}")


def fpma(a: U16, b: U16, compensation: int | I32 = 0, dtype: Format = "float16") -> U16:
    """Approximate products of bit patterns, uint16, elementwise; `compensation` is added to every pattern."""
    n = _magnitude(a) + _magnitude(b) - BIAS[dtype] + compensation
    return _signed(n, a ^ b, (_magnitude(a) != 0) & (_magnitude(b) != 0))


def l_mul(a: U16, b: U16, dtype: Format = "float16") -> U16:
    """L-Mul: FPMA whose compensation is 2**-4 of a mantissa."""
    return fpma(a, b, L_MUL[dtype], dtype)


def table_fpma(a: U16, b: U16, dtype: Format = "float16") -> U16:
    """FPMA with a compensation for every pair of top three mantissa bits (see `table`)."""
    shift = MANTISSA[dtype] - 3
    return fpma(a, b, table(dtype)[a >> shift & 7, b >> shift & 7], dtype)


def divide(a: U16, b: U16, dtype: Format = "float16") -> U16:
    """Approximate quotients, n(a) + bias - n(b); a dividend of zero gives +0, a divisor of zero no error."""
    return _signed(_magnitude(a) + BIAS[dtype] - _magnitude(b), a ^ b, _magnitude(a) != 0)


def _magnitude(a: U16) -> I32:
    return (a & 0x7FFF).astype(np.int32)


def _signed(n: I32, sign: U16, nonzero: npt.NDArray[np.bool_]) -> U16:
    pattern = (np.maximum(n, 0) & 0x7FFF).astype(np.uint16) | (sign & 0x8000)
    return np.where(nonzero, pattern, np.uint16(0))


@cache
def table(dtype: Format = "float16") -> I32:
    """The 8x8 compensations of `table_fpma`, int32: the mean errors of 64 cells of mantissas."""
    cells = np.arange(1 << MANTISSA[dtype]).reshape(8, -1)
    return np.array(
        [[round(float(_errors(i, j, dtype).mean())) for j in cells] for i in cells], dtype=np.int32
    )


@cache
def uniform(dtype: Format = "float16") -> int:
    """Compensation of FPMA over all pairs of mantissas: 58 for float16."""
    cells = np.arange(1 << MANTISSA[dtype])
    return round(float(_errors(cells, cells, dtype).mean()))


@cache
def compensation(fmt: Fp4, dtype: Format = "float16") -> int:
    """Mean error of a format in units of the last place, over all mantissas: 0, 43 and 54 for float16."""
    return round(float(np.mean([_class_error(mu, dtype) for mu in _mantissas(fmt, dtype)])))


@cache
def class_compensation(mu: int, dtype: Format = "float16") -> int:
    """Mean error where the 4-bit operand's mantissa is `mu` units: 0, 77, 85, 55 for the four quarters."""
    return round(_class_error(mu, dtype))


def _class_error(mu: int, dtype: Format) -> float:
    return float(_errors(np.arange(1 << MANTISSA[dtype]), np.array([mu]), dtype).mean())


def _mantissas(fmt: Fp4, dtype: Format) -> Iterable[int]:
    return range(0, 1 << MANTISSA[dtype], 1 << MANTISSA[dtype] - fmt.mantissa)


def _errors(a: npt.NDArray[np.int_], b: npt.NDArray[np.int_], dtype: Format) -> F64:
    """Pattern of (1 + a)(1 + b) minus (a + b) for all pairs of mantissas, in units of the last place."""
    one = 1 << MANTISSA[dtype]
    x, y = a[:, None] / one, b / one
    exact = (1 + x) * (1 + y)
    return one * (np.where(exact < 2, exact - 1, exact / 2) - (x + y))


def offsets(fmt: Fp4, snc: bool = True, dtype: Format = "float16") -> tuple[int, ...]:
    """What each of a format's eight magnitudes adds to a pattern; that of zero is never used.

    Without `snc` (subnormal number conversion) the bits of a subnormal are read as if it were normal: 0.5 in
    E2M1 counts as 0.75. With it every value enters with its own logarithm.
    """
    one = 1 << MANTISSA[dtype]
    raw = tuple((c << MANTISSA[dtype] - fmt.mantissa) - fmt.bias * one for c in range(8))
    if not snc:
        return raw
    fractions, exponents = np.frexp(fmt.magnitudes)
    return tuple(int(one * (e - 1 + 2 * f - 1)) for f, e in zip(fractions, exponents, strict=True))


def products(
    fmt: str = "e2m1",
    snc: bool = True,
    compensation: Compensation = True,
    *,
    dtype: Format = "float16",
    hardware: bool = False,
) -> U16:
    """Approximate products of every 16-bit activation with every 4-bit weight, as bit patterns.

    Args:
        fmt: e3m0 (whose products are exact in software: one rounding, infinity on overflow), e2m1 or e1m2.
        snc: convert subnormal weights; False is the ablation.
        compensation: True for the format's constant, "class" for one for each mantissa of the weight.
        dtype: of activations and products.
        hardware: the published hardware model instead of the software (float16): one constant, 43, no clamp
            below 0, and 0.5 in E1M2 becomes 1 or 0 by a pseudo-random bit of the sum.

    Returns:
        uint16 [16, 65536], indexed by [code, pattern of the activation].

    """
    form = get(fmt)
    if hardware:
        return _hardware_products(form)
    if form.mantissa == 0:
        return _exact_products(form, dtype)
    n = _magnitude(PATTERNS)
    codes = np.arange(16)[:, None]
    added = [offset + constant(form, offset, compensation, dtype) for offset in offsets(form, snc, dtype)]
    nonzero = (n != 0) & (codes & 7 != 0)
    return _signed(n + np.array(added * 2, dtype=np.int32)[:, None], _signs(), nonzero)


def constant(fmt: Fp4, offset: int, chosen: Compensation, dtype: Format) -> int:
    """The compensation of the weight with this offset."""
    if chosen == "class":
        return class_compensation(offset % (1 << MANTISSA[dtype]), dtype)
    return compensation(fmt, dtype) if chosen else 0


def _exact_products(fmt: Fp4, dtype: Format) -> U16:
    """Rounded once, with the one NaN of the published hardware."""
    with np.errstate(invalid="ignore", over="ignore"):
        exact = decode(PATTERNS, dtype) * np.array(fmt.values, dtype=np.float32)[:, None]
    return np.where(np.isnan(exact), np.uint16(0x7FFF), encode(exact, dtype))


def _hardware_products(fmt: Fp4) -> U16:
    """Zeros keep their sign, and 15 bits wrap around below 0 as well."""
    codes = np.arange(16)[:, None]
    base = _magnitude(PATTERNS) + _HARDWARE
    n = (base + np.array(offsets(fmt) * 2)[:, None]) & 0x7FFF
    kept = (_magnitude(PATTERNS) != 0) & (codes & 7 != 0)
    if fmt.name == "e1m2":
        half = codes & 7 == 1
        n = np.where(half, base & 0x7FFF, n)
        kept &= ~half | (base >> 9 & 1 == 1)
    products: U16 = (np.where(kept, n, 0) | (_signs() & 0x8000)).astype(np.uint16)
    return products


def _signs() -> U16:
    """The sign of each product [16, 65536], in the top bit."""
    signs: U16 = PATTERNS ^ np.array([0] * 8 + [0x8000] * 8, dtype=np.uint16)[:, None]
    return signs
