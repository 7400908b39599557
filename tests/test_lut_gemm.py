"""`lutserve::lut_gemm`: the C++ kernel at every instruction-set level, the torch reference and a scalar rule.

Run as a script this file prints how far each case is from the exact result, so that each level gets a
process of its own.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_act_and_mul import LEVELS

from lutserve.kernels import library, lut_gemm
from lutserve.kernels.reference import quantize_rows

DTYPES = [torch.float16, torch.bfloat16]


@dataclass
class Case:
    """Arguments of the operator, and what they were made from."""

    indices: torch.Tensor
    scales: torch.Tensor
    types: torch.Tensor | None
    arguments: tuple

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The result in float64, and the sum of the magnitudes that it is made of."""
        x, _, codebooks, _, _, group, n, bias, quantize = self.arguments
        classes, m, k = x.shape
        books = codebooks.to(x.dtype).double()
        total, size = torch.zeros(m, n).double(), torch.zeros(m, n).double()
        for g, begin in enumerate(range(0, k, group)):
            part = slice(begin, begin + group)
            kind = torch.zeros(n).long() if self.types is None else self.types[:, g].long()
            for c in range(classes):
                values = x[c, :, part].double()
                if quantize:
                    codes, scales = quantize_rows(x[c, :, part])
                    values = codes.double() * scales.double()[:, None]
                weight = (
                    books[kind[:, None], c, self.indices[:, part].long()] * self.scales[:, g, None].double()
                )
                total += values @ weight.T
                size += values.abs() @ weight.abs().T
        return (total, size) if bias is None else (total + bias.double(), size + bias.double().abs())


def make(
    m: int,
    k: int,
    n: int,
    group: int,
    dtype: torch.dtype,
    classes: int = 1,
    kinds: int = 1,
    biased: bool = True,
    quantize: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    groups, panels = -(-k // group), -(-n // lut_gemm.COLUMNS)
    indices = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, groups, generator=generator) * 0.02
    x = torch.randn(classes, m, k, generator=generator).to(dtype)
    codebooks = torch.randn(kinds, classes, 16, generator=generator)
    if quantize:
        codebooks = torch.randint(-127, 128, (1, 1, 16), generator=generator).float()
    types = None
    if kinds > 1:
        types = torch.randint(0, kinds, (panels, groups), dtype=torch.uint8, generator=generator)
    bias = torch.randn(n, generator=generator).to(dtype) if biased else None
    arguments = (
        x,
        lut_gemm.pack(indices),
        codebooks,
        lut_gemm.pack_scales(scales),
        types,
        group,
        n,
        bias,
        quantize,
    )
    wide = None if types is None else types.repeat_interleave(lut_gemm.COLUMNS, 0)[:n]
    return Case(indices, scales, wide, arguments)


def cases() -> Iterator[Case]:
    """Whole tiles and single rows, short last groups, K that is no multiple of anything."""
    for dtype in DTYPES:
        for m, k, n, group in (
            (1, 64, 32, 32),
            (2, 7, 5, 8),
            (3, 100, 70, 32),
            (5, 24, 33, 99),
            (12, 256, 64, 128),
            (13, 2048, 96, 128),
            (40, 136, 31, 64),
            (0, 16, 8, 16),
        ):
            yield make(m, k, n, group, dtype)
            yield make(m, k, n, group, dtype, quantize=True, biased=False)
            yield make(m, k, n, group, dtype, classes=4, kinds=3)


def error(case: Case, out: torch.Tensor) -> float:
    """Largest error over what is allowed: one rounding of the result, and fp32 sums."""
    exact, size = case.exact()
    allowed = exact.abs() * torch.finfo(out.dtype).eps / 2 + size * 3e-6 + 1e-7
    return ((out.double() - exact).abs() / allowed).max().item() if out.numel() else 0.0


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_gives_the_exact_result_rounded(level: str) -> None:
    environment = {**os.environ, "LUTSERVE_ISA": level, "LUTSERVE_BACKEND": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=True
    )
    backend, errors = json.loads(done.stdout)
    assert backend == f"cpu/{level}"
    assert len(errors) == len(list(cases())) and max(errors) <= 1


def test_the_reference_gives_the_exact_result_rounded() -> None:
    for case in cases():
        out = lut_gemm._reference(*case.arguments)
        assert out.shape == (case.arguments[0].shape[1], case.arguments[6])
        assert error(case, out) <= 1


def test_the_scalar_rule_agrees() -> None:
    """One product of Python numbers at a time, from the packed bytes themselves."""
    case = make(2, 21, 35, 8, torch.float16, biased=False)
    x, packed, codebooks, scales, _, group, n, _, _ = case.arguments
    book = codebooks[0, 0].half().tolist()
    expected = []
    for row in x[0].tolist():
        for column in range(n):
            panel, vector, lane = column // 32, column % 32 // 16, column % 16
            total = 0.0
            for k, value in enumerate(row):
                dword = int.from_bytes(bytes(packed[panel, k // 8, vector, lane].tolist()), "little")
                nibble = dword >> 4 * lut_gemm.ORDER.index(k % 8) & 15
                total += value * book[nibble] * scales[panel, k // group, column % 32].item()
            expected.append(total)
    out = lut_gemm.lut_gemm(*case.arguments).float().flatten()
    torch.testing.assert_close(out, torch.tensor(expected), rtol=2**-11, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**31))
def test_packing_loses_nothing(n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    packed = lut_gemm.pack(indices)
    assert packed.is_contiguous()
    assert torch.equal(lut_gemm.unpack(packed, n, k), indices)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 300),
    st.integers(1, 80),
    st.sampled_from([8, 16, 32, 128, 512]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape(m: int, k: int, n: int, group: int, dtype: torch.dtype, quantize: bool, seed: int) -> None:
    library.load()
    case = make(m, k, n, group, dtype, quantize=quantize, seed=seed)
    assert error(case, lut_gemm.lut_gemm(*case.arguments)) <= 1


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_stays_in_its_row(bad: float, quantize: bool) -> None:
    library.load()
    case = make(14, 96, 40, 32, torch.bfloat16, quantize=quantize)
    clean = lut_gemm.lut_gemm(*case.arguments)
    case.arguments[0][0, 13, 95] = bad
    out = lut_gemm.lut_gemm(*case.arguments)
    assert not out[13].isfinite().any()
    assert torch.equal(out[:13], clean[:13])


def test_rows_of_zeros_are_zero() -> None:
    library.load()
    case = make(3, 64, 32, 32, torch.bfloat16, quantize=True, biased=False)
    case.arguments[0][0, 1] = 0
    assert not lut_gemm.lut_gemm(*case.arguments)[1].any()


def test_the_fake_agrees_with_the_operator() -> None:
    torch.library.opcheck(lut_gemm.lut_gemm, make(3, 40, 20, 16, torch.bfloat16, 2, 2).arguments)


def test_wrong_arguments_are_refused() -> None:
    good = make(2, 64, 40, 32, torch.float16).arguments
    wrong = {
        0: (good[0].float(), good[0][0], good[0][:, :, :50]),
        1: (good[1][:1], good[1].int()),
        2: (good[2].half(), good[2].repeat(1, 2, 1), good[2].repeat(2, 1, 1), good[2][..., :8]),
        3: (good[3][:1],),
        4: (torch.zeros(1, 2, dtype=torch.uint8),),
        5: (12, 0, -8),
        6: (39, 80),
        7: (good[7][:3], good[7].bfloat16()),
    }
    library.load()
    for place, values in wrong.items():
        for bad in values:
            with pytest.raises(RuntimeError, match="lut_gemm"):
                lut_gemm.lut_gemm(*[bad if i == place else value for i, value in enumerate(good)])


if __name__ == "__main__":
    print(json.dumps([library.load(), [error(case, lut_gemm.lut_gemm(*case.arguments)) for case in cases()]]))
