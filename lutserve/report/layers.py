"""What is known of single layers: errors of quantised weights, outlier columns, ranges of inputs, bits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lutserve.report.charts import Chart, Point, Series
from lutserve.report.folder import Folder, Record, intact
from lutserve.report.values import Section, Table, of, word

_LAYER = re.compile(r"\.(\d+)\.(.+)$")
#: fields of a row a layer -> title of the axis; the rows come from different commands
_MEASURES = {
    "weight_sqnr_db": "SQNR of the weights, dB",
    "output_sqnr_db": "SQNR of the output, dB",
    "largest_input": "largest |input|",
    "outlier_inputs": "input columns with any |x| > 6",
    "outlier_columns": "outlier columns",
    "outlier_misses": "calls that found new outlier columns",
    "bits": "bits a weight",
}


def section(folder: Folder) -> Section:
    """Charts of everything in the folder that goes by layers, and the tables they are drawn from."""
    charts: list[Chart] = []
    tables: list[Table] = []
    for record in folder.records:
        with intact(record):
            charts += _charts(record, len(charts))
            tables += _tables(record, len(tables))
    return Section("layers", "Layer by layer", tuple(tables), tuple(charts))


def _charts(record: Record, before: int) -> list[Chart]:
    rows = list(_rows(record))
    found = _ranges(record, before) if _is_ranges(record) else []
    for key, title in _MEASURES.items():
        if len({row[key] for row in rows if key in row}) > 1:
            found.append(_lines(record, rows, key, title, before + len(found)))
    return found


def _tables(record: Record, before: int) -> list[Table]:
    rows = list(_rows(record))
    keys = tuple(key for key in ("method", "kernel", *_MEASURES) if any(key in row for row in rows))
    shown = tuple((word(row["layer"]), *(of(row.get(key), record.origin) for key in keys)) for row in rows)
    titles = ("layer", *(_MEASURES.get(key, key) for key in keys))
    return [Table(f"layers-{before + 1}", f"Layers, {record.name}", titles, shown)] if rows else []


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    """A row a layer: of `lutserve quantize`'s report, of a calibration, or of a server's /lutserve/layers."""
    data = record.data
    if isinstance(data, dict) and isinstance(data.get("layers"), dict) and "settings" in data:
        for name, facts in data["layers"].items():
            yield {"layer": name} | facts
    elif isinstance(data, list):
        yield from (row for row in data if isinstance(row, dict) and "layer" in row)


def _lines(record: Record, rows: list[dict[str, Any]], key: str, title: str, before: int) -> Chart:
    """One measure by the number of the block, a line for each kind of layer."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        found = _LAYER.search(row["layer"])
        if found and row.get(key) is not None:
            point = Point(int(found[1]), row[key], f"{row['layer']}: {row[key]:g}", origin=record.origin)
            lines.setdefault(found[2].rpartition(".")[2], []).append(point)
    worst = sorted((point for line in lines.values() for point in line), key=lambda p: p.y)
    return Chart(
        f"layers-chart-{before + 1}",
        f"{title[0].upper()}{title[1:]}, {record.name}",
        f"By decoder layer, a line for each kind of layer. Least {worst[0].name}; most {worst[-1].name}.",
        "decoder layer",
        title,
        tuple(Series(kind, tuple(points), line=True) for kind, points in lines.items()),
    )


def _is_ranges(record: Record) -> bool:
    return isinstance(record.data, dict) and str(record.data.get("schema", "")).startswith("lutserve-ranges")


def _ranges(record: Record, before: int) -> list[Chart]:
    """What arrives at the nonlinear sites, from `lutserve profile ranges`: a chart a kind of site."""
    charts: list[Chart] = []
    for site in dict.fromkeys(row["site"] for row in record.data["sites"]):
        whole, inner = [], []
        for row in record.data["sites"]:
            found = _LAYER.search(row["module"])
            if row["site"] != site or not found:
                continue
            number, quantiles = int(found[1]), row["quantiles"]
            name = f"{row['module']}: {row['min']:g} to {row['max']:g}"
            whole.append(Point(number, row["max"], name, low=row["min"], origin=record.origin))
            low, high = quantiles["0.001"], quantiles["0.999"]
            name = f"{row['module']}: 99.8 % within {low:g} to {high:g}"
            inner.append(Point(number, high, name, low=low, origin=record.origin))
        if whole:
            widest = max(whole, key=lambda p: p.y - (p.low or 0))
            charts.append(
                Chart(
                    f"layers-chart-{before + len(charts) + 1}",
                    f"Inputs of {site}, {record.data['model']}",
                    f"Inputs in every decoder layer, and where 99.8 % of them are. Widest: {widest.name}.",
                    "decoder layer",
                    f"input of {site}",
                    (Series("all inputs", tuple(whole)), Series("99.8 % of them", tuple(inner))),
                )
            )
    return charts
