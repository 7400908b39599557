"""What `lutserve search` found: damage by size, and which layers are sensitive."""

from __future__ import annotations

import re
from collections import defaultdict

from lutserve.report.charts import Chart, Point, Series
from lutserve.report.folder import Folder, Record, intact
from lutserve.report.values import Section, Table, of, tidy

_LAYER = re.compile(r"layers\.(\d+)\b")


def section(folder: Folder) -> Section:
    """A table and two charts for each report of a search."""
    tables: list[Table] = []
    charts: list[Chart] = []
    for record in folder.records:
        with intact(record):
            if isinstance(record.data, dict) and record.data.get("schema") == "lutserve-search-1":
                rows = [*record.data["rows"], *record.data["sweep"]]
                keys = tidy(rows)
                shown = tuple(
                    tuple(of(row[key], record.origin if i else "") for i, key in enumerate(keys))
                    for row in rows
                )
                title = f"Choices of a method for every layer, {record.name}"
                tables.append(Table(f"search-{len(tables) + 1}", title, keys, shown))
                charts += [_by_bits(record, len(charts)), _sensitivity(record, len(charts) + 1)]
    return Section("search", "Search", tuple(tables), tuple(charts))


def _by_bits(record: Record, before: int) -> Chart:
    kinds: dict[str, list[Point]] = defaultdict(list)
    front = [record.data["rows"][0], *record.data["sweep"]]
    for row in sorted(front, key=lambda row: float(row["bits"])):
        kinds["found"].append(_point(row, record.origin))
    for row in record.data["rows"][1:]:
        kinds[row["name"].split()[0]].append(_point(row, record.origin))
    return Chart(
        f"search-chart-{before + 1}",
        f"KL by bits a weight, {record.name}",
        f"Held-out KL to the unchanged model, in nats a token; {kinds['found'][0].name}. Less is better.",
        "bits a weight",
        "KL, nats a token",
        tuple(Series(kind, tuple(points), line=kind == "found") for kind, points in kinds.items()),
    )


def _point(row: dict[str, float | str], origin: str) -> Point:
    return Point(float(row["bits"]), float(row["kl"]), f"{row['name']}: KL {row['kl']:.4g}", origin=origin)


def _sensitivity(record: Record, before: int) -> Chart:
    """Predicted damage of a whole decoder layer under each method."""
    sums: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for unit, scores in record.data["scores"].items():
        found = _LAYER.search(unit)
        for method, score in scores.items():
            if found:
                sums[method][int(found[1])] += score
    series = tuple(
        Series(
            method,
            tuple(
                Point(layer, score, f"layer {layer}, {method}: {score:.3g}") for layer, score in line.items()
            ),
            line=True,
        )
        for method, line in sums.items()
    )
    return Chart(
        f"search-chart-{before + 1}",
        f"Sensitivity by layer, {record.name}",
        f"Predicted KL if one decoder layer alone had a method, by {record.data['sensitivity']}.",
        "decoder layer",
        "predicted KL, nats a token",
        series,
    )
