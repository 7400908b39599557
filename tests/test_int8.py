"""The int8 linear operator and the two GEMMs that mix8 can run on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from lutserve.kernels import int8, library
from lutserve.quant_methods.int8_gemm import OnednnGemm, VnniGemm

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


@pytest.mark.parametrize("extreme", [-127, 127])
def test_the_longest_row_does_not_overflow(extreme: int) -> None:
    k = int8.MOST_COLUMNS
    codes = torch.full((1, k), extreme, dtype=torch.int8)
    weight = torch.full((1, k), -127, dtype=torch.int8)
    one, none = torch.ones(1, 1), torch.empty(1, 0, dtype=torch.bfloat16)
    out = int8.linear(codes, one, int8.pack(weight), torch.ones(32), none, none.view(0, 1), None)
    assert out.item() == torch.tensor(float(extreme * -127 * k)).bfloat16().item()


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


@pytest.mark.parametrize("gemm", [VnniGemm, OnednnGemm])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "slots"), [(1, 0), (1, 16), (9, 16), (40, 32)])
def test_both_gemms_compute_the_same(
    gemm: type[VnniGemm] | type[OnednnGemm], dtype: torch.dtype, m: int, slots: int
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
