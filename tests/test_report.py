"""`lutserve report`: what is read, what is computed from it, and the three forms it is written in."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import (
    MODELS,
    ODD,
    PUBLISHED,
    RECIPES,
    RECORDS,
    SPEEDS,
    VALUES,
    cell,
    cells,
    fill,
    write_cells,
)

from lutserve.errors import UserError
from lutserve.report import matrix, speed
from lutserve.report.charts import HEIGHT, WIDTH, Axis, Chart, Point, Series, colour, frontier
from lutserve.report.folder import Folder
from lutserve.report.matrix import Column, Matrix
from lutserve.report.render import Report, collect, flat, html, markdown
from lutserve.report.values import distinct

PPL = Column("ppl:wikitext2", "ppl")
PIQA = Column("piqa", "acc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return collect(folder)


@pytest.fixture(scope="module")
def study(report: Report) -> Matrix:
    return report.matrices[0]


# What is computed


def test_recovery_is_the_share_of_the_baseline(study: Matrix) -> None:
    for row in study.rows:
        piqa, _, ppl = VALUES[row]
        base_piqa, _, base_ppl = VALUES[row[0], "exact"]
        if row[1] == "exact":
            assert study.recovery(row, PIQA) is None
            assert study.mean_recovery(row) == 1.0
        else:
            assert study.recovery(row, PIQA) == piqa / base_piqa
            assert study.recovery(row, PPL) == pytest.approx(base_ppl / ppl, nan_ok=True)
    one = [VALUES[MODELS[0], "mix8"], VALUES[MODELS[0], "exact"]]
    ratios = [one[0][0] / one[1][0], one[0][1] / one[1][1], one[1][2] / one[0][2]]
    assert study.mean_recovery((MODELS[0], "mix8")) == pytest.approx(sum(ratios) / 3)


def test_another_number_of_documents_does_not_compare(tmp_path: Path) -> None:
    lines = [
        cell("m", "exact", "piqa", {"acc": {"value": 0.8}}),
        cell("m", "mix8", "piqa", {"acc": {"value": 0.4}}, n=50),
    ]
    write_cells(tmp_path, lines)
    found = collect(tmp_path).matrices[0]
    assert found.recovery(("m", "mix8"), PIQA) is None
    assert found.mean_recovery(("m", "mix8")) is None


@pytest.mark.parametrize(
    ("ratio", "name"),
    [
        (None, ""),
        (2.0, "full"),
        (0.995, "full"),
        (0.9949, "good"),
        (0.98, "good"),
        (0.95, "fair"),
        (0.9499, "poor"),
        (0.0, "poor"),
        (-math.inf, "poor"),
        (math.nan, "poor"),
    ],
)
def test_levels(ratio: float | None, name: str) -> None:
    assert matrix.level(ratio) == name


def test_mean_accuracy_needs_every_task(study: Matrix, tmp_path: Path) -> None:
    piqa, lambada, _ = VALUES[MODELS[0], "nf4"]
    assert study.mean_accuracy((MODELS[0], "nf4")) == pytest.approx((piqa + lambada) / 2)
    write_cells(tmp_path, [line for line in cells() if (line["recipe"], line["task"]) != ("nf4", "piqa")])
    found = collect(tmp_path).matrices[0]
    assert found.mean_accuracy((MODELS[0], "nf4")) is None
    assert found.mean_accuracy((MODELS[0], "mix8")) is not None


def test_published_metrics_are_shown_even_if_a_task_is_judged_by_another(tmp_path: Path) -> None:
    metrics = {"acc": {"value": 0.5}, "acc_norm": {"value": 0.6}, "f1": {"value": 0.1}}
    write_cells(tmp_path, [cell("m", "exact", "hellaswag", metrics, published={"acc_norm": 0.61})])
    assert [column.metric for column in collect(tmp_path).matrices[0].primary] == ["acc", "acc_norm"]


def test_the_last_cell_counts_and_an_unfinished_line_does_not(tmp_path: Path) -> None:
    first = cell("m", "exact", "piqa", {"acc": {"value": 0.1}})
    second = cell("m", "exact", "piqa", {"acc": {"value": 0.2}})
    file = write_cells(tmp_path, [first, second])
    with file.open("a") as stream:
        stream.write(json.dumps(cell("m", "mix8", "piqa", {"acc": {"value": 0.3}}))[:-9])
    found = Folder.read(tmp_path)
    assert [(c.recipe, c.metrics["acc"].value) for c in found.cells] == [("exact", 0.2)]
    assert [origin.place for origin in found.origins] == ["cells.jsonl:1", "cells.jsonl:2"]
    assert len(found.environments) == 1


def test_perplexities_of_records_become_a_matrix(report: Report) -> None:
    found = next(m for m in report.matrices if m.name == "accuracy-smollm2.json")
    record = json.loads((RECORDS / "accuracy-smollm2.json").read_text())
    column = found.primary[0]
    for row in record["results"]:
        key = ("smollm2-135m", row["recipe"])
        assert found.value(key, column) == row["perplexity"]
        if row is not record["results"][0]:
            assert found.recovery(key, column) == pytest.approx(1 / row["ratio"])


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        (["--method", "none"], []),
        (["--lut", "exact", "--max-model-len", "2048"], ["--method=none"]),
        (["--kv", "nf4", "--method", "mix8"], ["--method", "mix8", "--dtype", "float16", "--kv=nf4"]),
        (["--lut=nli-4"], ["--lut", "nli-4", "--no-enable-prefix-caching"]),
    ],
)
def test_arithmetic_of_flags(flags: list[str], same: list[str]) -> None:
    assert speed.arithmetic(flags) == speed.arithmetic(same)
    assert speed.arithmetic([*flags, "--group-size", "32"]) != speed.arithmetic(same)


def test_speed_meets_accuracy_by_arithmetic_not_by_name(report: Report) -> None:
    chart = next(c for s in report.sections for c in s.charts if c.id == "tradeoff-1")
    points = {(s.name, p.name.split(":")[0]): (p.x, p.y) for s in chart.series for p in s.points}
    study = report.matrices[0]
    for server, recipe in (("bf16", "exact"), ("w8", "mix8"), ("four bits", "nf4")):
        recovery = study.mean_recovery((MODELS[0], recipe))
        assert recovery is not None
        assert points[MODELS[0], server] == (SPEEDS[server], pytest.approx(100 * recovery))
    assert "other checkpoint" not in {server for _, server in points}
    assert len([c for s in report.sections for c in s.charts if c.id.startswith("tradeoff")]) == 2


def test_distinct_flags() -> None:
    own, shared = distinct({"a": ["--x", "1", "--y"], "b": ["--x", "1", "--z", "2 3"], "c": ["--x", "1"]})
    assert (own, shared) == ({"a": "--y", "b": "--z '2 3'", "c": ""}, "--x 1")
    assert distinct({}) == ({}, "")


# Charts

FINITE = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=9))
def test_an_axis_keeps_order_and_room(values: list[float]) -> None:
    axis = Axis(values, 10, 110)
    places = [axis.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(10 <= place <= 110 for place in places)
    ticks = [tick.at for tick in axis.ticks]
    assert ticks == sorted(ticks)
    assert all(10 <= at <= 110 for at in ticks)
    assert len(ticks) <= 12


def test_axes_of_layers_and_of_wide_ranges() -> None:
    assert [tick.text for tick in Axis([0, 1, 2], 0, 1).ticks] == ["0", "1", "2"]
    wide = Axis([1, 10, 1e6], 0, 1)
    assert wide.log
    assert {"1", "10", "100000"} <= {tick.text for tick in wide.ticks}
    assert wide.place(0) == wide.start
    assert not Axis([0, 1e6], 0, 1).log


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_frontier(pairs: list[tuple[int, int]]) -> None:
    points = [Point(x, y, "") for x, y in pairs]
    best = {(p.x, p.y) for p in frontier(points)}
    for x, y in pairs:
        beaten = any((a <= x and b < y) or (a < x and b <= y) for a, b in pairs)
        assert ((x, y) in best) != beaten


def test_labels_do_not_cover_each_other() -> None:
    points = tuple(Point(i % 3, i // 3, f"p{i}", label=f"point {i}") for i in range(9))
    chart = Chart("c", "t", "d", "x", "y", (Series("s", points),))
    boxes = []
    for placed in chart.placed[0]:
        width = 6.6 * len(placed.point.label)
        left = placed.label_x - {"start": 0, "middle": width / 2, "end": width}[placed.anchor]
        boxes.append((left, placed.label_y - 11, left + width, placed.label_y + 3))
        assert left >= 0
        assert left + width <= WIDTH
        assert 0 <= placed.label_y <= HEIGHT
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_what_is_not_a_number_is_not_drawn() -> None:
    points = (Point(1, math.nan, "a"), Point(math.inf, 1, "b"), Point(1, 2, "c"))
    chart = Chart("c", "t", "d", "x", "y", (Series("s", points),))
    assert [placed.point.name for placed in chart.placed[0]] == ["c"]


def test_series_can_be_told_apart() -> None:
    assert len({(colour(i), i % 8) for i in range(64)}) == 64


# The page


class Page(HTMLParser):
    """Elements with their attributes; a tag that is not closed, or closed twice, is an error."""

    VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(html(report))


def test_names_stay_text(page: Page, report: Report) -> None:
    assert ODD in page.text
    assert len(page.all("script")) == 1
    assert "A <CPU>" in page.text


def test_ids_are_unique_and_references_meet(page: Page) -> None:
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in page.elements:
        link = attributes.get("href") or ""
        if link.startswith("#"):
            assert link[1:] in ids
        for name in ("aria-labelledby", "aria-controls"):
            assert set((attributes.get(name) or "").split()) <= set(ids)


def test_nothing_comes_from_outside(report: Report, page: Page) -> None:
    for _, attributes, _ in page.elements:
        assert not attributes.get("src")
        assert re.match("#|data:,|$", attributes.get("href") or "")
    assert "@import" not in html(report)
    assert "url(" not in html(report)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert policy.startswith("default-src 'none'")


def test_tables_and_drawings_say_what_they_are(page: Page) -> None:
    assert len(page.all("table")) == len(page.all("caption")) > 8
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
    drawings = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(drawings) == len(page.all("desc")) > 8
    assert all(a.get("aria-labelledby") for a in drawings)
    for tag, attributes, parents in page.elements:
        if tag == "input" or tag == "select":
            assert "label" in parents
        if attributes.get("role") == "region":
            assert attributes.get("tabindex") == "0"
            assert attributes.get("aria-label") or attributes.get("aria-labelledby")


def test_every_measured_number_has_a_record(report: Report) -> None:
    known = {origin.id for origin in report.origins}
    for section in report.sections:
        for table in section.tables:
            for row in table.rows:
                for column, value in zip(table.columns[table.headers :], row[table.headers :], strict=True):
                    derived = column in ("mean acc, %", "bits a weight") and table.levels
                    if isinstance(value.sort, float | int) and not derived:
                        assert value.origin in known, (table.title, column)


def test_what_is_not_shown_is_named(report: Report) -> None:
    assert report.unused == ["other.json"]
    places = [origin.place for origin in report.origins]
    assert "other.json" not in places
    assert {"recipe.json", "linears-zen3.json", "calibration.safetensors"} <= set(places)


def test_sections_of_the_folder(report: Report) -> None:
    titles = {chart.title for section in report.sections for chart in section.charts}
    assert f"{PPL.task} by bits a weight, {MODELS[0]}" in titles
    for start in ("Speed against accuracy", "SQNR of the weights", "Outlier columns", "Inputs of silu"):
        assert any(title.startswith(start) for title in titles), start
    assert any(title.startswith("Sensitivity by layer") for title in titles)
    calibrated = next(t for s in report.sections for t in s.tables if t.title.endswith(".safetensors"))
    assert [[v.text for v in row] for row in calibrated.rows] == [
        [f"model.layers.{i}.mlp.down_proj", f"{6.5 + i:g}", "1"] for i in range(3)
    ]
    shown = report.recipes[0]
    assert shown.map is not None
    assert [value.text for value in shown.map.rows[1]] == ["1", "none", "nf4"]


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    text = files("lutserve.report").joinpath("page/page.css").read_text()
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", text)
    colours = {name: pair[scheme] for name, *pair in pairs}
    grounds = [colours[name] for name in ("paper", "panel", *matrix.LEVELS)]
    grounds += [pair[scheme] for pair in re.findall(r"background: light-dark\((#\w{6}), (#\w{6})\)", text)]
    assert len(grounds) == 13
    assert all(contrast(colours["ink"], ground) >= 7 for ground in grounds)
    for name in ("muted", "link"):
        assert contrast(colours[name], colours["paper"]) >= 4.5
        assert contrast(colours[name], colours["panel"]) >= 4.5
    for name in ("focus", *(f"s{i}" for i in range(8))):
        assert contrast(colours[name], colours["paper"]) >= 3
    assert contrast(colours["line"], colours["paper"]) >= 1.2


# Other forms


def test_csv_is_the_matrix(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(flat(report))))
    for (model, recipe), (piqa, _, ppl) in VALUES.items():
        row = next(r for r in rows if (r["model"], r["recipe"], r["source"]) == (model, recipe, "measured"))
        assert float(row["piqa_acc"]) == piqa
        assert float(row["ppl:wikitext2_ppl"]) == pytest.approx(ppl, nan_ok=True)
        assert row["bits"] == str(RECIPES[recipe][1] or "")
    published = [r for r in rows if r["source"] == "published"]
    assert [(r["recipe"], r["piqa_acc"], r["lambada_openai_acc"]) for r in published] == [
        ("nf4", str(PUBLISHED), ""),
        ("nf4", str(PUBLISHED), ""),
    ]


def test_markdown_tables_are_even(report: Report) -> None:
    width = 0
    for line in markdown(report).splitlines():
        columns = len(re.findall(r"(?<!\\)\|", line))
        if line.startswith("|"):
            assert columns == (width or columns)
        width = columns if line.startswith("|") else 0
    assert "| llama3-8b | mix8" in markdown(report)
    assert "</script>" not in markdown(report)


# The command


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is read without torch."""
    folder = tmp_path_factory.mktemp("small")
    write_cells(folder, cells())
    return folder


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lutserve.cli", "report", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("name", "start"), [("a.html", "<!DOCTYPE"), ("a.md", "# "), ("a.csv", "preset,")])
def test_the_name_tells_the_format(small: Path, tmp_path: Path, name: str, start: str) -> None:
    done = run(small, "-o", tmp_path / name)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / name).read_text().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_format_wins_over_the_name(small: Path, tmp_path: Path) -> None:
    assert run(small, "-o", tmp_path / "page", "--format", "md").returncode == 0
    assert (tmp_path / "page").read_text().startswith("# ")


def not_json(folder: Path) -> None:
    (folder / "x.json").write_text("{")


def foreign(folder: Path) -> None:
    (folder / "x.json").write_text('{"a": 1}')


def damaged_line(folder: Path) -> None:
    (folder / "cells.jsonl").write_text("{]\n")


def other_line(folder: Path) -> None:
    (folder / "cells.jsonl").write_text('{"model": "m"}\n')


def damaged_bench(folder: Path) -> None:
    (folder / "x.json").write_text('{"lutserve": {}, "summary": [], "runs": []}')


def damaged_search(folder: Path) -> None:
    (folder / "x.json").write_text('{"schema": "lutserve-search-1", "rows": []}')


def bad_recipe(folder: Path) -> None:
    (folder / "x.json").write_text('{"quant_method": "lutserve", "luts": {"silu": "nli-5"}}')


def binary(folder: Path) -> None:
    (folder / "x.json").write_bytes(b"\xff\xfe")


def cut_off(folder: Path) -> None:
    (folder / "x.safetensors").write_bytes(b"12345678")


def only_records(folder: Path) -> None:
    (folder / "x.json").write_text((RECORDS / "linears-zen3.json").read_text())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "holds neither cells.jsonl nor a JSON record; give the folder that"),
        (lambda folder: folder.rmdir(), "is no folder; give the one that"),
        (not_json, "x.json is not JSON"),
        (binary, "x.json is not JSON"),
        (foreign, "has JSON files, but none that lutserve wrote"),
        (cut_off, "x.safetensors cannot be read"),
        (damaged_line, "cells.jsonl:1 is not JSON"),
        (other_line, "cells.jsonl:1 is no cell of `lutserve eval`: cell: Field required"),
        (damaged_bench, "x.json is not as lutserve writes it (KeyError: 'agreement'); move it away"),
        (damaged_search, "x.json is not as lutserve writes it (KeyError: 'sweep'); move it away"),
        (bad_recipe, "unknown look-up table 'nli-5'"),
    ],
)
def test_bad_folders(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=re.escape(message)):
        collect(folder)


def test_bad_input_is_one_line(small: Path, tmp_path: Path) -> None:
    only_records(tmp_path)
    for args, message in (
        ((small, "-o", "a.pdf"), "--output a.pdf; allowed formats: html, md, csv"),
        ((small, "--format", "xml"), "--format xml; allowed formats: html, md, csv"),
        ((small, "-o", tmp_path / "none/a.html"), "cannot write"),
        ((tmp_path, "-o", tmp_path / "a.csv"), "has no accuracies, which is what csv is for"),
    ):
        done = run(*args)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "a.csv").exists()
