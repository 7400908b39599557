"""Table files: what is written is read back, and what is wrong is refused in one line."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lutserve import luts
from lutserve.errors import UserError
from lutserve.luts import files, nli, nnlut, specs
from lutserve.luts.functions import FUNCTIONS

NNLUT = {
    "op": "silu",
    "hidden": 2,
    "cut_points": [-math.inf, -1.0, 1.0, math.inf],
    "slopes": [0.0, 0.5, 1.0],
    "biases": [0.0, 0.25, 0.0],
    "range": [-5.0, 5.0],
}
CUTS = [-20.0, -10.0, -5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0, 10.0, 65504.0]
NLI = {
    "schema": "lutserve.nli",
    "version": 1,
    "function": "silu",
    "points": 2,
    "scales": "float16",
    "cuts": CUTS,
    "samples": [0.5] * 19,
}


def write(tmp_path, data):
    path = tmp_path / "table.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


@pytest.mark.parametrize("scales", nli.SCALES)
@pytest.mark.parametrize("points", nli.FILE_POINTS)
def test_nli_round_trip(tmp_path, points, scales):
    function = FUNCTIONS["silu"]
    table = nli.make(
        "silu", function.cuts, points, lambda g: np.array([function.exact(v) for v in g.tolist()]), scales
    )
    path = tmp_path / "table.json"
    files.save(path, table, {"note": "kept"})
    again = files.load(path)
    assert (again.function, again.points) == ("silu", points)
    for part in ("cuts", "scales", "grid", "samples"):
        assert np.array_equal(getattr(again, part), getattr(table, part)), part
    assert json.loads(path.read_text())["made_by"] == {"note": "kept"}
    assert list(tmp_path.iterdir()) == [path]


def test_an_nli_file_of_a_known_table_is_that_table(tmp_path):
    for name in ("silu", "softmax_exp", "rsqrt"):
        path = tmp_path / f"{name}.json"
        files.save(path, nli.table(name, 4), {})
        for dtype in (torch.float16, torch.bfloat16):
            assert luts.table_id(name, f"nli:{path}", dtype) == luts.table_id(name, "nli-4", dtype)


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=20).map(sorted),
    st.integers(0, 2**32 - 1),
    st.sampled_from([None, (-3.5, 80.0)]),
)
def test_nnlut_round_trip(tmp_path_factory, cuts, seed, span):
    lines = np.random.default_rng(seed).normal(size=(2, len(cuts) + 1)) * 100
    table = nnlut.Table("silu", nnlut.to_fp16(cuts), *(nnlut.to_fp16(v) for v in lines), span)
    path = tmp_path_factory.mktemp("nnlut") / "table.json"
    files.save(path, table, {})
    assert '"cut_points": [\n  -Infinity' in path.read_text()
    again = files.load(path)
    assert (again.function, again.range) == ("silu", span)
    for part in ("cuts", "slopes", "biases"):
        assert np.array_equal(getattr(again, part), getattr(table, part)), part


def test_published_form_needs_no_more_than_its_five_keys(tmp_path):
    five = {k: v for k, v in NNLUT.items() if k != "range"}
    assert files.load(write(tmp_path, five)).range is None


def test_coefficients_are_rounded_to_fp16(tmp_path):
    table = files.load(write(tmp_path, NNLUT | {"slopes": [0.1, 1 / 3, 65519.0]}))
    assert table.slopes.tolist() == [0.0999755859375, 0.333251953125, 65504.0]


HOSTILE = [
    ("", "is not JSON"),
    ("{", "is not JSON"),
    ("\x00\xff", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ('{"op": ' + "9" * 5000 + "}", "is not JSON"),
    ("[]", "must hold a JSON object, not a list"),
    ('"op"', "must hold a JSON object, not a str"),
    ("{}", 'neither an NN-LUT table ."op". nor an NLI table ."schema": "lutserve.nli".'),
    (" " * (1 << 20) + "{}", "is larger than 1 MiB"),
    (NNLUT | {"version": 2}, "version 2 is unknown; allowed: 1"),
    (NNLUT | {"extra": 1}, "unknown key 'extra'; allowed: biases, "),
    ({k: v for k, v in NNLUT.items() if k != "slopes"}, "key 'slopes' is missing"),
    (NNLUT | {"op": 7}, "op=7 must be the name of a function"),
    (NNLUT | {"op": "a\nb"}, r"op='a\\nb' must be the name"),
    (NNLUT | {"op": ""}, "op='' must be the name"),
    (NNLUT | {"hidden": 3}, "cut_points must be a list of 5 numbers, not 4 entries"),
    (NNLUT | {"hidden": 2.0}, "hidden=2.0 must be a whole number from 1 to 4096"),
    (NNLUT | {"hidden": True}, "hidden=True must be a whole number"),
    (NNLUT | {"hidden": 10**9}, "hidden=1000000000 must be a whole number"),
    (NNLUT | {"hidden": -1}, "hidden=-1 must be"),
    (NNLUT | {"cut_points": [-9.0, -1.0, 1.0, math.inf]}, "cut_points must begin with -Infinity"),
    (NNLUT | {"cut_points": [-math.inf, 1.0, -1.0, math.inf]}, r"cut_points must ascend, but \[1\]=1 is"),
    (NNLUT | {"cut_points": [-math.inf, math.nan, 1.0, math.inf]}, r"cut_points\[1\]=nan is no number"),
    (NNLUT | {"cut_points": [-math.inf, -math.inf, 1.0, math.inf]}, r"cut_points\[0\]=-inf is not finite"),
    (NNLUT | {"slopes": [0.0, math.nan, 1.0]}, r"slopes\[1\]=nan is no number"),
    (NNLUT | {"slopes": [0.0, math.inf, 1.0]}, r"slopes\[1\]=inf is not finite"),
    (NNLUT | {"slopes": [0.0, 65520.0, 1.0]}, r"slopes\[1\]=65520.0 does not fit fp16"),
    (NNLUT | {"slopes": [0.0, "1", 1.0]}, r"slopes\[1\]='1' is no number"),
    (NNLUT | {"slopes": [0.0, None, 1.0]}, r"slopes\[1\]=None is no number"),
    (NNLUT | {"slopes": [0.0, 10**400, 1.0]}, r"slopes\[1\]=1000.*\.\.\. is no number"),
    (NNLUT | {"slopes": [0.0, True, 1.0]}, r"slopes\[1\]=True is no number"),
    (NNLUT | {"slopes": {"0": 1}}, "slopes must be a list of 3 numbers, not {'0': 1}"),
    (NNLUT | {"biases": [0.0]}, "biases must be a list of 3 numbers, not 1 entries"),
    (NNLUT | {"range": [5.0, -5.0]}, r"range must ascend"),
    (NNLUT | {"range": [0.0, math.inf]}, r"range\[1\]=inf is not finite"),
    (NNLUT | {"range": "all"}, "range must be a list of 2 numbers"),
    (NLI | {"schema": "other"}, "neither an NN-LUT table"),
    (NLI | {"version": 2}, "version 2 is unknown; allowed: 1"),
    (NLI | {"version": None}, "version None is unknown"),
    (NLI | {"points": 3}, "points=3; allowed: 1, 2, 4, 8, 16, 32, 64"),
    (NLI | {"points": True}, "points=True; allowed"),
    (NLI | {"scales": "float64"}, "scales='float64'; allowed: float16, float32"),
    (NLI | {"scales": ["float16"]}, "scales=.'float16'.; allowed"),
    (NLI | {"cuts": CUTS[:-1]}, "cuts must be a list of 11 numbers, not 10 entries"),
    (NLI | {"cuts": [*CUTS[:3], math.nan, *CUTS[4:]]}, r"cuts\[3\]=nan is no number"),
    (NLI | {"cuts": [*CUTS[:-1], math.inf]}, r"cuts\[10\]=inf is not finite"),
    (NLI | {"cuts": [*CUTS[:-1], 70000.0]}, r"cuts\[10\]=70000.0 does not fit fp16"),
    (NLI | {"cuts": CUTS[::-1]}, "cuts .rounded to fp16. must ascend"),
    (
        NLI | {"cuts": [*CUTS[:4], -1.00001, *CUTS[4:5], *CUTS[6:]]},
        r"must ascend, but \[4\]=-1 is followed by -1",
    ),
    (NLI | {"cuts": [*CUTS[:5], 0.0, 1e-5, *CUTS[7:]]}, "segment 5 of width 1.*e-05 has no float16 scale"),
    (NLI | {"samples": [0.5] * 18}, "samples must be a list of 19 numbers, not 18 entries"),
    (NLI | {"samples": [0.5] * 18 + [math.nan]}, r"samples\[18\]=nan is no number"),
    (NLI | {"samples": [0.5] * 18 + [1e6]}, r"samples\[18\]=1000000.0 does not fit fp16"),
    (NLI | {"junk": 1}, "unknown key 'junk'"),
]


@pytest.mark.parametrize(("data", "message"), HOSTILE, ids=[message[:40] for _, message in HOSTILE])
def test_hostile_files_are_refused_in_one_line(tmp_path, data, message):
    path = write(tmp_path, data)
    kind = "nli" if isinstance(data, dict) and "schema" in data else "nnlut"
    for call in (
        lambda: files.load(path),
        lambda: luts.validate(f"{kind}:{path}"),
        lambda: luts.check("silu", f"{kind}:{path}"),
        lambda: luts.lut_table("silu", f"{kind}:{path}", torch.float16),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
        assert str(path) in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.sampled_from([NNLUT, NLI]), st.data())
def test_any_value_in_any_place_loads_or_is_refused(tmp_path_factory, base, data):
    key = data.draw(st.sampled_from(sorted(base)))
    changed = dict(base)
    if isinstance(base[key], list) and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(base[key]) - 1))
        changed[key] = [*base[key][:place], data.draw(JSON), *base[key][place + 1 :]]
    else:
        changed[key] = data.draw(JSON)
    path = write(tmp_path_factory.mktemp("any"), changed)
    try:
        table = files.load(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    patterns = table.patterns("float16", True) if isinstance(table, nli.Table) else table.patterns("float16")
    if isinstance(table, nli.Table):
        assert not np.isnan(patterns.view(np.float16)[:0x7C01]).any()


@pytest.mark.parametrize("what", ["absent", "folder"])
def test_what_cannot_be_read_or_written(tmp_path, what):
    path = tmp_path if what == "folder" else tmp_path / "no" / "table.json"
    with pytest.raises(UserError, match="cannot read table file"):
        files.load(path)
    with pytest.raises(UserError, match="cannot write"):
        files.save(path, nli.table("silu", 2), {})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write(tmp_path, NLI)
    before = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    table = nli.table("silu", 2)
    with pytest.raises(TypeError):
        files.save(path, table, {"not": {"json"}})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_served_functions():
    assert specs.serves("gelu", "gelu_tanh")
    assert specs.serves("exp", "softmax_exp")
    assert specs.serves("divide", "reciprocal")
    assert specs.serves("invsqrt", "rsqrt")
    assert not specs.serves("gelu_tanh", "gelu")
    assert not specs.serves("reciprocal", "divide")
