"""Rounding to nearest: weights and activations."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lutserve import formats
from lutserve.errors import UserError
from lutserve.quantizers import QuantizedWeight, quantize_activations, rtn
from lutserve.quantizers.quality import DISTRIBUTIONS, sqnr, sqnr_on
from lutserve.quantizers.rtn import CLIP_RATIOS

DIGESTS = json.loads((Path(__file__).parent / "data/rtn_digests.json").read_text())
CASES = [
    *((name, {}) for name in formats.NAMES),
    *((f"int{b}", {"scheme": "asym"}) for b in (2, 3, 4, 5, 8)),
    *((f"int{b}", {"full_range": True}) for b in (2, 3, 4, 8)),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small operations: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


# --- an independent implementation, one number at a time ----------------------------------------------------


def scalar_group(group, codebook, scheme="sym", full_range=False, quantile=1.0):
    """Codes, scale, zero point and dequantised values of one group of Python floats holding fp32 values.

    Python computes in float64, and a double result rounded to fp32 is the fp32 result of +, -, *, /.
    """
    low, high = min(group), max(group)
    if scheme == "asym":
        low, high = f32(min(low, 0) * f32(quantile)), f32(max(high, 0) * f32(quantile))
        if low == high == 0:
            low, high = -1.0, 1.0
        top = len(codebook.values) - 1
        scale = f32(f32(high - low) / top)
        zero = round(f32(-low / scale))
        codes = [min(max(round(f32(w / scale)) + zero, 0), top) for w in group]
        return codes, scale, zero, [f32((c - zero) * scale) for c in codes]
    absmax = max(high, -low)
    if codebook.integer and absmax == 0:
        absmax = 1.0
    absmax = f32(absmax * f32(quantile))
    scale = f32(absmax / codebook.divisor)
    if full_range:
        scale = f32(absmax / -codebook.values[0]) * (-1 if abs(high) > abs(low) else 1)
    codes = []
    for w in group:
        t = f32(w / scale) if scale else 0.0
        if codebook.integer:
            code = min(max(round(t), codebook.values[0]), codebook.values[-1]) - codebook.values[0]
        else:
            code = sum(t > f32((a + b) / 2) for a, b in itertools.pairwise(codebook.values))
        codes.append(int(code))
    return codes, scale, None, [f32(f32(codebook.values[c]) * scale) for c in codes]


def check_against_scalar(weight, result, **options):
    """Compare every code, scale, zero point and value, bit by bit."""
    n, k = weight.shape
    group = result.group_size
    values = result.dequantize()
    for row in range(n):
        numbers = weight[row].float().tolist()
        for g in range(math.ceil(k / group)):
            columns = slice(g * group, min(k, (g + 1) * group))
            codes, scale, zero, exact = scalar_group(numbers[columns], result.codebook, **options)
            assert result.codes[row, columns].tolist() == codes
            assert result.scales[row, g].item() == scale
            if zero is not None:
                assert result.zero_points[row, g].item() == zero
            assert values[row, columns].tolist() == exact


@pytest.mark.parametrize(("name", "options"), CASES)
def test_scalar_implementation(name, options):
    random = np.random.default_rng(7)
    weight = torch.from_numpy((random.standard_t(3, (6, 77)) * 0.02).astype(np.float32))
    weight[2, 32:64] = 0
    weight[3] = weight[3].abs()
    weight[4] = -weight[4].abs()
    weight[5, :5] = torch.tensor([1e-45, -1e-45, -0.0, 3e-39, -2e-38])
    for group in (16, 32, 128, -1):
        check_against_scalar(weight, rtn(weight, name, group, **options), **options)
    check_against_scalar(weight, rtn(weight, name, 32, quantile=0.83, **options), quantile=0.83, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sf4_5", "fp4_range", "denorm4", "sf3_5_nz", "int4"])
def test_every_16_bit_number(name, dtype):
    """All finite values of the format as weights, in the order of their bit patterns."""
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    if dtype == torch.bfloat16:
        # Sums of the largest would overflow nothing here, but their scales times 16 would.
        every = every[every.abs() < 1e37]
    weight = every[: len(every) // 128 * 128].view(-1, 128)
    check_against_scalar(weight, rtn(weight, name, 128))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from(["nf4", "fp4", "apot4-sp", "fp3_log", "int3", "int8"]),
    st.integers(0, 2**32 - 1),
)
def test_any_shape(n, k, group, name, seed):
    weight = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32))
    result = rtn(weight, name, group)
    assert result.codes.shape == (n, k) and result.codes.dtype == torch.uint8
    assert result.scales.shape == (n, math.ceil(k / min(group, k))) and result.scales.dtype == torch.float32
    check_against_scalar(weight, result)


@settings(deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.sampled_from(formats.NAMES),
)
def test_nearest_value_is_taken(numbers, name):
    """No other value of the scaled list is nearer, but for the rounding of the scale."""
    codebook = formats.get(name)
    weight = torch.tensor([numbers], dtype=torch.float32)
    result = rtn(weight, codebook, -1)
    scale = result.scales.item()
    for number, value in zip(weight[0].tolist(), result.dequantize()[0].tolist(), strict=True):
        nearest = min(abs(number - v * scale) for v in codebook.values)
        assert abs(number - value) <= nearest + 1e-5 * max(abs(v) for v in codebook.values) * scale


@settings(deadline=None)
@given(st.sampled_from(formats.NAMES), st.integers(-20, 20), st.integers(0, 2**32 - 1))
def test_powers_of_two_scale_along(name, power, seed):
    weight = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 48)).astype(np.float32))
    once, scaled = rtn(weight, name, 16), rtn(weight * 2.0**power, name, 16)
    assert torch.equal(once.codes, scaled.codes)
    assert torch.equal(once.scales * 2.0**power, scaled.scales)


@pytest.mark.parametrize("name", formats.NAMES)
def test_what_is_on_the_grid_stays(name):
    codebook = formats.get(name)
    reachable = [v for v in codebook.values if v >= -codebook.divisor]
    weight = torch.tensor([reachable, [-v if -v in reachable else v for v in reachable]]) * 0.375
    assert torch.allclose(rtn(weight, codebook, -1).dequantize(), weight, rtol=1e-6, atol=0)


def test_a_tie_takes_the_lower_index():
    weight = torch.tensor([[-6.0, -0.25, 0.25, 0.75, -0.75, 2.5, -2.5, 5.0, -5.0, 6.0]])
    assert rtn(weight, "fp4_basic", -1).dequantize()[0].tolist() == [
        -6, -0.5, 0, 0.5, -1, 2, -3, 4, -6, 6,
    ]  # fmt: skip
    assert rtn(torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5]]), "int4", -1).dequantize()[0].tolist() == [
        7, 0, 2, 2, 0,
    ]  # fmt: skip


def test_a_negative_extreme_is_clipped_where_the_list_ends_early():
    assert rtn(torch.tensor([[-8.0, 4.0]]), "fp4_range", -1).dequantize()[0].tolist() == [-6, 4]
    assert rtn(torch.tensor([[8.0, 4.0]]), "fp4_range", -1).dequantize()[0].tolist() == [8, 4]


def test_zeros_have_the_code_of_zero():
    weight = torch.zeros(2, 40)
    weight[1, :32] = 1
    for name in ("nf4", "sf3_5_nz", "int4"):
        result = rtn(weight, name, 32)
        assert (result.codes[0] == result.codebook.zero).all()
        assert (result.dequantize()[0] == 0).all() and (result.dequantize()[1, 32:] == 0).all()
    assert rtn(weight, "nf4", 32).scales[0].tolist() == [0, 0]


def test_full_range_represents_the_extreme_exactly():
    weight = torch.tensor([[-8.0, 3.0], [8.0, 3.0]])
    result = rtn(weight, "int4", -1, full_range=True)
    assert result.dequantize()[:, 0].tolist() == [-8, 8]
    assert result.scales[:, 0].tolist() == [1, -1]


# --- clipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "fp4_range", "int4"])
def test_clip_search_takes_the_best_ratio_of_the_matrix(name):
    weight = torch.from_numpy(np.random.default_rng(3).standard_t(4, (5, 150)).astype(np.float32))
    tried = [rtn(weight, name, 64, quantile=1 - i / 200) for i in range(40)]
    errors = [float((q.dequantize() - weight).double().square().sum()) for q in tried]
    best = tried[errors.index(min(errors))]
    found = rtn(weight, name, 64, mse=True)
    assert torch.equal(found.codes, best.codes) and torch.equal(found.scales, best.scales)
    assert len(CLIP_RATIOS) == 40 and CLIP_RATIOS[0] == 1 and CLIP_RATIOS[-1] == pytest.approx(0.805)


# --- activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scheme"), [("sf4_5", "sym"), ("int4", "asym"), ("int8", "sym")])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_activations_are_rounded_token_by_token(name, scheme, group):
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((2, 3, 80)).astype(np.float32)) * 3
    smooth = torch.from_numpy(np.random.default_rng(6).random(80).astype(np.float32)) + 0.5
    rounded = quantize_activations(x, name, group, scheme, quantile=0.9, input_scale=smooth)
    assert rounded.shape == x.shape and rounded.dtype == torch.float32
    as_weight = rtn((x * smooth).view(6, 80), name, group, scheme, quantile=0.9)
    assert torch.equal(rounded.view(6, 80), as_weight.dequantize())
    one = quantize_activations(x[1:, 2:], name, group, scheme, quantile=0.9, input_scale=smooth)
    assert torch.equal(one, rounded[1:, 2:])


def test_activations_that_are_no_numbers_stay_in_their_group():
    x = torch.zeros(2, 64)
    x[0, 3], x[1, 40] = float("nan"), float("inf")
    rounded = quantize_activations(x, "nf4", 32)
    assert rounded.isfinite().view(2, 2, 32).any(-1).tolist() == [[False, True], [True, False]]
    assert rounded.isfinite().view(2, 2, 32).all(-1).tolist() == [[False, True], [True, False]]


# --- golden arrays ------------------------------------------------------------------------------------------


def options_of(name):
    for suffix, options in {
        "_asym": {"scheme": "asym"},
        "_symfull": {"full_range": True},
        "_sym": {},
    }.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), options
    return name, {}


@pytest.mark.parametrize("file", ["rtn_weights", "rtn_tail", "rtn_mse_clip"])
def test_golden_weights(shared, file):
    golden = np.load(shared / f"golden/datatypes/{file}.npz")
    weight, compared = torch.from_numpy(golden["W"]), 0
    for key in golden:
        name, *parts = key.split("|")
        if key == "W" or parts[1:] == ["codes"]:
            continue
        name, options = options_of(name)
        result = rtn(weight, name, int(parts[0][1:]), mse=file == "rtn_mse_clip", **options)
        actual = result.scales if parts[1:] == ["scale"] else result.dequantize()
        assert np.array_equal(actual.numpy(), golden[key]), key
        compared += 1
    assert compared >= 18


def test_golden_clip_ratios(shared):
    golden = json.loads((shared / "golden/datatypes/mse_clip_ratio.json").read_text())
    weight = torch.from_numpy(np.load(shared / "golden/datatypes/rtn_mse_clip.npz")["W"])
    for key, ratio in golden.items():
        name, group = key.split("|")
        name, options = options_of(name)
        found = rtn(weight, name, int(group[1:]), mse=True, **options)
        assert torch.equal(found.scales, rtn(weight, name, int(group[1:]), quantile=ratio, **options).scales)


def test_golden_activations(shared):
    golden = np.load(shared / "golden/datatypes/act_w4a4.npz")
    x, smooth = torch.from_numpy(golden["X"]), torch.from_numpy(golden["sq_input_scale"])
    compared = 0
    for key in golden:
        if not key.endswith("|xq"):
            continue
        name, scheme, group, quantile, sq, _ = key.split("|")
        scale = smooth if sq == "sq" else None
        actual = quantize_activations(x, name, int(group[1:]), scheme, float(quantile[1:]), scale)
        assert np.array_equal(actual.numpy(), golden[key]), key
        compared += 1
    assert compared >= 72


def test_golden_errors_on_random_data(shared):
    golden = json.loads((shared / "golden/datatypes/sqnr_synthetic.json").read_text())
    for name in ("nf4", "sf4_3", "sf4_5", "fp4_basic", "apot4-sp", "int4"):
        for data in DISTRIBUTIONS:
            for group in (32, 128, 256):
                expected = golden[f"{name}|{data}|g{group}"]
                assert sqnr_on(data, formats.get(name), group) == pytest.approx(expected, abs=6e-5)


# --- the same everywhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", formats.NAMES)
def test_digest(name):
    # No random generator and no library function: multiples of 2^-9 from a quadratic congruence.
    numbers = np.arange(24 * 200, dtype=np.int64)
    weight = torch.from_numpy(
        (((numbers * numbers * 7919 + numbers * 104729) % 8191 - 4095) / 512).astype(np.float32)
    )
    result = rtn(weight.view(24, 200), name, 64)
    data = result.codes.numpy().tobytes() + result.scales.numpy().astype("<f4").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == DIGESTS[name]


def test_sqnr():
    exact = torch.tensor([3.0, 4.0])
    assert sqnr(exact, torch.tensor([3.0, 4.5])) == pytest.approx(20.0)
    assert sqnr(exact, exact) == math.inf


# --- wrong input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(2, 4), "nf5"), {}, "unknown format 'nf5'"),
        ((torch.zeros(2, 4), "nf4", 0), {}, "group size 0; allowed: 1 or more, or -1"),
        ((torch.zeros(2, 4), "nf4"), {"scheme": "asym"}, "nf4 has no scheme asym"),
        ((torch.zeros(2, 4), "nf4"), {"full_range": True}, "nf4 has no full range"),
        ((torch.zeros(2, 4), "int4"), {"scheme": "asym", "full_range": True}, "symmetric scheme"),
        ((torch.zeros(2, 4), "int4"), {"scheme": "odd"}, "unknown scheme 'odd'; allowed: sym, asym"),
        ((torch.zeros(4), "nf4"), {}, "two dimensions"),
        ((torch.zeros(0, 4), "nf4"), {}, "two dimensions"),
        ((torch.tensor([[1.0, float("nan")]]), "nf4"), {}, "NaN or infinity"),
        ((torch.tensor([[1.0, float("-inf")]]), "int4"), {}, "NaN or infinity"),
        ((torch.tensor([[1.0, float("inf")]]), "int4"), {"scheme": "asym"}, "NaN or infinity"),
    ],
)
def test_user_errors(arguments, options, message):
    with pytest.raises(UserError, match=message):
        rtn(*arguments, **options)


def test_permuted_groups_are_looked_up():
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    codebook = formats.Codebook("mine", (1.0, 2.0, 3.0, 4.0), 2)
    order = torch.tensor([2, 0, 3, 1])
    weight = QuantizedWeight(codes, torch.tensor([[10.0, 100.0]]), codebook, 2, permutation=order)
    assert weight.groups.tolist() == [0, 1, 0, 1]
    assert weight.dequantize().tolist() == [[10, 200, 30, 400]]
