"""Approximate multiplication: against Python integers, golden arrays, digests, for all inputs."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutserve.errors import UserError
from lutserve.luts import fpma, fpma_classes
from lutserve.luts.bits import PATTERNS, decode, decode64

WORD = st.integers(0, 0xFFFF)
BIAS = {"float16": 0x3C00, "bfloat16": 0x3F80}


# The second implementation: integers of Python, one product at a time.


def scalar_fpma(a: int, b: int, c: int, bias: int = 0x3C00) -> int:
    if not a % 32768 or not b % 32768:
        return 0
    return max(0, a % 32768 + b % 32768 - bias + c) % 32768 + 32768 * (a // 32768 != b // 32768)


def scalar_divide(a: int, b: int, bias: int = 0x3C00) -> int:
    if not a % 32768:
        return 0
    return max(0, a % 32768 + bias - b % 32768) % 32768 + 32768 * (a // 32768 != b // 32768)


def scalar_offset(fmt: str, code: int, snc: bool, mantissa: int) -> int:
    """From the definition of the formats: exponent and mantissa bits of a code."""
    bits, bias = {"e3m0": (0, 3), "e2m1": (1, 1), "e1m2": (2, 0)}[fmt]
    exponent, fraction = code >> bits, Fraction(code & (1 << bits) - 1, 1 << bits)
    if snc and exponent == 0:
        exponent = 1
        while fraction and fraction < 1:
            fraction, exponent = 2 * fraction, exponent - 1
        fraction -= 1
    return int((exponent - bias + fraction) * 2**mantissa)


def scalar_product(a: int, code: int, offset: int, c: int) -> int:
    if not a % 32768 or not code % 8:
        return 0
    return max(0, a % 32768 + offset + c) % 32768 + 32768 * (a // 32768 != code // 8)


def scalar_hardware(a: int, code: int, fmt: str, offset: int) -> int:
    sign = 32768 * (a // 32768 != code // 8)
    n = a % 32768 + 43
    if not a % 32768 or not code % 8:
        return sign
    if fmt == "e1m2" and code % 8 == 1:
        return sign + (n % 32768 if n // 512 % 2 else 0)
    return sign + (n + offset) % 32768


def mean_error(weights: list[Fraction], mantissa: int) -> Fraction:
    """Mean of (exact product's pattern - sum of patterns), over all mantissas of the activation."""
    one = 2**mantissa
    total = Fraction(0)
    for b in weights:
        for i in range(one):
            exact = (1 + Fraction(i, one)) * (1 + b)
            total += one * ((exact - 1 if exact < 2 else exact / 2) - (Fraction(i, one) + b))
    return total / (one * len(weights))


def test_the_constants_follow_from_their_formula() -> None:
    for dtype, mantissa, expected in (("float16", 10, [0, 43, 54]), ("bfloat16", 7, [0, 5, 7])):
        for fmt, constant in zip(fpma.FP4, expected, strict=True):
            cells = [Fraction(i, 1 << fmt.mantissa) for i in range(1 << fmt.mantissa)]
            assert round(mean_error(cells, mantissa)) == constant == fpma.compensation(fmt, dtype)  # type: ignore[arg-type]
            for cell in cells:
                found = fpma.class_compensation(int(cell * 2**mantissa), dtype)  # type: ignore[arg-type]
                assert found == round(mean_error([cell], mantissa))
    assert [fpma.class_compensation(mu) for mu in (0, 256, 512, 768)] == [0, 77, 85, 55]
    assert fpma.uniform() == 58 and fpma.uniform("bfloat16") == 7


@pytest.mark.parametrize(("dtype", "mantissa"), [("float16", 10), ("bfloat16", 7)])
def test_the_table_of_64_constants(dtype: Any, mantissa: int) -> None:
    one = 2**mantissa
    for i in range(8):
        for j in range(8):
            cells = [Fraction(k, one) for k in range(j * one // 8, (j + 1) * one // 8, max(1, one // 64))]
            mean = np.mean([float(mean_error_cell(i, b, mantissa)) for b in cells])
            assert fpma.table(dtype)[i, j] == pytest.approx(mean, abs=1 + one / 128)
    assert np.array_equal(fpma.table(dtype), fpma.table(dtype).T)


def mean_error_cell(i: int, b: Fraction, mantissa: int) -> Fraction:
    """Mean error of one eighth of the activations' mantissas, from its ends and middle (Simpson's rule)."""
    one = 2**mantissa

    def error(a: Fraction) -> Fraction:
        exact = (1 + a) * (1 + b)
        return one * ((exact - 1 if exact < 2 else exact / 2) - (a + b))

    low, high = Fraction(i, 8), Fraction(i + 1, 8)
    return (error(low) + 4 * error((low + high) / 2) + error(high)) / 6


@given(WORD, WORD)
def test_scalar_operations(a: int, b: int) -> None:
    x, y = np.array([a], dtype=np.uint16), np.array([b], dtype=np.uint16)
    for dtype, shift in (("float16", 7), ("bfloat16", 4)):
        bias = BIAS[dtype]
        cell = int(fpma.table(dtype)[a >> shift & 7, b >> shift & 7])  # type: ignore[arg-type]
        assert fpma.fpma(x, y, dtype=dtype)[0] == scalar_fpma(a, b, 0, bias)  # type: ignore[arg-type]
        assert fpma.fpma(x, y, 58, dtype)[0] == scalar_fpma(a, b, 58, bias)  # type: ignore[arg-type]
        assert fpma.l_mul(x, y, dtype)[0] == scalar_fpma(a, b, 64 if bias == 0x3C00 else 8, bias)  # type: ignore[arg-type]
        assert fpma.table_fpma(x, y, dtype)[0] == scalar_fpma(a, b, cell, bias)  # type: ignore[arg-type]
        assert fpma.divide(x, y, dtype)[0] == scalar_divide(a, b, bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("chosen", [False, True, "class"])
@pytest.mark.parametrize("snc", [False, True])
@pytest.mark.parametrize("fmt", ["e2m1", "e1m2"])
def test_every_product(fmt: str, snc: bool, chosen: Any) -> None:
    found = fpma.products(fmt, snc, chosen)
    assert found.dtype == np.uint16 and found.shape == (16, 65536)
    single = {"e2m1": 43, "e1m2": 54}[fmt]
    for code in range(16):
        offset = scalar_offset(fmt, code % 8, snc, 10)
        c = {0: 0, 256: 77, 512: 85, 768: 55}[offset % 1024] if chosen == "class" else single * bool(chosen)
        assert found[code].tolist() == [scalar_product(a, code, offset, c) for a in range(65536)]


@pytest.mark.parametrize("fmt", ["e2m1", "e1m2"])
def test_every_product_in_bfloat16(fmt: str) -> None:
    found = fpma.products(fmt, dtype="bfloat16")
    for code in range(16):
        offset, c = scalar_offset(fmt, code % 8, True, 7), {"e2m1": 5, "e1m2": 7}[fmt]
        assert found[code].tolist() == [scalar_product(a, code, offset, c) for a in range(65536)]


@pytest.mark.parametrize("fmt", ["e3m0", "e2m1", "e1m2"])
def test_every_product_of_the_hardware(fmt: str) -> None:
    found = fpma.products(fmt, hardware=True)
    for code in range(16):
        offset = scalar_offset(fmt, code % 8, True, 10)
        assert found[code].tolist() == [scalar_hardware(a, code, fmt, offset) for a in range(65536)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_e3m0_products_are_exact(dtype: Any) -> None:
    values = decode64(PATTERNS, dtype)
    weights = [0.0, 0.25, 0.5, 1, 2, 4, 8, 16]
    largest = 65520.0 if dtype == "float16" else 2.0**128 * (1 - 2.0**-9)
    for code, row in enumerate(fpma.products("e3m0", dtype=dtype)):
        with np.errstate(invalid="ignore"):
            exact = values * (weights[code % 8] * (-1.0) ** (code // 8))
        found = decode64(row, dtype)
        bad = np.isnan(exact)
        assert (row[bad] == 0x7FFF).all()
        assert np.isinf(found[np.abs(exact) >= largest]).all()
        normal = (np.abs(exact) >= 2.0**-14) & (np.abs(exact) < largest)
        assert np.array_equal(found[normal], exact[normal])
        assert np.array_equal(np.signbit(found[~bad]), np.signbit(exact[~bad]))
        if dtype == "float16":
            small = np.abs(exact) < 2.0**-14
            assert np.array_equal(found[small], np.rint(exact[small] * 2**24) / 2**24)


#: sha256 of the little-endian products
DIGESTS = {
    ("e3m0", True, True, False): "0d58f3eb8771b483bd3962f8b5a5615d",
    ("e2m1", False, False, False): "cbb15af3f34a3947cf98e94419918a28",
    ("e2m1", True, True, False): "d0e7f6c4445d527c271f32eb60a86683",
    ("e1m2", True, True, False): "9ae5a4eae4468e62d4b7712a8b2dbf5c",
    ("e3m0", True, True, True): "bdc1740b393c508861fc232e44dc919f",
    ("e2m1", True, True, True): "ffb17f727703cd26d3564952f535590d",
}


@pytest.mark.parametrize("case", DIGESTS)
def test_digests(case: tuple[str, bool, bool, bool]) -> None:
    fmt, snc, chosen, hardware = case
    found = fpma.products(fmt, snc, chosen, hardware=hardware)
    assert hashlib.sha256(found.astype("<u2").tobytes()).hexdigest()[:32] == DIGESTS[case]


def test_golden_products(shared: Path) -> None:
    stored = np.load(shared / "golden/axcore/products.npz")
    cases = {
        "e3m0": fpma.products("e3m0"),
        "e2m1_base": fpma.products("e2m1", snc=False, compensation=False),
        "e2m1_sc": fpma.products("e2m1"),
        "derived_e2m1_c": fpma.products("e2m1", snc=False),
        "derived_e1m2_base": fpma.products("e1m2", snc=False, compensation=False),
        "derived_e1m2_s": fpma.products("e1m2", compensation=False),
        "derived_e1m2_c": fpma.products("e1m2", snc=False),
        "hw_e3m0": fpma.products("e3m0", hardware=True),
        "hw_e2m1": fpma.products("e2m1", hardware=True),
    }
    assert cases.keys() == set(stored.files)
    for name, found in cases.items():
        assert np.array_equal(np.cumsum(stored[name], axis=1, dtype=np.uint16), found), name


def test_golden_scalar_operations(shared: Path) -> None:
    stored = np.load(shared / "golden/axcore/scalar_ops.npz")
    a, b = stored["a"], stored["b"]
    assert np.array_equal(fpma.table(), stored["fpma_tab8_table"])
    assert np.array_equal(fpma.fpma(a, b), stored["fpma_c0"])
    assert np.array_equal(fpma.fpma(a, b, fpma.uniform()), stored["fpma_c58"])
    assert np.array_equal(fpma.table_fpma(a, b), stored["fpma_tab8"])
    assert np.array_equal(fpma.l_mul(a, b), stored["lmul"])
    assert np.array_equal(fpma.divide(a, b), stored["fpma_div_c0"])


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UserError, match=r"'e2m2'; allowed: e3m0, e2m1, e1m2"):
        fpma.products("e2m2")


# The decomposition into classes.


def decomposed(classes: fpma_classes.Classes, tables: np.ndarray) -> np.ndarray:
    """Sum over classes of codebook times map, float64 [16, 65536]."""
    with np.errstate(invalid="ignore"):
        return np.einsum("ck,cn->kn", classes.codebooks[0].astype(np.float64), tables)


#: format, snc, compensation -> products of a normal activation that differ from `maps`, because the map stops
#: at the largest number before a weight below 1 brings the product back
STOPPED = {
    ("e3m0", True, True): 0,
    ("e2m1", False, False): 2048,
    ("e2m1", True, False): 0,
    ("e2m1", True, True): 172,
    ("e2m1", True, "class"): 0,
    ("e1m2", True, False): 0,
    ("e1m2", True, True): 216,
    ("e1m2", True, "class"): 0,
}


@pytest.mark.parametrize("case", STOPPED)
def test_where_the_classes_give_the_products(case: tuple[str, bool, Any]) -> None:
    fmt, snc, chosen = case
    exact = decode64(fpma.products(fmt, snc, chosen), "float16")
    classes = fpma_classes.classes([fpma.get(fmt)], snc, chosen)
    n = (PATTERNS & 0x7FFF).astype(int)
    real = (n > 0) & (n < 0x7C00) & (np.arange(16) % 8 != 0)[:, None]
    size = np.abs(exact)
    wrapped = (n >= 0x6000) & (size < 1)
    normal = real & (size > 2.0**-14) & (size < 65536) & ~wrapped
    maps = decomposed(classes, decode64(fpma_classes.maps(classes.shifts), "float16"))
    differ = maps != exact
    assert (differ & normal & (n >= 0x400)).sum() == STOPPED[case]
    # Not one where 2**-13 <= |a| <= 2**15 (and E3M0 does not go below the normal numbers).
    assert not (differ & normal & (n >= 0x800) & (n <= 0x7800)).any()
    assert np.abs(maps - exact)[real & (n < 0x1000)].max() <= 2.0**-13
    zero = (n == 0) | (np.arange(16) % 8 == 0)[:, None]
    assert (maps[zero & (n < 0x7C00)] == 0).all() and (exact[zero & (n < 0x7C00)] == 0).all()
    if fmt != "e3m0":
        logs = decomposed(classes, fpma_classes.log_maps(classes.shifts).astype(np.float64))
        assert not (logs != exact)[normal].any()
        assert np.abs(logs - exact)[real & (n < 0x1000)].max() <= 2.0**-15


def test_maps_by_python_integers() -> None:
    shifts = fpma_classes.classes().shifts
    assert shifts == (0, 43, 54, 310, 555, 566, 822)
    for shift, row, logs in zip(
        shifts, fpma_classes.maps(shifts), fpma_classes.log_maps(shifts), strict=True
    ):
        for a in range(0, 65536, 7):
            n, sign = a % 32768, a // 32768 * 32768
            expected = n if n == 0 or n > 0x7C00 else min(n + shift, 0x7BFF)
            assert row[a] == expected + sign
            exponent, mantissa = divmod(n + shift, 1024)
            value = math.ldexp(1024 + mantissa, exponent - 25) if n else 0.0
            assert logs[a] == (-value if sign else value)


def test_bfloat16_maps_never_leave_the_format() -> None:
    classes = fpma_classes.classes(dtype="bfloat16")
    assert classes.shifts == (0, 5, 7, 39, 69, 71, 103)
    maps = fpma_classes.maps(classes.shifts, "bfloat16")
    n = PATTERNS & 0x7FFF
    assert np.isfinite(decode(maps, "bfloat16"))[:, n <= 0x7F80].all()
    assert np.isnan(decode(maps, "bfloat16"))[:, n > 0x7F80].all()
    one = classes.codebooks[1].astype(np.float64)
    exact = decode64(fpma.products("e2m1", dtype="bfloat16"), "bfloat16")
    found = np.einsum("ck,cn->kn", one, np.nan_to_num(decode64(maps, "bfloat16")))
    middle = (n >= 0x1000) & (n <= 0x7000)
    assert np.array_equal(found[:, middle], exact[:, middle])


def test_classes_of_one_constant_for_each_mantissa_are_shared_by_the_formats() -> None:
    classes = fpma_classes.classes(compensation="class")
    assert classes.shifts == (0, 333, 597, 823)
    assert (np.count_nonzero(classes.codebooks, axis=1)[:, 1:8] == 1).all()
    assert (classes.codebooks[:, :, [0, 8]] == 0).all()
    assert np.array_equal(classes.codebooks[:, :, 9:], -classes.codebooks[:, :, 1:8])
