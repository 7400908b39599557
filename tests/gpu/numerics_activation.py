"""`act_and_mul` and `lut_unary`: every pattern, odd widths and strides, against the torch reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lutserve.kernels import activation
from lutserve.kernels.library import launcher
from lutserve.luts.bits import PATTERNS

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def patterns(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every pattern in random order, as often as needed."""
    rng = np.random.default_rng(seed)
    drawn = np.resize(rng.permutation(PATTERNS), count)
    return torch.from_numpy(drawn.view(np.int16)).view(dtype)


def assert_same(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but that NaN payloads are free."""
    y = y.cpu()
    assert y.dtype == expected.dtype and y.shape == expected.shape and y.is_contiguous()
    same = (y.view(torch.int16) == expected.view(torch.int16)) | (y.isnan() & expected.isnan())
    assert same.all()


@each_dtype
def test_act_and_mul(device: str, dtype: torch.dtype) -> None:
    table = patterns(65536, dtype, 0)
    wide = patterns(6 * 5 * 160, dtype, 1).view(6, 5, 160)
    every = torch.stack([patterns(65536, dtype, seed) for seed in (2, 3)]).view(2, 16, 4096)
    views = [
        every.transpose(0, 1).reshape(16, 8192),
        wide[:, :3, 10:90],
        wide[:, ::2, ::2],
        wide[0, :4].T[:100],
        wide[0, 0, :2],
        wide[:0],
        wide[:2, :1].expand(2, 4, 160),
    ]
    for x in views:
        y = launcher("act_and_mul")(x.to(device), table.to(device))
        assert_same(y, activation._reference(x, table))


@each_dtype
def test_unary(device: str, dtype: torch.dtype) -> None:
    table, every = patterns(65536, dtype, 0), patterns(65536, dtype, 1)
    for x in (every, every.view(256, 256)[:5].T, every[:1023:3], every[:0], every[0]):
        y = launcher("lut_unary")(x.to(device), table.to(device))
        assert_same(y, activation._unary_reference(x, table))
