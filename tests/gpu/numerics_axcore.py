"""Strict AxCore and FPMA: the reference's bits, for ordinary numbers and for any pattern."""

from __future__ import annotations

import pytest
import torch
from test_axcore import make, words

from lutserve.kernels import axcore
from lutserve.kernels.library import launcher


@pytest.mark.parametrize(
    ("m", "k", "n", "group"), [(1, 16, 70, 8), (18, 8, 33, 8), (2, 32, 1, 32), (0, 8, 8, 8)]
)
@pytest.mark.parametrize("wild", [False, True])
def test_the_bits_of_the_reference(device: str, m: int, k: int, n: int, group: int, wild: bool) -> None:
    for seed, typed in enumerate((False, True)):  # even seeds take FPMA for the scales
        arguments = make(m, k, n, group, typed, wild, seed)
        weight = make(n, k, 1, k, False, wild, seed + 2)[0]
        uniform = (arguments[0], axcore.pack_uniform(weight), 58, 8, n, arguments[-1] if typed else None)
        for name, reference, given in (
            ("axcore_strict", axcore._reference, arguments),
            ("fpma_linear", axcore._uniform_reference, uniform),
        ):
            moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in given]
            out = launcher(name)(*moved)
            assert out.shape == (m, n)
            assert torch.equal(words(out.cpu()), words(reference(*given)))
            strided = moved[0].T.contiguous().T
            assert torch.equal(words(launcher(name)(strided, *moved[1:]).cpu()), words(out.cpu()))


def test_a_block_of_a_long_sum(device: str) -> None:
    """fpma_linear with input columns that its tiles of 64 do not divide, without bias."""
    x, weight = make(2, 72, 3, 8, False, False)[0], make(3, 72, 3, 8, False, False)[0]
    given = x, axcore.pack_uniform(weight), 64, 64, 3, None
    out = launcher("fpma_linear")(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in given))
    assert torch.equal(words(out.cpu()), words(axcore._uniform_reference(*given)))
