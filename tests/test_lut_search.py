"""The search for cut points: against a plain dynamic programme and the published cut points; its limits."""

import json
import math
import os
import struct
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutserve.errors import UserError
from lutserve.luts import exact, files, nli, search
from lutserve.luts.functions import FUNCTIONS

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("LUTSERVE_SHARED") or HERE.parent.parent / "shared")
CUT_POINTS = SHARED / "golden" / "fplut" / "cut_points.json"

needs_golden = pytest.mark.skipif(
    not CUT_POINTS.is_file(), reason=f"no {CUT_POINTS} (LUTSERVE_SHARED names the folder)"
)


# --- a second implementation: Python numbers, every candidate a possible cut point --------------------------


def half(x):
    return struct.unpack("e", struct.pack("e", x))[0]


def plain_candidates(function, low, high):
    values = (struct.unpack("e", struct.pack("H", p))[0] for p in range(65536))
    x = sorted({v for v in values if low <= v <= high})
    return x, [half(function(v)) for v in x]


def plain_search(function, low, high, points, pin, scales):
    """Least loss of any eleven cut points, by the definition."""
    x, y = plain_candidates(function, low, high)
    weight = [1 / max(abs(v), 2**-14) / len(x) for v in y]
    everything = range(len(x))

    def off(j, guess):
        return abs(guess - y[j]) * weight[j]

    @cache
    def segment(i, k, pieces):
        width = x[k] - x[i]
        scale = half(pieces * half(1 / half(width))) if scales == "float16" else pieces / width
        total = 0.0
        for j in range(i, k):
            position = (x[j] - x[i]) * scale
            piece = min(int(position), pieces)
            left, right = (function(x[i] + width * min(piece + s, pieces) / pieces) for s in (0, 1))
            total += off(j, left + (right - left) * (position - piece))
        return total

    first = [0] if pin[0] else everything
    cost = {k: sum(off(j, function(x[k])) for j in range(k)) for k in first}
    for m in range(10):
        pieces = 1 if m in (0, 9) else points
        last = [len(x) - 1] if m == 9 and pin[1] else everything
        cost = {
            k: min((c + segment(i, k, pieces) for i, c in cost.items() if i < k), default=math.inf)
            for k in last
        }
    return min(c + sum(off(j, function(x[k])) for j in range(k, len(x))) for k, c in cost.items())


@pytest.mark.parametrize("scales", nli.SCALES)
@pytest.mark.parametrize("pin", search.PINS.values(), ids=search.PINS)
@pytest.mark.parametrize(
    ("function", "low", "high"),
    [(exact.silu, -1.04, -1.0), (exact.exp, -5.1, -4.95), (exact.hardswish, 2.97, 3.03)],
    ids=["silu", "exp", "hardswish"],
)
def test_the_optimum_where_every_position_is_tried(function, low, high, pin, scales):
    found = search.search(function, low, high, 2, pin=pin, scales=scales)
    assert found.loss == pytest.approx(plain_search(function, low, high, 2, pin, scales), rel=1e-6)
    assert list(found.cuts) == sorted(set(found.cuts))


@given(st.integers(0, 2**32 - 1), st.sampled_from(["none", "both"]))
@settings(max_examples=5, deadline=None)
def test_the_optimum_of_any_function(seed, pin):
    rng = np.random.default_rng(seed)
    a, b, c = rng.normal(size=3).tolist()

    def function(x):
        return a + b * math.sin(30 * x) + c * abs(x - 2.02)

    chosen = search.PINS[pin]
    found = search.search(function, 2.0, 2.06, 2, pin=chosen)
    assert found.loss == pytest.approx(plain_search(function, 2.0, 2.06, 2, chosen, "float16"), rel=1e-6)


def test_the_loss_is_that_of_the_table():
    """What is minimised is the error of the table that is built, apart from its roundings."""
    table, loss = search.build(exact.tanh, "tanh", 0.25, 0.28, 4)
    x, y = search.candidates(exact.tanh, 0.25, 0.28)
    off = np.abs(table.interpolate(x.astype(np.float32)) - y) / np.maximum(np.abs(y), 2**-14)
    assert off.mean() == pytest.approx(loss, rel=1e-3)
    assert search.loss_of(exact.tanh, table.cuts.tolist(), 0.25, 0.28, 4) == pytest.approx(loss, rel=1e-12)


# --- against the published cut points -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "low", "high", "pin"),
    [("softmax_exp", -65504, 0, "both"), ("sin", -math.pi, math.pi, "none")],
)
def test_no_worse_than_the_published_cut_points(name, low, high, pin):
    """By the published loss, 32 pieces an inner segment."""
    function = FUNCTIONS[name].exact
    found = search.search(function, low, high, 32, pin=search.PINS[pin])
    published = search.loss_of(function, FUNCTIONS[name].cuts, low, high, 32)
    assert published is not None
    assert found.loss <= published


#: published name -> function; found by the dynamic programme over all of fp16 with 32 points
FOUND = {
    **{name: name for name in ("silu", "exp", "gelu_tanh", "hardswish", "mish", "sigmoid", "tanh", "elu")},
    "gelu_standard": "gelu",
    "reciprocal": "reciprocal",
    "rsqrt": "rsqrt",
}


@needs_golden
@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_no_worse_than_the_published_search(name):
    function = FUNCTIONS[FOUND[name]].exact
    low = 0.0 if FOUND[name] in ("reciprocal", "rsqrt") else -65504.0
    cuts = json.loads(CUT_POINTS.read_text())["v2_tables_n32"][name]
    found = search.search(function, low, 65504.0, 32, scales="float32")
    published = search.loss_of(function, cuts, low, 65504.0, 32, "float32")
    assert published is not None
    assert found.loss <= published


@pytest.mark.parametrize(("name", "high"), [("reciprocal", 2.0), ("rsqrt", 4.0)])
def test_our_own_cut_points_can_be_found_again(name, high):
    function = FUNCTIONS[name]
    found = search.search(function.exact, 1.0, high, 4, pin=(True, True))
    assert [half(c) for c in function.cuts] == list(found.cuts)


# --- limits -------------------------------------------------------------------------------------------------


def test_candidates_are_the_values_with_a_finite_result():
    x, y = search.candidates(math.log, -1.0, 2.0)  # math.log raises below and at zero
    assert x[0] == 2**-24
    assert x[-1] == 2.0
    assert np.array_equal(y, np.array([math.log(v) for v in x]).astype(np.float16))
    assert np.isin([0.0], search.candidates(exact.exp, -1, 1)[0]).sum() == 1


def test_pins_hold():
    for pin, (left, right) in search.PINS.items():
        cuts = search.search(exact.sigmoid, 3.0, 3.125, 2, pin=search.PINS[pin]).cuts
        assert not left or cuts[0] == 3.0
        assert not right or cuts[-1] == 3.125


def test_every_segment_has_a_scale(tmp_path):
    """A kink wants a segment narrower than fp16 scales can hold; the table must load all the same."""
    free = search.search(lambda x: abs(x - 1), 0.97, 1.03, 64, scales="float32")
    assert np.diff(free.cuts).min() < 64 / 65504
    table, _ = search.build(lambda x: abs(x - 1), "kink", 0.97, 1.03, 64)
    assert np.all(np.isfinite(table.scales) & (table.scales > 0))
    files.save(tmp_path / "kink.json", table, {})
    assert isinstance(files.load(tmp_path / "kink.json"), nli.Table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((exact.silu, "f", 1.0, 1.005, 4), "at 6 fp16 numbers of .1, 1.005.; a table needs 11"),
        ((exact.log, "f", -5.0, -1.0, 4), "at 0 fp16 numbers"),
        ((exact.silu, "f", 1.0, 2.0, 3), "3 points; allowed: 1, 2, 4"),
        ((lambda x: x if x * 4 % 1 < 0.02 else math.nan, "f", 1.0, 2.9, 4), "has no value at 1.3"),
    ],
    ids=["few", "none", "points", "gap"],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        search.build(*arguments, pin="both")


def test_unknown_words():
    with pytest.raises(UserError, match="unknown pin 'all'; allowed: none, left, right, both"):
        search.build(exact.silu, "f", 1.0, 2.0, 4, pin="all")
    with pytest.raises(UserError, match="unknown scales 'fp8'; allowed: float16, float32"):
        search.build(exact.silu, "f", 1.0, 2.0, 4, scales="fp8")


def test_progress_tells_the_loss():
    said = []
    found = search.search(exact.sigmoid, 1.0, 1.0625, 2, progress=said.append)
    assert f"mean relative error {found.loss:.4e}" in said
