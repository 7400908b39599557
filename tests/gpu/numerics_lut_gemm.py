"""`lut_gemm`: the exact result rounded, for every shape of argument, by the cases of the CPU's test."""

from __future__ import annotations

import pytest
import torch
from test_lut_gemm import error, make

from lutserve.kernels.gpu import lut_gemm
from lutserve.kernels.library import launcher

#: rows, input and output columns, group size, options
CASES = {
    "one row, split over input columns": (1, 2048, 64, 128, {}),
    "three rows, short last group": (3, 100, 70, 32, {}),
    "odd everything": (2, 7, 5, 8, {}),
    "one group that is no multiple of eight": (5, 27, 33, 99, {}),
    "more rows than a small tile": (70, 64, 40, 64, {}),
    "a group of several blocks": (4, 640, 32, 320, {}),
    "two classes": (3, 128, 64, 64, {"classes": 2}),
    "classes and kinds": (2, 128, 100, 64, {"classes": 3, "kinds": 3}),
    "kinds, many rows": (65, 64, 64, 32, {"kinds": 2}),
    "int8": (4, 256, 64, 128, {"quantize": True}),
    "int8, odd": (3, 100, 70, 32, {"quantize": True, "biased": False}),
    "int8, one row, split": (1, 1024, 32, 64, {"quantize": True}),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_the_exact_result_rounded(device: str, name: str, dtype: torch.dtype) -> None:
    *shape, options = CASES[name]
    case = make(*shape, dtype, **options)
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in case.arguments]
    out = launcher("lut_gemm")(*arguments)
    assert out.shape == (shape[0], shape[2]) and error(case, out.cpu()) <= 1


def test_strides_and_nothing(device: str) -> None:
    case = make(4, 64, 32, 32, torch.float16)
    x, *rest = (a.to(device) if isinstance(a, torch.Tensor) else a for a in case.arguments)
    expected = launcher("lut_gemm")(x, *rest)
    for view in (x.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([x, x], 2)[..., :64]):
        assert torch.equal(launcher("lut_gemm")(view, *rest), expected)
    assert launcher("lut_gemm")(x[:, :0], *rest).shape == (0, 32)


def test_a_row_of_zeros_and_one_out_of_range(device: str) -> None:
    """int8: a group of zeros has scale 0; one of subnormals counts as zeros, as on a CPU."""
    case = make(3, 64, 32, 32, torch.bfloat16, quantize=True, biased=False)
    x = case.arguments[0]
    x[0, 0], x[0, 1, :32] = 0, 1e-33
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in case.arguments]
    out = launcher("lut_gemm")(*arguments).cpu()
    assert (out[0] == 0).all() and error(case, out) <= 1


def test_plans_are_what_the_kernel_can_do() -> None:
    for m in (1, 2, 16, 17, 64, 65, 4096):
        for k, group in ((7, 7), (64, 8), (14336, 128), (4096, 4096), (11008, 64)):
            tile = lut_gemm.plan(m, 4096, k, group, 132)
            assert tile.m >= 16 and tile.n >= 32 and tile.k >= 32 and 1 <= tile.splits <= 8
    assert lut_gemm.plan(1, 4096, 14336, 128, 132).splits > 1
