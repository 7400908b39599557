"""`lutserve::linear16` and the layers that use it.

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
from typing import Any

import pytest
import torch
from test_act_and_mul import LEVELS

from lutserve.kernels import isa, library, linear16

DTYPES = [torch.float16, torch.bfloat16]
Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def make(m: int, k: int, n: int, dtype: torch.dtype, biased: bool = True, size: float = 1.0) -> Arguments:
    """x, weight, bias; `size` scales the weight."""
    generator = torch.Generator().manual_seed(m + k + n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    bias = (normal(n) * size).to(dtype) if biased else None
    return normal(m, k).to(dtype), (normal(n, k) * size).to(dtype), bias


def cases() -> Iterator[Arguments]:
    """Every number of rows that has a kernel of its own, several blocks of them, subnormal weights."""
    for dtype in DTYPES:
        for m in (*range(1, 21), 64):
            yield make(m, 37, 45, dtype, biased=m % 2 == 0)
        for m, k, n in ((0, 8, 32), (1, 2048, 64), (3, 1, 1), (4, 300, 31), (7, 129, 33), (500, 24, 40)):
            yield make(m, k, n, dtype)
        yield make(5, 64, 40, dtype, size=0.1 * torch.finfo(dtype).smallest_normal)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The operator, in memory that held NaN before."""
    packed = linear16.pack(weight)
    torch.full((len(x), len(weight)), math.nan, dtype=x.dtype)
    out: torch.Tensor = linear16.linear16(x, packed, len(weight), bias)
    return out


def error(arguments: Arguments, out: torch.Tensor) -> float:
    """Largest error over what is allowed: k + 1 roundings of fp32 sums, and one of the result."""
    x, weight, bias = (None if t is None else t.double() for t in arguments)
    assert x is not None and weight is not None
    k = x.shape[1]
    exact, size = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        exact, size = exact + bias, size + bias.abs()
    info = torch.finfo(out.dtype)
    # Products of bf16 may be subnormal in fp32 and lose 2^-150 each.
    sums = size * (k + 1) * 2.0**-24 + k * 2.0**-150
    allowed = sums + (exact.abs() + sums) * info.eps / 2 + info.smallest_normal * info.eps / 2
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
    for x, weight, bias in cases():
        out = linear16._reference(x, linear16.pack(weight), len(weight), bias)
        assert error((x, weight, bias), out) <= 1


def test_the_scalar_rule_agrees() -> None:
    """One product of Python numbers at a time, from the packed values themselves."""
    library.load()
    x, weight, _ = make(2, 11, 35, torch.bfloat16, biased=False)
    packed = linear16.pack(weight)
    assert packed.is_contiguous() and packed.shape == (2, 16, 32)
    assert torch.equal(linear16.unpack(packed, 35, 11), weight)
    expected = [
        [sum(v * packed[n // 32, k, n % 32].item() for k, v in enumerate(row)) for n in range(35)]
        for row in x.tolist()
    ]
    out = linear16.linear16(x, packed, 35, None)
    torch.testing.assert_close(out.double(), torch.tensor(expected).double(), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("m", [2, 14])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_stays_in_its_row_or_column(bad: float, m: int) -> None:
    library.load()
    x, weight, bias = make(m, 70, 45, torch.float16)
    clean = multiply(x, weight, bias)
    x[1, 69], weight[44, 3] = bad, -bad
    out = multiply(x, weight, bias)
    assert not out[1].isfinite().any() and not out[:, 44].isfinite().any()
    keep = [row for row in range(m) if row != 1]
    assert torch.equal(out[keep, :44], clean[keep, :44])


def test_overflow_is_infinity() -> None:
    library.load()
    x = torch.full((1, 8), 60000.0).half()
    assert multiply(x, torch.ones(3, 8).half(), None).tolist() == [[math.inf] * 3]


def test_the_fake_agrees_with_the_operator() -> None:
    x, weight, bias = make(3, 40, 20, torch.bfloat16)
    torch.library.opcheck(linear16.linear16, (x, linear16.pack(weight), 20, bias))


def test_wrong_arguments_are_refused() -> None:
    library.load()
    x, weight, bias = make(2, 16, 40, torch.float16)
    good = (x, linear16.pack(weight), 40, bias)
    wrong: dict[int, tuple[Any, ...]] = {
        0: (x.float(), x[None], x[:, :8], x.bfloat16()),
        1: (good[1][:1], good[1].bfloat16()),
        2: (39, 80),
        3: (bias[:3], bias.float()),  # type: ignore[index, union-attr]
    }
    for place, values in wrong.items():
        for bad in values:
            with pytest.raises(RuntimeError, match="linear16"):
                linear16.linear16(*[bad if i == place else value for i, value in enumerate(good)])


@pytest.mark.parametrize(
    ("flags", "slow"),
    [
        ((), ()),
        (isa.AVX2.needs, ("float16", "bfloat16")),
        (isa.AVX512.needs, ("float16",)),
        ((*isa.AVX512.needs, "avx512_fp16"), ()),
        ((*isa.AMX.needs, "amx_fp16"), ()),
    ],
)
def test_which_dtypes_are_slow(
    flags: tuple[str, ...], slow: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isa, "cpu_flags", lambda: frozenset(flags))
    assert isa.slow_16_bit() == slow


if __name__ == "__main__":
    print(json.dumps([library.load(), [error(case, multiply(*case)) for case in cases()]]))
