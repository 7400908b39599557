"""`axcore_fast`: products to the bit for every activation and code, sums, and what is no number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lutserve.kernels import axcore_fast, library, lut_gemm
from lutserve.luts import fpma, fpma_classes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("snc", "compensation"), [(True, True), (True, "class"), (True, False), (False, False)]
)
@pytest.mark.parametrize("fmt", fpma.FP4, ids=lambda fmt: fmt.name)
def test_an_addition_is_the_published_product(fmt, snc, compensation, dtype) -> None:
    """65,536 activations times 16 codes, where both and the product are normal numbers."""
    form = DTYPES[dtype]
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    wide = bits.view(form).float().view(torch.int32)
    added = torch.from_numpy(fpma_classes.addends([fmt], snc, compensation, dtype))[0]
    found = (wide + added[:, None]).view(torch.float32)
    published = fpma.products(fmt.name, snc, compensation, dtype=dtype)
    expected = torch.from_numpy(published.view(np.int16)).view(form).float()
    tiny, most = torch.finfo(form).tiny, torch.finfo(form).max
    x = bits.view(form).float().abs()
    # Beyond 2**100, and below fp32's own normal numbers, patterns are those of nothing; the operator clamps.
    usable = (x >= max(tiny, 2.0**-57)) & (x <= min(most, 2.0**100))
    same = usable & (expected.abs() >= tiny) & (expected.abs() <= most)
    same &= (found.abs() >= tiny) & (found.abs() <= most)
    same[[0, 8]] = False
    assert torch.equal(found[same], expected[same])
    assert same.sum() > 0.8 * 14 * usable.sum()
    assert (found[[0, 8]][:, usable].abs() <= x[usable] * 2.0**-66).all()


def make(m: int, k: int, n: int, group: int, typed: bool, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, k, generator=generator) * torch.rand(m, k, generator=generator).round()).to(dtype)
    scales = torch.rand(n, k // group, generator=generator)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    kinds = torch.randint(0, 3, (-(-n // 32), k // group), dtype=torch.uint8, generator=generator)
    form = "float16" if dtype == torch.float16 else "bfloat16"
    added = torch.from_numpy(fpma_classes.addends(fpma.FP4 if typed else fpma.FP4[1:2], dtype=form))
    bias = torch.randn(n, generator=generator).to(dtype)
    packed = lut_gemm.pack(codes), added, lut_gemm.pack_scales(scales)
    return x, *packed, kinds if typed else None, group, n, bias


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 9),
    st.integers(1, 80),
    st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(0, 99),
)
def test_any_shape(m: int, octets: int, n: int, typed: bool, dtype: torch.dtype, seed: int) -> None:
    library.load()
    arguments = make(m, 8 * octets, n, 8, typed, dtype, seed)
    found, expected = axcore_fast.axcore_fast(*arguments), axcore_fast._reference(*arguments)
    assert found.shape == (m, n) and found.dtype == dtype
    close = 2e-3 if dtype == torch.float16 else 2e-2
    assert torch.allclose(found.float(), expected.float(), rtol=close, atol=close)
    wide = torch.cat([arguments[0], arguments[0]], 1)[:, : 8 * octets]
    assert torch.equal(axcore_fast.axcore_fast(wide, *arguments[1:]), found)


@pytest.mark.parametrize("m", [1, 7])
def test_zeros_and_what_is_no_number(m: int) -> None:
    library.load()
    arguments = make(m, 64, 40, 64, False, torch.bfloat16)[:-1]
    for call in (axcore_fast.axcore_fast, axcore_fast._reference):
        assert call(torch.zeros(m, 64).bfloat16(), *arguments[1:], None).abs().max() < 1e-12
        x = arguments[0].clone()
        clean = call(x, *arguments[1:], None)
        x[0, 3], x[-1, 5] = torch.nan, torch.inf
        out = call(x, *arguments[1:], None)
        assert out[0].isnan().all() and torch.equal(out[1:-1], clean[1:-1])
        assert m == 1 or not out[-1].isnan().any()


def test_what_does_not_fit_is_refused() -> None:
    library.load()
    arguments = make(1, 64, 32, 64, True, torch.float16)
    for place, value in ((0, arguments[0].float()), (2, arguments[2].float()), (4, None), (5, 24), (6, 33)):
        wrong = (*arguments[:place], value, *arguments[place + 1 :])
        for call in (axcore_fast.axcore_fast, axcore_fast._reference):
            with pytest.raises(RuntimeError, match="axcore_fast"):
                call(*wrong)
