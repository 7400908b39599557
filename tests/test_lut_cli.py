"""The `lutserve lut` commands, in this process: what they print, what they write, what they refuse."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lutserve import cli, luts
from lutserve.luts import bits, files, report, specs, stats
from lutserve.luts.functions import FUNCTIONS


@pytest.fixture
def lut(capsys, monkeypatch):
    """Run `lutserve lut ...`; return exit status, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["lutserve", "lut", *map(str, args)])
        try:
            status = cli.main()
        except SystemExit as end:
            status = end.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_import_and_help_need_no_arrays():
    code = "import sys, lutserve.cli_lut; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"torch", "numpy", "matplotlib", "lutserve.luts"}


@pytest.mark.parametrize("command", [[], ["list"], ["show"], ["plot"], ["check"], ["build"], ["fit"]])
def test_help(lut, command):
    status, out, _ = lut(*command, "--help")
    assert status == 0
    assert "Usage" in out


# --- list and show ------------------------------------------------------------------------------------------


def test_list_shows_every_table_whole(lut):
    status, out, _ = lut("list")
    assert status == 0
    for function, spec in report.tables():
        assert luts.digest(luts.patterns(function, spec, "float16"))[:12] in out
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(FUNCTIONS)


def test_list_json(lut):
    rows = json.loads(lut("list", "--json", "--dtype", "bfloat16")[1])
    assert len(rows) == len(FUNCTIONS) * 5 + 7 * len(specs.HIDDEN)
    assert rows[0] == {"function": "silu", "spec": "exact", "dtype": "bfloat16", "id": rows[0]["id"]}
    assert rows[0]["id"] == luts.digest(luts.patterns("silu", "exact", "bfloat16"))[:12]


def test_list_errors(lut):
    rows = {(r["function"], r["spec"]): r for r in json.loads(lut("list", "--errors", "--json")[1])}
    exact = rows["silu", "exact"]["whole"]
    assert exact["max_ulp"] <= 0.5 + 1e-9
    assert rows["silu", "nli-32"]["whole"]["mean_abs"] < rows["silu", "nli-2"]["whole"]["mean_abs"]
    assert "max relative" in lut("list", "--errors")[1]
    rows = json.loads(lut("list", "--errors", "--json", "--range", "-10:10")[1])
    ranges = {row["function"]: (row["whole"]["low"], row["whole"]["high"]) for row in rows}
    assert ranges["silu"] == (-10, 10)
    assert ranges["softmax_exp"] == (-10, 0)
    assert ranges["rsqrt"] == (1, 4)


def test_show(lut):
    status, out, _ = lut("show", "silu", "nli-4")
    assert status == 0
    assert out.startswith("silu nli-4 float16: id 413f03abd309")
    facts = json.loads(lut("show", "silu", "nli-4", "--json", "--range", "-5:5")[1])
    assert facts["whole"]["max_abs"] == pytest.approx(1.6e-2, rel=0.02)
    assert (facts["whole"]["low"], facts["whole"]["high"]) == (-5, 5)
    assert len(json.loads(lut("show", "reciprocal", "nli-4", "--json")[1])["regions"]) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["show", "silo", "nli-4"], "unknown function 'silo'; allowed: silu, gelu"),
        (["show", "silu", "nli-3"], "unknown look-up table 'nli-3'; allowed: exact, nli-2, nli-4"),
        (["show", "silu", "nli-4", "--dtype", "fp16"], "unknown dtype 'fp16'; allowed: float16, bfloat16"),
        (["show", "silu", "nli-4", "--range", "5"], "'5' is no range; write LOW:HIGH"),
        (["show", "silu", "nli-4", "--range", "5:1"], "LOW must be below HIGH"),
        (["show", "silu", "nli-4", "--range", "0:nan"], "LOW must be below HIGH"),
        (["list", "--dtype", "x"], "unknown dtype 'x'"),
        (["check", "no-such.json"], "cannot read table file no-such.json"),
        (["plot", "silu", "nli-4", "-o", "x.jpg"], "cannot draw x.jpg: the name must end in .png or .svg"),
        (["build", "silu", "--kind", "nnlut", "-o", "x"], "unknown kind 'nnlut'"),
        (["build", "silo", "-o", "x"], "or module:function for any Python function"),
        (["build", "no_such_module:f", "-o", "x"], "cannot import 'no_such_module:f': No module named"),
        (["build", "math:no_such", "-o", "x"], "cannot import 'math:no_such'"),
        (["build", "math:pi", "-o", "x"], "'math:pi' is no function but a float"),
        (["fit", "log", "--range", "-1:1", "-o", "x"], "the function is not finite at -1"),
    ],
)
def test_refusals_are_one_line(lut, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = lut(*args)
    assert status == 2
    line = err.strip().splitlines()[-1]
    assert line.startswith("lutserve: error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


# --- build, fit, check --------------------------------------------------------------------------------------


def test_build_check_show(lut, tmp_path):
    path = tmp_path / "tanh.json"
    status, out, _ = lut("build", "tanh", "--points", 2, "--range", "-1.0625:-1", "--pin", "both", "-o", path)
    assert status == 0
    assert "loss: " in out
    table = files.load(path)
    assert (table.function, table.points) == ("tanh", 2)
    assert table.cuts[[0, -1]].tolist() == [-1.0625, -1]
    facts = json.loads(lut("check", path, "--json")[1])
    assert (facts["kind"], facts["serves"], facts["range"]) == ("nli", ["tanh"], [-1.0625, -1])
    digest = facts["digest"]["float16"]
    assert digest == luts.digest(luts.patterns("tanh", f"nli:{path}", "float16"))
    for given in (digest, digest[:8].upper(), facts["digest"]["bfloat16"][:12]):
        assert lut("check", path, "--digest", given)[0] == 0
    assert digest[:12] in lut("show", "tanh", f"nli:{path}")[1]


def test_check_refuses_another_digest(lut, tmp_path):
    path = specs.shipped("silu", 16)
    status, out, err = lut("check", path, "--digest", "0123456789ab")
    assert (status, out) == (2, "")
    assert "its table has the digest" in err
    assert "not 0123456789ab" in err
    for bad in ("0123", "0123456z"):
        assert "8 to 64 hexadecimal digits" in lut("check", path, "--digest", bad)[2]


def test_check_tells_what_a_file_is(lut):
    out = lut("check", specs.shipped("exp", 32))[1]
    assert "nnlut of exp, 32 hidden units, range (-256.0, 0.0)" in out
    assert "serves: softmax_exp, exp" in out
    assert "error in float16: max " in out


def test_build_from_a_python_function(lut, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def half_silu(x):\n    return x / 2 if x > 0 else 0.0\n")
    monkeypatch.chdir(tmp_path)
    status, out, _ = lut("build", "mine:half_silu", "--range", "1:1.0625", "-o", "t.json", "--json")
    assert status == 0
    facts = json.loads(out)
    assert facts["known_loss"] is None
    assert facts["loss"] < 1e-3
    assert files.load(tmp_path / "t.json").function == "mine:half_silu"
    assert "serves: no function of ours" in lut("check", "t.json")[1]
    lut("build", "mine:half_silu", "--range", "1:1.0625", "--name", "silu", "-o", "silu.json")
    luts.check("silu", "nli:silu.json")


def test_fit(lut, tmp_path):
    path = tmp_path / "silu.json"
    args = ["--hidden", 4, "--range", "-8:9", "--seeds", 2, "--steps", 5, "--seed", 7]
    status, out, _ = lut("fit", "silu", *args, "-o", path)
    assert status == 0
    assert "rms error over -8 .. 9" in out
    data = json.loads(path.read_text())
    assert (data["op"], data["hidden"], data["range"]) == ("silu", 4, [-8, 9])
    assert (data["made_by"]["seed"], data["made_by"]["seeds"]) == (7, 2)
    assert data["cut_points"][0] == -np.inf
    luts.check("silu", f"nnlut:{path}+clamp")
    again = tmp_path / "again.json"
    out = lut("fit", "silu", *args, "-o", again, "--json")[1]
    assert json.loads(out)["hidden"] == 4
    assert again.read_text() == path.read_text()


# --- plot ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(lut, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"picture.{suffix}"
    status, out, _ = lut("plot", "log", "nli-4", "-o", path)
    assert (status, out) == (0, f"written to {path}\n")
    assert list(tmp_path.iterdir()) == [path]
    if suffix == "svg":
        assert ET.parse(path).getroot().tag.endswith("svg")
    else:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(lut, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = lut("plot", "silu", "nli-4", "-o", tmp_path / "x.png")
    assert status == 2
    assert "pip install 'lutserve[plot]'" in err


# --- the errors themselves ----------------------------------------------------------------------------------


def test_errors_by_hand():
    """Three values: 1.0 exact, 2.0 one unit too large, 3.0 missing."""
    exact = np.full(65536, np.nan)
    table = bits.PATTERNS.copy()
    one, two, three = 0x3C00, 0x4000, 0x4200
    exact[[one, two, three]] = [1.0, 2.0, 3.0]
    table[two], table[three] = two + 1, 0x7C00
    found = stats.errors(table, exact, "float16", [(0.5, 4.0)])[0]
    assert (found.count, found.missing, found.at) == (3, 1, 2.0)
    assert (found.max_abs, found.mean_abs) == (2**-9, 2**-10)
    assert (found.max_relative, found.mean_relative) == (2**-10, 2**-11)
    assert (found.max_ulp, found.mean_ulp) == (1.0, 0.5)


def test_relative_errors_have_a_floor_and_zero_has_a_unit():
    exact = np.full(65536, np.nan)
    exact[0] = 0.0
    table = bits.PATTERNS.copy()
    table[0] = 2
    found = stats.errors(table, exact, "float16", [(-1, 1)])[0]
    assert (found.max_abs, found.max_relative, found.max_ulp) == (2**-23, 2**-9, 2)


@pytest.mark.parametrize(("fmt", "dtype_max"), [("float16", 65504.0), ("bfloat16", 3.3895313892515355e38)])
def test_spacing_is_the_distance_to_the_next_number(fmt, dtype_max):
    values = bits.decode64(bits.PATTERNS, fmt)
    positive = values[(values >= 0) & (values < dtype_max)]
    positive = np.unique(positive)
    following = np.unique(values[(values > 0) & (values <= dtype_max)])
    assert np.array_equal(stats.spacing(positive, fmt), following - positive)


def test_results_beyond_the_format_are_not_counted():
    exact = luts.exact_values("exp", "float16")
    found = stats.errors(luts.patterns("exp", "exact", "float16"), exact, "float16", [(11.0, 20.0)])[0]
    assert (found.count, found.missing) == (12, 0)  # up to 11.0859


def test_regions():
    assert stats.regions(-5, 5) == [(-5, -1), (-1, 1), (1, 5)]
    assert stats.regions(1, 2) == [(1, 1.25), (1.25, 1.5), (1.5, 1.75), (1.75, 2)]
    assert stats.regions(-65504, 65504)[0] == (-65504, -141)
