"""`mixq_prepare`, `mixq_add_outliers` and `int8_linear_rows` against the torch reference."""

from __future__ import annotations

import pytest
import torch

from lutserve.kernels import int8, mixq
from lutserve.quantizers.outliers import places

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def sample(m, k, dtype, seed=0, spread=0.0):
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(m, k, generator=random) * torch.exp(torch.randn(m, 1, generator=random) * spread)).to(
        dtype
    )


def compare(served, x, index, keep):
    before = x.clone()
    found, want = served("mixq_prepare")(x, index, keep), mixq._reference(x, index, keep)
    assert torch.equal(x.view(torch.int16), before.view(torch.int16))
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(found, want, strict=True))
    rows = want[1][:, 0].isfinite()
    assert torch.equal(found[0][rows], want[0][rows])
    assert torch.equal(found[1].view(torch.int32)[rows], want[1].view(torch.int32)[rows])
    assert (
        torch.equal(found[1][~rows].isnan(), want[1][~rows].isnan()) and not found[1][~rows].isfinite().any()
    )
    assert torch.equal(found[2].view(torch.int16), want[2].view(torch.int16))
    torch.testing.assert_close(found[3][rows], want[3][rows], rtol=1e-5, atol=0)
    if rows.all():
        torch.testing.assert_close(found[4], want[4], rtol=1e-5, atol=0)


@each_dtype
@pytest.mark.parametrize(("m", "k"), [(1, 576), (5, 100), (3, 4500), (0, 64), (3, 33), (2, 1), (9, 2048)])
def test_prepare(served, m, k, dtype):
    x = sample(m, k + 3, dtype, spread=3.0)[:, 1 : k + 1]
    if m > 2:
        x[1] = 0
        x[2, k // 2] = torch.finfo(dtype).max
    columns = torch.randperm(k, generator=torch.Generator().manual_seed(k))[: k // 8].sort().values
    compare(served, x, *places(k, columns))


@each_dtype
def test_every_pattern_is_quantised_alike(served, dtype):
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    compare(served, patterns.view(64, -1), *places(1024, torch.arange(3, 40)))


@each_dtype
def test_gate_and_prepare(served, dtype):
    x, table = sample(5, 140, dtype), sample(256, 256, dtype, 1).flatten()
    given = x, table, *places(70, torch.arange(3, 20))
    found, want = served("mixq_gate_and_prepare")(*given), mixq._gate_reference(*given)
    for a, b in zip(found[:4], want[:4], strict=True):
        assert torch.equal(a, b)


@each_dtype
def test_add_outliers(served, dtype):
    out, side, weight = sample(5, 37, dtype, 1), sample(5, 16, dtype, 2), sample(16, 37, dtype, 3)
    want = out.clone()
    mixq._add_reference(want, side, weight)
    served("mixq_add_outliers")(out, side, weight)
    torch.testing.assert_close(out, want, rtol=torch.finfo(dtype).eps, atol=1e-3)


@each_dtype
@pytest.mark.parametrize(
    ("m", "n", "k", "s", "bias"),
    [
        (1, 64, 256, 0, False),
        (5, 37, 100, 16, True),
        (17, 130, 576, 96, True),
        (33, 70, 64, 5, False),
        (0, 8, 16, 0, True),
    ],
)
def test_int8_linear_rows(served, m, n, k, s, bias, dtype):
    random = torch.Generator().manual_seed(m + n)
    codes, weight = (torch.randint(-128, 128, (rows, k), generator=random).to(torch.int8) for rows in (m, n))
    scales, weight_scales = torch.rand(m, 1, generator=random) / 127, torch.rand(n, 1, generator=random) / 127
    arguments = codes, scales, weight, weight_scales, sample(m, s, dtype, 1), sample(s, n, dtype, 2)
    given = *arguments, sample(1, n, dtype, 3)[0] if bias else None
    found, want = served("int8_linear_rows")(*given), int8._rows_reference(*given)
    assert found.shape == (m, n) and found.dtype == dtype
    if s:
        torch.testing.assert_close(found, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    else:
        assert torch.equal(found.view(torch.int16), want.view(torch.int16))


def test_int8_sums_do_not_saturate(served):
    worst = torch.full((3, 4096), -128, dtype=torch.int8)
    one, none = torch.full((3,), 2.0**-20), torch.empty(3, 0).half()
    y = served("int8_linear_rows")(worst, one, worst, one * 2**10, none, none.t(), None)
    assert (y == 4096 * 128**2 / 2**30).all()
