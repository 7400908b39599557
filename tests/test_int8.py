"""The int8 linear operator and the two GEMMs that mix8 can run on.

Run as a script this file compares exact sums with the operator's, so that each instruction-set level gets a
process of its own.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from test_act_and_mul import LEVELS

from lutserve.errors import UserError
from lutserve.kernels import int8, isa, library
from lutserve.quant_methods import int8_gemm
from lutserve.quant_methods.int8_gemm import FusedGemm, Int8Gemm, OnednnGemm

DTYPES = [torch.float16, torch.bfloat16]
#: rows, input and output columns, slots: whole tiles, single rows, odd remainders of every kind
SHAPES = [
    (1, 64, 32, 0),
    (1, 33, 1, 3),
    (2, 1, 31, 1),
    (5, 100, 33, 16),
    (7, 30, 64, 0),
    (12, 576, 96, 5),
    (13, 63, 70, 16),
    (25, 2048, 40, 128),
    (300, 130, 130, 7),
    (0, 8, 8, 0),
]


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    library.load()


def integers(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


def normal(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(
    m: int, k: int, n: int, slots: int, dtype: torch.dtype, biased: bool
) -> list[torch.Tensor | None]:
    """Codes, scales, packed weight, its scales, outlier values and weights, and bias."""
    padded = -(-n // int8.COLUMNS) * int8.COLUMNS
    return [
        integers(m, k, seed=1),
        torch.rand(m, 1, generator=torch.Generator().manual_seed(2)) * 0.01,
        int8.pack(integers(n, k, seed=3)),
        torch.rand(padded, generator=torch.Generator().manual_seed(4)) * 0.01,
        normal(m, slots, seed=5, dtype=dtype),
        normal(slots, n, seed=6, dtype=dtype),
        normal(n, seed=7, dtype=dtype) if biased else None,
    ]


def scalar_linear(
    codes: list[list[int]], scales: list[float], weight: list[list[int]], weight_scales: list[float]
) -> list[list[float]]:
    """The int8 part, one product of Python integers at a time."""
    return [
        [
            sum(a * b for a, b in zip(row, column, strict=True)) * scale * other
            for column, other in zip(weight, weight_scales, strict=True)
        ]
        for row, scale in zip(codes, scales, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_equals_the_exact_result_rounded(
    shape: tuple[int, int, int, int], biased: bool, dtype: torch.dtype
) -> None:
    given_arguments = arguments(*shape, dtype, biased)
    codes, scales, _, weight_scales, side, outliers, bias = given_arguments
    n = shape[2]
    weight = integers(n, shape[1], seed=3)
    parts = [
        codes.double() @ weight.double().T * scales.double() * weight_scales[:n].double(),
        side.double() @ outliers.double(),
        torch.zeros(n).double() if bias is None else bias.double(),
    ]
    exact, size = (
        sum(parts),
        sum(part.abs() for part in parts) + side.double().abs() @ outliers.double().abs(),
    )
    for linear in (int8.linear, int8._reference):
        out = linear(*given_arguments)
        assert out.dtype == dtype and out.shape == (shape[0], n)
        allowed = exact.abs() * torch.finfo(dtype).eps / 2 + size * 2e-6 + torch.finfo(dtype).tiny
        assert ((out.double() - exact).abs() <= allowed).all()


#: values that alternate in a row; -128 is a code that no quantiser makes
PATTERNS = [(127, 127), (-127, -127), (127, -127), (127, 0), (-128, -128)]


def pattern(values: tuple[int, int], rows: int, k: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8).repeat(rows, -(-k // 2))[:, :k].contiguous()


def matrices() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Codes [M, K] and weights [N, K]: extremes, all small numbers of rows, odd sizes, the longest row."""
    for a in PATTERNS:
        for b in PATTERNS:
            yield pattern(a, 5, 101), pattern(b, 35, 101)
        yield pattern(a, 2, int8.MOST_COLUMNS), pattern((-127, -127), 3, int8.MOST_COLUMNS)
        yield pattern(a, 2, int8.MOST_COLUMNS), pattern((-128, 127), 3, int8.MOST_COLUMNS)
    for m in range(1, 41):
        yield integers(m, 60 + m, seed=m), integers(7 + 3 * m, 60 + m, seed=99 + m)


def residue(linear: Callable[..., torch.Tensor], codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what is left of the int8 sums where outlier columns take the exact ones, in fp32, away: zeros.

    An fp32 number is the sum of three bf16 ones, so three outlier columns a row do it without rounding, and
    the result's own few bits hide nothing.
    """
    m, rest = len(codes), (codes.long() @ weight.long().T).float()
    parts = []
    for _ in range(3):
        parts.append(-rest.bfloat16())
        rest = rest + parts[-1].float()
    assert not rest.any()
    side, outliers = torch.eye(m).repeat(1, 3).bfloat16(), torch.cat(parts)
    scales = torch.ones(-(-len(weight) // int8.COLUMNS) * int8.COLUMNS)
    return linear(codes, torch.ones(m), int8.pack(weight), scales, side, outliers, None)


@pytest.mark.parametrize("level", LEVELS)
def test_sums_are_exact_at_every_level(level: str) -> None:
    environment = {**os.environ, "LUTSERVE_ISA": level, "LUTSERVE_BACKEND": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [f"cpu/{level}", [0.0] * len(list(matrices()))]


def test_sums_of_the_reference_are_exact() -> None:
    assert all(not residue(int8._reference, *pair).any() for pair in matrices())


def test_residue_sees_a_sum_that_is_off_by_one() -> None:
    codes, weight = integers(3, 90, seed=1), integers(5, 90, seed=2)
    other = codes.clone()
    other[1, 7] += 1
    left = residue(lambda codes, *rest: int8.linear(other, *rest), codes, weight)
    assert left[1].tolist() == weight[:, 7].tolist() and not left[[0, 2]].any()


def test_the_scalar_rule_agrees() -> None:
    m, k, n = 3, 21, 5
    arguments_ = arguments(m, k, n, 0, torch.float16, False)
    codes, scales, _, weight_scales = arguments_[:4]
    expected = scalar_linear(
        codes.tolist(), scales[:, 0].tolist(), integers(n, k, seed=3).tolist(), weight_scales[:n].tolist()
    )
    torch.testing.assert_close(
        int8.linear(*arguments_).float(), torch.tensor(expected), rtol=2**-11, atol=1e-7
    )


def test_nothing_is_written_outside_and_nothing_read_before() -> None:
    """A scale that is no number stays in its own row; the output starts as whatever memory holds."""
    arguments_ = arguments(14, 70, 45, 4, torch.bfloat16, True)
    clean = int8.linear(*arguments_)
    arguments_[1] = arguments_[1].clone()
    arguments_[1][13] = math.nan
    out = int8.linear(*arguments_)
    assert out[13].isnan().all()
    assert torch.equal(out[:13], clean[:13])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**31))
def test_packing_loses_nothing(n: int, k: int, seed: int) -> None:
    codes = integers(n, k, seed=seed)
    packed = int8.pack(codes)
    assert torch.equal(int8.columns_of(packed, torch.arange(k), n), codes.T)
    for c, j in ((0, 0), (n - 1, k - 1)):
        assert packed[c // 32, j // 4, c % 32, j % 4].item() == codes[c, j].item() + 128


def test_the_fake_agrees_with_the_operator() -> None:
    torch.library.opcheck(int8.linear, tuple(arguments(3, 20, 40, 16, torch.bfloat16, True)))


def test_wrong_arguments_are_refused() -> None:
    good = arguments(2, 8, 40, 4, torch.float16, True)
    wrong = {
        0: torch.zeros(2, 8),
        1: torch.zeros(3, 1),
        2: good[2][:1],
        3: torch.zeros(40),
        4: good[4][:, :3],
        5: good[5].bfloat16(),
        6: torch.zeros(39).half(),
    }
    for place, bad in wrong.items():
        with pytest.raises(RuntimeError):
            int8.linear(*[bad if i == place else argument for i, argument in enumerate(good)])


ONEDNN = pytest.param(
    OnednnGemm,
    marks=pytest.mark.skipif(not int8_gemm.onednn_is_exact(), reason="oneDNN is not exact on this CPU"),
)


@pytest.mark.parametrize("gemm", [FusedGemm, ONEDNN])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "slots"), [(1, 0), (1, 16), (9, 16), (40, 32)])
def test_both_gemms_compute_the_same(
    gemm: type[FusedGemm] | type[OnednnGemm], dtype: torch.dtype, m: int, slots: int
) -> None:
    k, n = 96, 48
    weight, weight_scales = integers(n, k, seed=8), torch.rand(n) * 0.01
    codes, scales = integers(m, k, seed=9), torch.rand(m, 1) * 0.01
    side, outliers = normal(m, slots, seed=10, dtype=dtype), normal(slots, n, seed=11, dtype=dtype)
    bias = normal(n, seed=12, dtype=dtype)
    linear = gemm(weight, weight_scales, dtype)
    exact = codes.double() @ weight.double().T * scales.double() * weight_scales.double()
    exact += side.double() @ outliers.double() + bias.double()
    error = linear(codes, scales, side, outliers, bias).double() - exact
    # oneDNN's result is rounded before the outliers are added, so up to twice.
    assert error.norm() <= exact.norm() * torch.finfo(dtype).eps
    columns = torch.tensor([0, 95, 17])
    assert torch.equal(linear.columns(columns), (weight[:, columns].T * weight_scales).to(dtype))
    assert linear.columns(columns[:0]).shape == (0, n)


def chosen(k: int = 8) -> Int8Gemm:
    return int8_gemm.choose(torch.zeros(3, k, dtype=torch.int8), torch.ones(3), torch.bfloat16)


@pytest.mark.parametrize("m", [1, 2, 9, 40])
def test_the_gemm_of_this_machine_is_exact(m: int) -> None:
    """One rounding of the exact sums, to the bit. oneDNN without VNNI is far off."""
    k, n = 515, 70
    for codes in (integers(m, k, seed=13), *(pattern(values, m, k) for values in PATTERNS[:4])):
        for weight in (integers(n, k, seed=14), *(pattern(values, n, k) for values in PATTERNS[:4])):
            gemm = int8_gemm.choose(weight, torch.ones(n), torch.bfloat16)
            side, outliers = torch.empty(m, 0).bfloat16(), torch.empty(0, n).bfloat16()
            out = gemm(codes, torch.ones(m, 1), side, outliers, None)
            assert torch.equal(out, (codes.long() @ weight.long().T).bfloat16())


def test_the_gemm_without_kernels_is_exact() -> None:
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "gemm_of_this_machine"]
    environment = {**os.environ, "LUTSERVE_BACKEND": "reference"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("flags", "backend", "gemm"),
    [
        ({"avx2"}, "cpu/avx2", FusedGemm),
        ({"avx2", "avx_vnni"}, "cpu/avx2", FusedGemm),
        ({"avx2", "avx512bw"}, "cpu/avx512", FusedGemm),
        ({"avx2", "avx512bw", "avx512_vnni"}, "cpu/avx512", OnednnGemm),
        (set(isa.AVX512_BF16.needs), "cpu/avx512_bf16", FusedGemm),
        (set(isa.AMX.needs), "cpu/amx", OnednnGemm),
        (set(), "cpu/portable", FusedGemm),
        ({"avx2"}, "reference", FusedGemm),
        (set(), "reference", FusedGemm),
    ],
)
def test_which_gemm_serves_which_cpu(
    flags: set[str], backend: str, gemm: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isa, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(library, "backend_for", lambda op: backend)
    assert type(chosen()) is gemm


def test_a_row_too_long_is_refused() -> None:
    assert chosen(int8.MOST_COLUMNS).columns(torch.tensor([0])).shape == (1, 3)
    with pytest.raises(UserError, match="at most 65536 input columns, this layer has 65537"):
        chosen(int8.MOST_COLUMNS + 1)


if __name__ == "__main__":
    backend = library.load()
    print(json.dumps([backend, [residue(int8.linear, *pair).abs().max().item() for pair in matrices()]]))
