from __future__ import annotations

import math
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lutserve.errors import UserError
from lutserve.kernels.mixq_baselines import (
    eetq,
    eetq_linear,
    int4_gemv,
    int4_gemv_weight,
    int4_gemv_words,
    llm_int8,
    quik,
)
from lutserve.kernels.mixq_reference import MixqMlp, pack_int4, quantize_rows_fp16, rms_norm
from lutserve.kernels.reference import MixqLinear, quantize_rows


def half(value: Fraction | float) -> float:
    """Round an exact number to binary16, half to even, by way of Python's own conversion."""
    # struct rounds a double correctly; a double holds every quotient of binary16 numbers closely enough,
    # because a tie between two binary16 numbers would need an exact quotient of at most 12 bits.
    return struct.unpack("<e", struct.pack("<e", float(value)))[0]


def scalar_row(row: list[float], bits: int) -> tuple[list[int], float]:
    """Section 3 of the specification for one ordinary row, in Python numbers."""
    scale = half(Fraction(max(abs(v) for v in row)) / (2 ** (bits - 1) - 1))
    codes = [round(half(Fraction(v) / Fraction(scale))) for v in row]
    # The low byte or nibble in two's complement.
    return [(code + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for code in codes], scale


halves = st.floats(-1000, 1000, width=16).filter(lambda v: v == 0 or abs(v) > 1e-3)


@settings(max_examples=200)
@given(
    st.lists(halves, min_size=1, max_size=40).filter(lambda row: max(map(abs, row)) > 0.01),
    st.sampled_from([4, 8]),
)
def test_row_quantisation_equals_the_scalar_rule(row: list[float], bits: int) -> None:
    codes, scale = quantize_rows_fp16(torch.tensor([row], dtype=torch.float16), 2 ** (bits - 1) - 1)
    assert (codes[0].tolist(), scale.item()) == scalar_row(row, bits)


def golden(shared: Path, case: str) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden/mixq" / f"{case}.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal bit patterns for fp16, equal numbers for integers, whose widths may differ."""
    if theirs.dtype == torch.float16:
        return ours.dtype == theirs.dtype and torch.equal(ours.view(torch.int16), theirs.view(torch.int16))
    return not ours.is_floating_point() and torch.equal(ours.long(), theirs.long())


@pytest.mark.parametrize("case", ["mix8_basic", "mix8_nooutlier", "mix8_bias_m1"])
def test_golden_mix8(shared: Path, case: str) -> None:
    known = golden(shared, case)
    layer = MixqLinear(known["W"])
    before = known["X"].clone()
    out = layer(known["X"], known.get("bias"))
    assert same(known["X"], before)
    assert same(layer.weight_codes, known["q_weight"]) and same(layer.weight_scales, known["scale_col"])
    assert same(layer.slots, known["ind"])
    assert same(layer.codes, known["q_x"]) and same(layer.scales, known["x_scale"])
    assert same(out, known.get("out_sm80", known.get("out")))
    if case == "mix8_basic":
        assert same(layer.outlier_weights, known["w_outlier"])


def test_golden_mix4(shared: Path) -> None:
    known = golden(shared, "mix4_basic")
    for calibrated in ({"act_scales": known["act_scales"]}, {"columns": known["fp_ind"]}):
        layer = MixqLinear(known["W"], bits=4, **calibrated)
        assert same(layer.slots, known["fp_ind"]) and same(layer.outlier_weights, known["weight_cache"])
        assert same(layer.weight_codes, known["q_codes"]) and same(layer.weight_scales, known["scale_col"])
        assert same(pack_int4(layer.weight_codes), known["q_packed"])
        out = layer(known["X"])
        assert same(layer.slots, known["ind_after"]) and same(layer.outlier_weights, known["w_outlier"])
        assert same(layer.codes, known["q_x"]) and same(layer.scales, known["x_scale"])
        assert same(pack_int4(layer.codes), known["q_x_packed"])
        assert same(out, known["out"])


def test_golden_static_columns_and_its_neighbours(shared: Path) -> None:
    known = golden(shared, "mix8_static128")
    layer = MixqLinear(known["W"], mode="static", act_scales=known["act_scales"])
    for _ in range(3):
        out = layer(known["X"])
    assert same(layer.slots, known["ind"]) and same(layer.outlier_weights, known["w_outlier"])
    assert same(layer.weight_codes, known["q_weight"]) and same(layer.weight_scales, known["scale_col"])
    assert same(layer.codes, known["q_x"]) and same(layer.scales, known["x_scale"])
    assert same(out, known["out"])
    direct = MixqLinear(known["W"], mode="static", columns=torch.empty(0, dtype=torch.int64))
    assert same(direct(known["X"]), known["out_direct"])
    assert same(direct.codes, known["q_x_direct"]) and same(direct.scales, known["x_scale_direct"])
    codes, scales = eetq(known["W"])
    assert same(codes, known["eetq_q"]) and same(scales, known["eetq_scale"])
    assert same(eetq_linear(known["X"], codes, scales), known["out_w8a16"])


@pytest.mark.parametrize("bits", [8, 4])
def test_golden_gated_mlp_of_two_calls(shared: Path, bits: int) -> None:
    known = golden(shared, f"mix{bits}_mlp")
    calibrated = {"act_scales": known["act_scales"]} if bits == 4 else {}
    up, gate = (MixqLinear(known[f"W_{name}"], bits, **calibrated) for name in ("up", "gate"))
    mlp = MixqMlp(up, gate, down := MixqLinear(known["W_down"]))
    for name, layer in {"up": up, "gate": gate, "down": down}.items():
        assert same(layer.weight_codes, known[f"{name}_q"]) and same(layer.weight_scales, known[f"{name}_s"])
        if bits == 4 and layer is not down:
            assert same(pack_int4(layer.weight_codes), known[f"{name}_packed"])
            assert same(layer.outlier_weights, known[f"{name}_wfp"])
    for call in (0, 1):
        x = rms_norm(known[f"resid{call}"], known["gamma"], known["eps"].item())
        values = mlp(x)
        # Their norm also zeroes the outlier columns in place.
        zeroed = x.clone()
        zeroed[:, up.slots] = 0
        assert same(x, known[f"norm{call}"]) or same(zeroed, known[f"norm{call}"])
        assert same(up.codes, known[f"q_x{call}"]) and same(up.scales, known[f"x_scale{call}"])
        assert same(up.slots, known[f"up_ind{call}"]) and same(gate.slots, up.slots)
        assert same(values.up, known[f"up{call}"]) and same(values.gate, known[f"silu_gate{call}"])
        assert same(values.product, known[f"mul{call}"])
        assert same(down.slots, known[f"down_ind{call}"])
        assert same(down.codes, known[f"down_q_x{call}"])
        assert same(down.scales, known[f"down_x_scale{call}"])
        assert same(values.out, known[f"out{call}"])


def test_golden_int4_gemv(shared: Path) -> None:
    known = golden(shared, "int4_gemv")
    columns = known["ind"].long()
    codes, scales = int4_gemv_weight(known["W"], columns)
    assert same(codes, known["codes_u4"]) and same(scales, known["scale"])
    assert same(int4_gemv_words(codes), known["words"])
    kept = known["W"][:, columns]
    assert same(kept, known["w_outlier"])
    torch.testing.assert_close(
        int4_gemv(known["x"], codes, scales, columns, kept), known["out"], rtol=1e-12, atol=1e-14
    )


def test_golden_baselines(shared: Path) -> None:
    known = golden(shared, "baselines")
    llm = llm_int8(known["X"], known["W"])
    assert same(llm.columns, known["llmint8_ind"]) and same(llm.codes, known["llmint8_q_x"])
    assert same(llm.weight_codes, known["llmint8_q_w"]) and same(llm.out, known["llmint8_out"])
    port = quik(known["X"], known["W"], known["quik_fp_ind"].long())
    assert same(port.weight_codes, known["quik_q_w"]) and same(port.weight_scales, known["quik_s_w"])
    assert same(port.codes, known["quik_q_x"]) and same(port.scales, known["quik_s_x"])
    assert same(port.zeros, known["quik_zero_x"]) and same(port.sums, known["quik_reduced_w"])
    assert same(port.out, known["quik_out"])


@pytest.mark.parametrize("bits", [8, 4])
def test_golden_edge_rows(shared: Path, bits: int) -> None:
    known = golden(shared, "edge_numerics")
    levels = 2 ** (bits - 1) - 1
    codes, scales = quantize_rows_fp16(known["X"], levels)
    assert same(codes, known[f"ref_q{bits}"]) and same(scales, known[f"ref_s{bits}"])
    codes, scales = quantize_rows(known["X"], levels)
    assert same(codes, known[f"safe_q{bits}"])
    # A row of zeros has scale 0 here and an arbitrary tiny one there; its codes are 0 either way.
    nonzero = known["X"].ne(0).any(1)
    assert torch.equal(scales[nonzero], known[f"safe_s{bits}"][nonzero])


def test_a_4_bit_layer_without_golden_arrays() -> None:
    """One row by Python numbers: saturating weights, zeroed columns, wrapped activations, later columns."""
    weight = torch.tensor([[10.0, -5.0, 1.0, 0.75, 100.0, 7.5, 0, 0]]).half()
    layer = MixqLinear(weight, bits=4, columns=torch.tensor([4]))
    assert layer.weight_scales.item() == 1.0
    assert layer.weight_codes.tolist() == [[7, -5, 1, 1, 0, 7, 0, 0]]
    assert pack_int4(layer.weight_codes).tolist() == [[7 | 11 << 4, 1 | 1 << 4, 0 | 7 << 4, 0]]
    x = torch.tensor([[1.0, 2.0, 40.0, 0.0, 8.0, 3.5, 0, 0]]).half()
    out = layer(x)
    # Column 2 is found; its weight is what 4 bits made of it, that of column 4 is the original.
    assert layer.slots.tolist() == [4, 2] and layer.outlier_weights.tolist() == [[100.0, 1.0]]
    assert layer.scales.item() == 0.5 and layer.codes.tolist() == [[2, 4, 0, 0, 0, 7, 0, 0]]
    assert out.item() == 0.5 * (2 * 7 - 4 * 5 + 7 * 7) + 40 + 800
    tiny = torch.full((1, 2), 2.0**-24).half()
    assert quantize_rows_fp16(tiny, 7)[0].tolist() == [[-1, -1]]


def test_baselines_keep_what_they_keep() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, x = (
        torch.randn(24, 64, generator=generator).half(),
        torch.randn(8, 64, generator=generator).half(),
    )
    x[:, 5] = 90
    exact = x.double() @ weight.double().T

    def error(out: torch.Tensor) -> float:
        return ((out.double() - exact).norm() / exact.norm()).item()

    assert llm_int8(x, weight).columns.tolist() == [5] and error(llm_int8(x, weight).out) < 0.01
    kept, lost = (quik(x, weight, torch.tensor([column])) for column in (5, 6))
    assert error(kept.out) < 0.03 < 0.05 < error(lost.out)
    assert error(eetq_linear(x, *eetq(weight))) < 0.01
    columns = torch.tensor([5])
    gemv = int4_gemv(x, *int4_gemv_weight(weight, columns), columns, weight[:, columns])
    assert error(gemv) < 0.03


def test_gate_takes_the_columns_that_up_finds() -> None:
    generator = torch.Generator().manual_seed(1)
    w = [torch.randn(16, 32, generator=generator).half() for _ in range(3)]
    mlp = MixqMlp(MixqLinear(w[0]), MixqLinear(w[1]), MixqLinear(w[2].T.contiguous()))
    x = torch.randn(4, 32, generator=generator).half()
    x[0, 3] = 30
    gate = mlp(x).gate
    assert mlp.gate.slots.tolist() == [3]
    exact = torch.nn.functional.silu(x.double() @ w[1].double().T)
    assert ((gate.double() - exact).norm() / exact.norm()).item() < 0.02


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 5}, "bits 4 or 8"),
        ({"mode": "fast"}, "mode reference or static"),
        ({"bits": 4}, "need columns= or act_scales="),
        ({"mode": "static"}, "need columns= or act_scales="),
        ({"columns": torch.tensor([0])}, "8 bits learn"),
        ({"bits": 4, "columns": torch.tensor([0]), "act_scales": torch.ones(2)}, "one of them"),
        ({"bits": 4, "columns": torch.tensor([2])}, "integers from 0 to 1"),
        ({"bits": 4, "columns": torch.tensor([-1])}, "integers from 0 to 1"),
        ({"bits": 4, "columns": torch.tensor([1.0])}, "integers from 0 to 1"),
        ({"bits": 4, "act_scales": torch.ones(3)}, r"act_scales must be \[2\]"),
        ({"weight": torch.zeros(2, 2)}, "fp16"),
        ({"weight": torch.zeros(2).half()}, "fp16"),
    ],
)
def test_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MixqLinear(**{"weight": torch.zeros(2, 2).half(), **given})
