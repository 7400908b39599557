"""Norms by a table: the torch reference's bits, because the order of their sums is fixed."""

from __future__ import annotations

import pytest
import torch

from lutserve import luts
from lutserve.kernels import norm

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def rows(width, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(7, width, generator=random) * torch.tensor([1, 0, 1e-20, 1e-3, 30, 2e4, 1])[:, None]
    x[6, width // 2] = torch.nan
    return x.to(dtype)


def same(found, want):
    assert found.dtype == want.dtype and found.shape == want.shape and found.is_contiguous()
    assert ((found.view(torch.int16) == want.view(torch.int16)) | (found.isnan() & want.isnan())).all()


@each_dtype
@pytest.mark.parametrize("width", [1, 70, 576, 1100])
def test_the_bits_of_the_reference(served, width, dtype):
    table = luts.lut_table("rsqrt", "nli-4", torch.float16)
    x, residual = rows(width, dtype, 0), rows(width, dtype, 1)
    weight, bias = (torch.randn(width, generator=torch.Generator().manual_seed(s)) for s in (2, 3))
    for w in (None, weight, weight.to(dtype)):
        same(served("lut_rms_norm")(x, w, table, 1e-6), norm._reference(x, w, table, 1e-6))
        found = served("lut_add_rms_norm")(x, residual, w, table, 1e-5)
        for a, b in zip(found, norm._add_reference(x, residual, w, table, 1e-5), strict=True):
            same(a, b)
        for b in (None, bias.to(dtype)):
            same(served("lut_layer_norm")(x, w, b, table, 1e-5), norm._layer_reference(x, w, b, table, 1e-5))
    wide = torch.cat([x, x], 1)[None, :, :width]
    same(served("lut_rms_norm")(wide, None, table, 1e-6), norm._reference(wide, None, table, 1e-6))
    assert served("lut_rms_norm")(x[:0], None, table, 1e-6).shape == (0, width)
