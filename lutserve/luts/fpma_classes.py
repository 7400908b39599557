"""mpFPMA as an exact matrix product: a product depends on the weight's exponent only through a power of two.

An offset is a whole number of exponents and a remainder, offset = 2**10 * e + mu (bfloat16: 2**7), so

    product(a, w) = sign(w) * 2**e(w) * g(a),   g(a) = the activation whose pattern is n(a) + mu + C

and a linear layer is the sum over the classes (the values of mu + C) of g(x) @ W^T, where W holds +-2**e at
its class's weights and 0 elsewhere. `lutserve::lut_gemm` computes that from `maps` and `Classes.codebooks`.

It equals `fpma.products` to the bit unless the activation or the product is subnormal, or a pattern would be
that of an infinity: there the published integers are no sensible products. The maps go on linearly below, and
stay at the largest number above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lutserve.luts.bits import F32, PATTERNS, U16, Format
from lutserve.luts.fpma import FP4, MANTISSA, Compensation, Fp4, constant, offsets

_INFINITY: dict[Format, int] = {"float16": 0x7C00, "bfloat16": 0x7F80}


@dataclass(frozen=True, eq=False)
class Classes:
    """How the products of some formats split into classes.

    shifts: what each class adds to an activation's pattern, C numbers.
    codebooks: fp32 [T, C, 16]: +-2**e of every code of every format, 0 outside its class.
    """

    shifts: tuple[int, ...]
    codebooks: F32


def classes(
    formats: Sequence[Fp4] = FP4,
    snc: bool = True,
    compensation: Compensation = True,
    dtype: Format = "float16",
) -> Classes:
    """Split the products of `formats`, as `fpma.products` has them; classes that are equal are shared."""
    one = 1 << MANTISSA[dtype]
    terms: dict[tuple[int, int, int], float] = {}  # type, shift, code -> +-2**e
    for kind, fmt in enumerate(formats):
        for code, offset in enumerate(offsets(fmt, snc, dtype)[1:], start=1):
            # Formats without a mantissa have exact products.
            c = constant(fmt, offset, compensation, dtype) if fmt.mantissa else 0
            for sign in (0, 1):
                terms[kind, offset % one + c, code + 8 * sign] = (-1) ** sign * 2.0 ** (offset // one)
    shifts = tuple(sorted({shift for _, shift, _ in terms}))
    codebooks = np.zeros((len(formats), len(shifts), 16), dtype=np.float32)
    for (kind, shift, code), value in terms.items():
        codebooks[kind, shifts.index(shift), code] = value
    return Classes(shifts, codebooks)


def addends(
    formats: Sequence[Fp4] = FP4,
    snc: bool = True,
    compensation: Compensation = True,
    dtype: Format = "float16",
) -> npt.NDArray[np.int32]:
    """What each code adds to the fp32 pattern of an activation of `dtype`, int32 [T, 16].

    The sum is the pattern of the product, as `maps` and codebooks have it with an exponent that never ends.
    Zero adds -67 exponents, which leaves next to nothing.
    """
    unit = 1 << 23 - MANTISSA[dtype]
    table = np.full((len(formats), 2, 8), -67 << 23, dtype=np.int64)
    for kind, fmt in enumerate(formats):
        for code, offset in enumerate(offsets(fmt, snc, dtype)[1:], start=1):
            table[kind, :, code] = unit * (
                offset + (constant(fmt, offset, compensation, dtype) if fmt.mantissa else 0)
            )
    table[:, 1] += 1 << 31
    return table.reshape(-1, 16).astype(np.uint32).view(np.int32)


def maps(shifts: Sequence[int], dtype: Format = "float16") -> U16:
    """The activation map of each class as a table, uint16 [C, 65536] of patterns of `dtype`.

    A pattern from the largest number on (infinity included) gives the largest number, NaN gives NaN.
    """
    n, infinity = (PATTERNS & 0x7FFF).astype(np.int32), _INFINITY[dtype]
    moved = np.minimum(n + np.array(shifts, dtype=np.int32)[:, None], infinity - 1)
    magnitude = np.where((n == 0) | (n > infinity), n, moved)
    table: U16 = (magnitude | (PATTERNS & 0x8000)).astype(np.uint16)
    return table


def log_maps(shifts: Sequence[int]) -> F32:
    """The same for float16 with an exponent that never ends: fp32 [C, 65536], where `maps` would stop.

    A subnormal pattern is read as the published integers read it, with a hidden one, so only products that
    are subnormal or overflow themselves differ from `fpma.products`.
    """
    n = (PATTERNS & 0x7FFF).astype(np.int64)
    k = n + np.array(shifts)[:, None]
    value = np.ldexp(1 + (k & 1023) / 1024, k // 1024 - 15)
    signed: npt.NDArray[np.float64] = np.where(n == 0, 0.0, np.where(PATTERNS >> 15 == 1, -value, value))
    return signed.astype(np.float32)
