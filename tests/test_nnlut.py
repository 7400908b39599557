"""NN-LUT tables: golden arrays, a scalar implementation, the published files, the clamp, the fit."""

import hashlib
import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lutserve import luts
from lutserve.errors import UserError
from lutserve.luts import bits, exact, files, nnlut, specs, stats
from lutserve.luts.fit import fit
from lutserve.luts.functions import FUNCTIONS

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("LUTSERVE_SHARED") or HERE.parent.parent / "shared")
GOLDEN = SHARED / "golden" / "fplut"
DIGESTS = json.loads((HERE / "data" / "nnlut_digests.json").read_text())
FORMATS: dict[bits.Format, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SHIPPED = [(name, hidden) for name in specs.SHIPPED for hidden in specs.HIDDEN]

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden arrays in {GOLDEN} (LUTSERVE_SHARED names the folder)"
)
each_format = pytest.mark.parametrize("fmt", FORMATS)
each_shipped = pytest.mark.parametrize(("name", "hidden"), SHIPPED)


def same(a, b, fmt):
    """Whether two arrays of bit patterns are equal, NaN payloads aside."""
    both_nan = np.isnan(bits.decode(a, fmt)) & np.isnan(bits.decode(b, fmt))
    return bool(np.all((a == b) | both_nan))


def narrow(tmp_path, span=(-5.0, 5.0)):
    """A silu table fitted on a narrow range, whose ends do not vanish: what blew the published models up."""
    data = {
        "op": "silu",
        "hidden": 3,
        "cut_points": [-math.inf, -2.0, 0.0, 3.0, math.inf],
        "slopes": [-0.0458, -0.1, 0.9, 0.987],
        "biases": [-0.2566, -0.3, 0.0, -0.1],
    }
    if span:
        data["range"] = list(span)
    path = tmp_path / "narrow.json"
    path.write_text(json.dumps(data))
    return path


# --- golden arrays of the published method ------------------------------------------------------------------


@needs_golden
@pytest.mark.parametrize(("fmt", "short"), [("float16", "fp16"), ("bfloat16", "bf16")])
def test_golden_patterns(fmt, short):
    golden = np.load(GOLDEN / f"nnlut_{short}.npz")
    assert len(golden.files) == 21
    for key in golden.files:
        folder, _, op = key.partition("__")
        name = f"lut_details_{op}_sub.json"
        path = GOLDEN / "nnlut_tables" / folder.replace("plot_nnlut", "plot/nnlut") / name
        assert same(files.load(path).patterns(fmt), golden[key], fmt), key


@needs_golden
def test_every_published_file_loads_and_serves():
    ops = set()
    for path in (GOLDEN / "nnlut_tables").rglob("lut_details_*.json"):
        table = files.load(path)
        ops.add(table.function)
        function = next(name for name in FUNCTIONS if specs.serves(table.function, name))
        assert luts.lut_table(function, f"nnlut:{path}", torch.float16).shape == (65536,)
    assert ops == {"silu", "gelu", "exp", "divide", "invsqrt"}


@needs_golden
def test_published_blow_up_and_its_cure(tmp_path):
    """Fitted on -5..5, the published silu gives 6.2 at -140: strongly closed gates leak."""
    source = GOLDEN / "nnlut_tables" / "nnlut_bench_ori" / "lut_details_silu_H16_sub.json"
    path = tmp_path / "silu.json"
    path.write_text(json.dumps(json.loads(source.read_text()) | {"range": [-5, 5]}))
    x = torch.tensor([-140.0, -77.0, -20.0, -5.0, 5.0, 106.0], dtype=torch.float16)
    index = x.view(torch.int16).to(torch.int64) & 0xFFFF
    free = luts.lut_table("silu", f"nnlut:{path}", torch.float16)[index].tolist()
    assert free[:3] == pytest.approx([6.2, 3.3, 0.66], rel=0.03)
    clamped = luts.lut_table("silu", f"nnlut:{path}+clamp", torch.float16)[index].tolist()
    assert clamped == [0, 0, 0, 0, 5, 106]


# --- a second implementation: one scalar at a time, Python numbers only -------------------------------------


def f32(x):
    """Round a float64 to fp32; exact for one product or sum of fp32 values."""
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def f16(x):
    """Round to fp16, overflow to infinity."""
    try:
        return struct.unpack("e", struct.pack("e", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def scalar(data, x):
    """The fp32 value of a table (its JSON) at x."""
    cuts = [f16(v) if math.isfinite(v) else v for v in data["cut_points"]]
    k = min(max(sum(cut <= x for cut in cuts) - 1, 0), data["hidden"])
    if math.isnan(x) or (math.isinf(x) and f16(data["slopes"][k]) == 0):
        return math.nan
    return f32(f32(f16(data["slopes"][k]) * x) + f16(data["biases"][k]))


def value(pattern, fmt):
    """Value of a bit pattern."""
    if fmt == "float16":
        return struct.unpack("e", struct.pack("H", pattern))[0]
    return struct.unpack("f", struct.pack("I", pattern << 16))[0]


@each_format
@pytest.mark.parametrize("name", ["silu", "exp"])
def test_scalar_implementation_on_every_input(name, fmt):
    data = json.loads(specs.shipped(name, 16).read_text())
    values = np.array([scalar(data, value(p, fmt)) for p in range(65536)])
    assert same(luts.patterns(name, "nnlut:16", fmt), bits.encode(values, fmt), fmt)


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=6).map(sorted),
    st.data(),
    st.integers(0, 65535),
    st.sampled_from(list(FORMATS)),
)
def test_scalar_implementation_on_any_table(cuts, data, pattern, fmt):
    lines = st.lists(st.floats(-60000, 60000), min_size=len(cuts) + 1, max_size=len(cuts) + 1)
    slopes, biases = data.draw(lines), data.draw(lines)
    table = nnlut.Table("f", nnlut.to_fp16(cuts), nnlut.to_fp16(slopes), nnlut.to_fp16(biases))
    form = {
        "hidden": len(cuts),
        "cut_points": [-math.inf, *cuts, math.inf],
        "slopes": slopes,
        "biases": biases,
    }
    expected = bits.encode(np.array([scalar(form, value(pattern, fmt))]), fmt)
    assert same(table.patterns(fmt)[[pattern]], expected, fmt)


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_regions_are_the_network(hidden, seed):
    rng = np.random.default_rng(seed)
    w, b, m = (rng.normal(size=hidden) for _ in range(3))
    cut, slopes, biases = nnlut.regions(w, b, m)
    assert np.all(np.diff(cut) >= 0)
    x = np.concatenate([rng.normal(size=50) * 5, (cut[1:] + cut[:-1]) / 2])
    k = np.searchsorted(cut, x, side="right")
    expected = np.maximum(np.outer(x, w) + b, 0) @ m
    assert np.allclose(slopes[k] * x + biases[k], expected, rtol=1e-9, atol=1e-9 * (1 + np.abs(x).max()))


# --- the tables that come with lutserve ---------------------------------------------------------------------


@each_shipped
@each_format
def test_digest(name, hidden, fmt):
    table = luts.lut_table(name, f"nnlut:{hidden}", FORMATS[fmt])
    digest = hashlib.sha256(table.view(torch.int16).numpy().astype("<i2").tobytes()).hexdigest()
    assert digest == DIGESTS[f"{name}-{hidden}"][fmt]


def test_every_shipped_file_is_named_and_ranged():
    folder = specs.shipped("silu", 16).parent
    assert sorted(path.name for path in folder.glob("*.json")) == sorted(
        f"nnlut-{name}-{hidden}.json" for name, hidden in SHIPPED
    )
    for path in folder.glob("*.json"):
        table = files.load(path)
        assert path.name == f"nnlut-{table.function}-{len(table.cuts)}.json"
        assert table.range is not None


#: largest absolute errors; those of every published table over the same values are larger
LIMITS = {
    "silu": (-160, 160, {16: 7.1e-3, 32: 3.1e-3, 256: 2.8e-3}),
    "gelu": (-160, 160, {16: 3.4e-3, 32: 1.7e-3, 256: 1.1e-3}),
    "softmax_exp": (-65504, 0, {16: 1.6e-3, 32: 8e-4, 256: 4e-4}),
    "reciprocal": (1, 2, {16: 6e-4, 32: 4e-4, 256: 4e-4}),
    "rsqrt": (1, 4, {16: 7e-4, 32: 5e-4, 256: 4e-4}),
}


@pytest.mark.parametrize("name", LIMITS)
def test_errors(name):
    low, high, limits = LIMITS[name]
    for hidden, limit in limits.items():
        table = luts.patterns(name, f"nnlut:{hidden}", "float16")
        found = stats.errors(table, luts.exact_values(name, "float16"), "float16", [(low, high)])[0]
        assert found.max_abs <= limit
        assert found.missing == 0


@pytest.mark.parametrize("hidden", specs.HIDDEN)
def test_shipped_tables_are_calm_far_outside(hidden):
    """Closed gates stay closed and open ones stay open over all of fp16, clamped or not."""
    for name in ("silu", "gelu"):
        for spec in (f"nnlut:{hidden}", f"nnlut:{hidden}+clamp"):
            x = bits.decode(bits.PATTERNS, "float16")
            y = bits.decode(luts.patterns(name, spec, "float16"), "float16")
            left, right = (x < -40) & np.isfinite(x), (x > 40) & np.isfinite(x)
            assert np.all(y[left] == 0)
            assert np.array_equal(y[right], x[right])
    exp = bits.decode(luts.patterns("softmax_exp", f"nnlut:{hidden}", "float16"), "float16")
    x = bits.decode(bits.PATTERNS, "float16")
    assert np.all(exp[(x < -20) & np.isfinite(x)] == 0)


def test_gelu_serves_both_forms_and_exp_both_names():
    for hidden in specs.HIDDEN:
        spec = f"nnlut:{hidden}"
        for fmt in FORMATS:
            assert np.array_equal(luts.patterns("gelu_tanh", spec, fmt), luts.patterns("gelu", spec, fmt))
            assert np.array_equal(luts.patterns("softmax_exp", spec, fmt), luts.patterns("exp", spec, fmt))


# --- the clamp ----------------------------------------------------------------------------------------------


def test_a_narrow_table_blows_up_and_the_clamp_cures_it(tmp_path):
    path = narrow(tmp_path)
    x = bits.decode(bits.PATTERNS, "float16")
    free = bits.decode(luts.patterns("silu", f"nnlut:{path}", "float16"), "float16")
    assert free[0xD860] == pytest.approx(0.0458 * 140 - 0.2566, rel=1e-3)  # -140
    clamped = bits.decode(luts.patterns("silu", f"nnlut:{path}+clamp", "float16"), "float16")
    left, right, inside = x <= -5, x >= 5, np.abs(x) < 5
    assert np.all(clamped[left] == 0)
    assert np.array_equal(clamped[right], x[right])
    assert np.array_equal(clamped[inside], free[inside])
    assert np.isnan(clamped[np.isnan(x)]).all()


@pytest.mark.parametrize(
    ("name", "below", "above"),
    [("softmax_exp", 0.0, 1.0), ("exp", 0.0, "end"), ("reciprocal", "end", "end"), ("rsqrt", "end", "end")],
)
@each_format
def test_tails(name, below, above, fmt):
    table = files.load(specs.shipped(name, 16))
    low, high = (np.float32(end) for end in table.range)
    x = bits.decode(bits.PATTERNS, fmt)
    y = bits.decode(luts.patterns(name, "nnlut:16+clamp", fmt), fmt)
    for outside, end, expected in ((x <= low, low, below), (x >= high, high, above)):
        at_end = bits.decode(bits.encode(table(np.array([end])), fmt), fmt)[0]
        assert np.all(y[outside] == (at_end if expected == "end" else expected))
        assert np.isinf(x[outside]).sum() == 1


def test_infinite_inputs_without_the_clamp():
    table = luts.lut_table("exp", "nnlut:16", torch.float16)
    assert table[0xFC00].isnan()  # a first slope of 0 times -inf, as published


def test_clamp_needs_a_range(tmp_path):
    path = narrow(tmp_path, span=None)
    luts.check("silu", f"nnlut:{path}")
    assert luts.input_range("silu", f"nnlut:{path}") is None
    with pytest.raises(UserError, match=r'narrow.json does not say where.*"range": \[low, high\]'):
        luts.check("silu", f"nnlut:{path}+clamp")


# --- the public door ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "spec", "message"),
    [
        ("silu", "nnlut:64", "no NN-LUT of 64 hidden units comes with lutserve, only of 16, 32, 256"),
        ("tanh", "nnlut:16", "no NN-LUT of 'tanh'.*silu, gelu, gelu_tanh, softmax_exp, reciprocal, rsqrt"),
        ("silu", "nnlut:", "unknown look-up table 'nnlut:'.*nnlut:16.*nnlut:FILE"),
        ("silu", "nnlut", "unknown look-up table"),
        ("silu", "nli-4+clamp", "only an nnlut can be clamped"),
        ("silu", "nnlut:no/such.json", "cannot read table file no/such.json: No such file"),
        ("silo", "nnlut:16", "unknown function 'silo'; allowed: silu"),
    ],
)
def test_user_errors(function, spec, message):
    for call in (luts.check, lambda f, s: luts.lut_table(f, s, torch.float16)):
        with pytest.raises(UserError, match=message) as caught:
            call(function, spec)
        assert "\n" not in str(caught.value)


def test_a_file_serves_its_own_function_only(tmp_path):
    path = narrow(tmp_path)
    with pytest.raises(UserError, match="is a table of 'silu', not of 'gelu'"):
        luts.check("gelu", f"nnlut:{path}")
    with pytest.raises(UserError, match=f"other kind; write nnlut:{path}"):
        luts.validate(f"nli:{path}")
    luts.validate(f"nnlut:{path}+clamp")


def test_input_range():
    assert luts.input_range("silu", "nnlut:16") == (-160, 160)
    assert luts.input_range("softmax_exp", "nli-4") == (-65504, 0)
    assert luts.input_range("silu", "exact") is None


# --- the fit ------------------------------------------------------------------------------------------------


def test_fit_is_reproducible_and_at_least_as_good_as_its_start():
    arguments = (exact.silu, "silu", -20.0, 20.0, 8)
    first, error = fit(*arguments, seeds=1, steps=40)
    again, _ = fit(*arguments, seeds=1, steps=40)
    assert all(np.array_equal(getattr(first, k), getattr(again, k)) for k in ("cuts", "slopes", "biases"))
    assert (first.function, first.range, len(first.cuts)) == ("silu", (-20.0, 20.0), 8)
    _, untrained = fit(*arguments, seeds=1, steps=1)
    assert error < 0.7 * untrained
    _, best = fit(*arguments, seeds=3, steps=40)
    assert best <= error


def test_fit_of_a_function_that_does_not_vanish():
    table, error = fit(exact.reciprocal, "mine", 1.0, 2.0, 8, seeds=1, steps=60)
    assert error < 1e-3
    assert table.function == "mine"


def test_fit_vanishes_exactly_where_the_function_does():
    table, _ = fit(exact.gelu, "gelu", -40.0, 40.0, 6, seeds=1, steps=5)
    assert table.slopes[0] == 0
    assert table.biases[0] == 0


def test_fit_told_of_progress():
    parts = []
    fit(exact.silu, "silu", -5.0, 5.0, 4, seeds=2, steps=3, progress=lambda part, _: parts.append(part))
    assert len(parts) == 6
    assert sum(parts) == pytest.approx(1)


@pytest.mark.parametrize(
    ("low", "high", "hidden", "message"),
    [
        (-1.0, 1.0, 16, "not finite at"),
        (0.5, 1.0, 2, "2 hidden units"),
        (0.5, 1.0, 5000, "5000 hidden units"),
    ],
)
def test_fit_refuses(low, high, hidden, message):
    with pytest.raises(UserError, match=message):
        fit(exact.log, "log", low, high, hidden, seeds=1, steps=1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "low", "high"), [("silu", -160, 160), ("rsqrt", 1, 4)])
def test_shipped_tables_can_be_made_again(name, low, high):
    """As good as shipped; equal to the bit only where LAPACK rounds alike."""
    made = json.loads(specs.shipped(name, 16).read_text())["made_by"]
    _, error = fit(getattr(exact, name), name, low, high, 16, seed=made["seed"], seeds=made["seeds"])
    assert error == pytest.approx(made["rms_error"], rel=0.1)
