from __future__ import annotations

import math
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lutserve.errors import UserError
from lutserve.kernels.reference import MixqLinear, quantize_rows, quantize_rows_fp16


def half(value: Fraction | float) -> float:
    """Round an exact number to binary16, half to even, by way of Python's own conversion."""
    # struct rounds a double correctly; a double holds every quotient of binary16 numbers closely enough,
    # because a tie between two binary16 numbers would need an exact quotient of at most 12 bits.
    return struct.unpack("<e", struct.pack("<e", float(value)))[0]


def scalar_row(row: list[float]) -> tuple[list[int], float]:
    """Section 3 of the specification for one ordinary row, in Python numbers."""
    scale = half(Fraction(max(abs(v) for v in row)) / 127)
    return [round(half(Fraction(v) / Fraction(scale))) for v in row], scale


halves = st.floats(-1000, 1000, width=16).filter(lambda v: v == 0 or abs(v) > 1e-3)


@settings(max_examples=200)
@given(st.lists(halves, min_size=1, max_size=40).filter(lambda row: max(map(abs, row)) > 0.01))
def test_row_quantisation_equals_the_scalar_rule(row: list[float]) -> None:
    codes, scale = quantize_rows_fp16(torch.tensor([row], dtype=torch.float16), 127)
    assert (codes[0].tolist(), scale.item()) == scalar_row(row)


@pytest.mark.parametrize("case", ["mix8_basic", "mix8_nooutlier", "mix8_bias_m1"])
def test_golden(shared: Path, case: str) -> None:
    golden = np.load(shared / "golden/mixq" / f"{case}.npz")
    layer = MixqLinear(torch.from_numpy(golden["W"]))
    x = torch.from_numpy(golden["X"])
    before = x.clone()
    out = layer(x, torch.from_numpy(golden["bias"]) if "bias" in golden else None)
    assert torch.equal(x, before)
    assert np.array_equal(layer.weight_codes, golden["q_weight"])
    assert np.array_equal(layer.slots, golden["ind"])
    assert np.array_equal(layer.codes, golden["q_x"])
    expected = golden["out_sm80"] if "out_sm80" in golden else golden["out"]
    for ours, theirs in (
        (layer.weight_scales, golden["scale_col"]),
        (layer.scales, golden["x_scale"]),
        (out, expected),
    ):
        assert np.array_equal(ours.numpy().view(np.uint16), theirs.view(np.uint16))


def test_golden_edge_rows(shared: Path) -> None:
    golden = np.load(shared / "golden/mixq/edge_numerics.npz")
    x = torch.from_numpy(golden["X"])
    codes, scales = quantize_rows_fp16(x, 127)
    assert np.array_equal(codes, golden["ref_q8"])
    assert np.array_equal(scales, golden["ref_s8"])
    codes, scales = quantize_rows(x)
    assert np.array_equal(codes, golden["safe_q8"])
    # A row of zeros has scale 0 here and an arbitrary tiny one there; its codes are 0 either way.
    nonzero = golden["X"].any(1)
    assert np.array_equal(scales[nonzero], golden["safe_s8"][nonzero])


def test_outliers_are_found_in_two_calls_and_then_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator).half()
    layer = MixqLinear(weight)
    x = torch.randn(4, 64, generator=generator).half()
    for column, call in ((5, 0), (9, 1), (13, 2)):
        x[0, column] = 50
        layer(x)
        assert (column in layer.slots.tolist()) == (call < 2)
    exact = x.double() @ weight.double().T
    assert ((layer(x).double() - exact).norm() / exact.norm()).item() < 0.05


def test_safe_rows_hold_for_every_magnitude() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-38, -1e-38], [65504, 1], [3e38, -3e38], [math.nan, 1], [math.inf, 1]])
    codes, scales = quantize_rows(x)
    assert codes[:2].eq(0).all() and scales[:2].eq(0).all()
    assert codes[2].tolist() == [127, 0] and codes[3].tolist() == [127, -127]
    assert scales[4].isnan() and scales[5].isinf()


def test_arguments() -> None:
    with pytest.raises(UserError, match="bits=4"):
        MixqLinear(torch.zeros(2, 2).half(), bits=4)
    with pytest.raises(UserError, match="fp16"):
        MixqLinear(torch.zeros(2, 2))
