"""`lutserve formats analyse` and `hardware`: published facts, our tables, and gates that multiply."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lutserve import formats
from lutserve.analysis import families, mac, pareto, published, synthesis
from lutserve.cli import app
from lutserve.errors import UserError
from lutserve.quantizers.quality import DISTRIBUTIONS

# --- what the paper reports ---------------------------------------------------------------------------------


def test_published_facts(shared: Path) -> None:
    """Every number as in the facts that were taken from the paper."""
    facts = json.loads((shared / "golden/datatypes/paper_facts.json").read_text())
    names = {formats.get(name).paper_name: name for name in formats.NAMES if name != "fp4_e2m1_bnb"}
    for paper, row in facts["hardware_tsmc28"].items():
        known = published.MACS[names[paper]]
        assert known.area == pytest.approx(row["mac_um2"], abs=0.051)
        expected = (row["acc_bits"], row["mult_um2"], row["acc_um2"], row["mac_uw"], row["chip_overhead_pct"])
        assert (*vars(known).values(),) == expected
        assert row["bits"] == formats.get(names[paper]).bits
    assert len(published.MACS) == len(facts["hardware_tsmc28"])
    assert facts["models"] == list(published.MODELS)
    for ours, theirs in (("plain", "no_sq"), ("smoothquant", "smoothquant")):
        rows = facts["w4a4_mean_rel_change_pct"][theirs]
        assert {names[paper]: tuple(row) for paper, row in rows.items()} == published.W4A4[ours]


def test_the_formulas_give_the_published_columns() -> None:
    area = published.MACS["int4"].area
    for name, known in published.MACS.items():
        book = formats.get(name)
        assert mac.overhead(known.area, area, book.bits) == pytest.approx(known.overhead, abs=0.06), name
        if name not in ("fp4_e2m1", "fp4", "fp4_prec2"):  # the published widths of these follow no rule
            assert mac.accumulator_bits(book) == known.accumulator_bits, name


@pytest.mark.parametrize("name", [n for n in formats.NAMES if n not in ("int6", "int7", "int8")])
def test_an_accumulator_holds_256_products_and_no_more_bits(name: str) -> None:
    """The width by trying, not by the logarithm."""
    codes = mac.by_code(formats.get(name))
    largest = max(256 * x * y for x, y in product(codes, codes))
    least = min(256 * x * y for x, y in product(codes, codes))
    bits = next(b for b in range(1, 64) if -(2 ** (b - 1)) < min(least, -largest) and largest < 2 ** (b - 1))
    assert mac.accumulator_bits(formats.get(name)) == bits
    wide = 2 ** (mac.product_bits(formats.get(name)) - 1)
    assert all(-wide <= x * y < wide for x, y in product(codes, codes))


@pytest.mark.parametrize("name", formats.NAMES)
def test_codes_are_the_values(name: str) -> None:
    book = formats.get(name)
    integers, exact = mac.integers(book)
    codes = mac.by_code(book)
    assert len(codes) == 2**book.bits
    # What no value needs is zero; a list without one is as long as there are codes.
    assert sorted(set(codes)) == sorted({*integers, *([0] if len(integers) < len(codes) else [])})
    if exact:
        units = {
            Fraction(i) / Fraction(v).limit_denominator(1000)
            for i, v in zip(integers, book.values, strict=True)
            if v
        }
        assert len(units) == 1
    if book.integer:
        assert [(code ^ len(codes) // 2) - len(codes) // 2 for code in range(len(codes))] == list(codes)


# --- families -----------------------------------------------------------------------------------------------


def test_apot_is_a_member_of_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "GROUPS", (128,))
    rows = families.apot()
    values = [tuple(row["values"]) for row in rows]
    assert len(set(values)) == len(values)
    known = [row for row in rows if row["known_as"]]
    assert [row["known_as"] for row in known] == ["apot4"]
    assert [[0.5, 0.25, 0.0625], [0.125]] in known[0]["sets"]
    # Counted by hand: 16 pairs of sets, 20 triples; the paper's own count is not known.
    assert sum(len(row["sets"]) for row in rows) == 36
    for row in rows:
        assert max(row["values"]) == 1 == -min(row["values"]) and 0 in row["values"]
        for sets in row["sets"]:
            sums = {sum(items) for items in product(*[[0, *s] for s in sets])}
            assert {s / max(sums) for s in sums} == {v for v in row["values"] if v >= 0}


def test_sweep_finds_the_paper_s_headlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A t-shaped list pays on heavy tails and large groups, and nowhere else."""
    monkeypatch.setattr(families, "NUS", (3, 5))
    *rows, normal = families.sweep()
    three, five = (row["sqnr_db"] for row in rows)
    assert normal["nu"] is None and normal["name"] == "nf4"
    assert five["t5"]["g128"] > normal["sqnr_db"]["t5"]["g128"] > five["normal"]["g128"] - 1
    assert normal["sqnr_db"]["t5"]["g32"] > five["t5"]["g32"]
    assert three["t3"]["g128"] > five["t3"]["g128"] > normal["sqnr_db"]["t3"]["g128"]


def test_a_shape_ends_at_one() -> None:
    assert families.shape(formats.get("int4"))[:2] == [-1, -0.875]
    assert families.shape(formats.get("fp4_range"))[-1] == 1


# --- accuracy against area ----------------------------------------------------------------------------------


def test_a_front_is_what_nothing_beats() -> None:
    points = [
        ("a", 1, -5),
        ("b", 2, -6),
        ("c", 3, -2),
        ("d", None, 0),
        ("e", 3, -3),
        ("f", 4, -2),
        ("g", 1, -7),
    ]
    comparison = pareto.Comparison("", "", [pareto.Point(*point) for point in points])
    beaten = {
        p[0]
        for p in points
        if p[1] and any(q[1] and q[1] <= p[1] and q[2] >= p[2] and q[1:] != p[1:] for q in points)
    }
    assert set(comparison.front) == {p[0] for p in points if p[1]} - beaten == {"a", "c"}


def test_published_fronts() -> None:
    """INT4, E2M1, then the variants of E2M1: the paper's conclusion, without clipping outliers or models."""
    fronts = {comparison.name: comparison.front for comparison in pareto.published()}
    assert fronts["plain: Phi-2"] == ["int4", "fp4_basic", "fp4_prec2"]
    assert fronts["plain: mean of Phi-2, Yi-6B"][:2] == ["int4", "fp4_basic"]
    for front in fronts.values():
        assert "fp4_e2m1" not in front[2:] and front[0] == "int4"


def _record(tmp_path: Path, rows: object) -> Path:
    file = tmp_path / "record.json"
    facts = {"model": "m", "text": "t", "windows": 1, "window": 8}
    file.write_text(json.dumps(facts | {"results": rows}))
    return file


def test_own_records(tmp_path: Path) -> None:
    cells = [("none", 10), ("int4+a4:rtn", 20), ("e2m1+a4:rtn", 15), ("nf4+a4:rtn", 12), ("int4:rtn", 11)]
    rows = [{"cell": cell, "perplexity": value} for cell, value in cells]
    found = pareto.own(_record(tmp_path, rows))
    assert [(p.format, p.area) for p in found.points] == [
        ("int4", 160.7),
        ("fp4_basic", 170.4),
        ("nf4", None),
    ]
    assert found.points[0].score == pytest.approx(-0.693147, abs=1e-6)
    assert found.front == ["int4", "fp4_basic"]
    with pytest.raises(UserError, match="no W4A4 cell"):
        pareto.own(_record(tmp_path, rows[:1]))
    with pytest.raises(UserError, match="no record of"):
        pareto.own(_record(tmp_path, rows[1:]))
    (tmp_path / "record.json").write_text("[")
    with pytest.raises(UserError, match="no record of"):
        pareto.own(tmp_path / "record.json")
    with pytest.raises(UserError, match="cannot read"):
        pareto.own(tmp_path / "absent.json")


@pytest.mark.slow
def test_analysis_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it for a few formats: every table, picture and number is there."""
    monkeypatch.setattr(formats, "NAMES", ("int4", "nf4", "sf4_5", "int8"))
    monkeypatch.setattr(families, "GROUPS", (128,))
    monkeypatch.setattr(families, "NUS", (3, 5))
    out, pictures = tmp_path / "new/analysis.json", tmp_path / "pictures"
    command = ["formats", "analyse", "-o", str(out), "--plot", str(pictures)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0 and "smoothquant: Yi-6B" in done.stdout and "relu_t5 g128" in done.stdout
    analysis = json.loads(out.read_text())
    assert [row["name"] for row in analysis["formats"]] == ["int4", "nf4", "sf4_5"]
    assert analysis["formats"][2]["sqnr_db"]["t5"]["g128"] == pytest.approx(18.89, abs=0.005)
    assert set(analysis["formats"][0]["sqnr_db"]) == set(DISTRIBUTIONS)
    names = {"values", "shapes", "sf4", "apot", "pareto"}
    assert {p.name for p in pictures.iterdir()} == {f"{name}.png" for name in names}


# --- units of gates -----------------------------------------------------------------------------------------


def yosys() -> list[str]:
    try:
        return synthesis.find()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["int4", "fp4_prec2"])
@pytest.mark.parametrize("way", list(mac.MULTIPLIERS))
def test_gates_multiply(name: str, way: str, tmp_path: Path) -> None:
    """All 256 products of the synthesised multiplier are those of the values."""
    command, book = yosys(), formats.get(name)
    codes, bits = mac.by_code(book), mac.product_bits(book)
    (tmp_path / "module.sv").write_text(mac.multiplier(book, way))
    passes = synthesis._PASSES.format(top="multiplier")
    table = "tee -q -o table eval -table a,b -show p"
    synthesis.run(command, f"read_verilog -sv module.sv; {passes}; {table}", tmp_path)
    rows = re.findall(r"4'([01]+)\s+4'([01]+)\s*\|\s*\d+'([01]+)", (tmp_path / "table").read_text())
    assert len(rows) == 256
    for row in rows:
        a, b, p = (int(cell, 2) for cell in row)
        assert codes[a] * codes[b] == p - (p >> (bits - 1) << bits)


def test_units_of_gates(tmp_path: Path) -> None:
    yosys()
    out, folder = tmp_path / "new/units.json", tmp_path / "verilog"
    command = ["formats", "hardware", "int4", "e2m1", "-o", str(out), "--verilog", str(folder)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0 and "magnitude" in done.stdout
    int4, e2m1 = json.loads(out.read_text())["units"]
    for unit, bits in ((int4, 16), (e2m1, 17)):
        made = unit["synthesised"]
        assert made["accumulator"]["cells"]["$_DFF_P_"] == bits == made["accumulator_bits"]
        assert made["multiplier"]["nand2"] == min(made["ways"].values())
        assert set(made["ways"]) == set(mac.MULTIPLIERS)
        source = (folder / f"{unit['format']}.sv").read_text()
        assert source == f"{mac.multiplier(formats.get(unit['format']), made['way'])}\n" + mac.accumulator(
            formats.get(unit["format"])
        )
    # The published areas have the two 6 % apart.
    assert e2m1["synthesised"]["nand2"] / int4["synthesised"]["nand2"] == pytest.approx(1.06, abs=0.05)
    with pytest.raises(UserError, match="yosys failed"):
        synthesis.run(yosys(), "no_such_command", tmp_path)


def test_without_yosys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install; the published part works."""
    monkeypatch.setattr(synthesis.shutil, "which", lambda name: None)
    monkeypatch.setattr(synthesis, "find_spec", lambda name: None)
    out = tmp_path / "units.json"
    done = CliRunner().invoke(app, ["formats", "hardware", "-o", str(out)])
    assert isinstance(done.exception, UserError) and "yosys is not installed" in str(done.exception)
    assert not out.exists()
    done = CliRunner().invoke(app, ["formats", "hardware", "--no-synthesis", "-o", str(out)])
    assert done.exit_code == 0 and "228.2" in done.stdout
    assert [unit["synthesised"] for unit in json.loads(out.read_text())["units"]] == [None] * 12
