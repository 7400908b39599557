"""Benchmark records as tables, and the perplexities among them as cells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lutserve.report.folder import Cell, Folder, Metric, Record, intact
from lutserve.report.values import NOTHING, Section, Table, Value, distinct, number, of, tidy, word

_TIMINGS = "microseconds_p20_median_p80"


def results(record: Record) -> list[dict[str, Any]]:
    """The rows of a record of `lutserve.benchmarks`; empty for any other file."""
    rows = record.data.get("results") if isinstance(record.data, dict) else None
    return rows if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows) else []


def is_bench(record: Record) -> bool:
    """Whether a record is of `lutserve bench`."""
    return isinstance(record.data, dict) and {"lutserve", "summary", "runs"} <= record.data.keys()


def perplexities(folder: Folder) -> list[Cell]:
    """The rows of records that measured perplexities, as cells of a preset named after the file.

    The first row of a record is what the others are compared with.
    """
    cells: list[Cell] = []
    for record in folder.records:
        with intact(record):
            cells += _cells(record)
    return cells


def _cells(record: Record) -> list[Cell]:
    rows = [row for row in results(record) if "perplexity" in row]
    names = [str(row.get("recipe") or row.get("cell")) for row in rows]
    return [
        Cell(
            cell=f"{record.name}:{name}",
            preset=record.name,
            model=record.data.get("model", ""),
            recipe=name,
            flags=list(row.get("flags", ())),
            task=f"ppl:{record.data.get('text', 'text')}",
            metrics={"ppl": Metric(value=row["perplexity"])},
            n=record.data.get("windows"),
            bits=row.get("bits"),
            baseline=names[0],
            origin=record.origin,
        )
        for name, row in zip(names, rows, strict=True)
    ]


def section(folder: Folder) -> Section:
    """Every table of speed, memory and whatever else was measured."""
    tables: list[Table] = []
    for record in folder.records:
        with intact(record):
            if is_bench(record):
                tables.append(_servers(record, len(tables)))
            elif rows := results(record):
                if all(_TIMINGS in row for row in rows):
                    tables.append(_operators(record, rows, len(tables)))
                elif "perplexity" not in rows[0]:
                    tables.append(_plain(record, rows, len(tables)))
    return Section("speed", "Speed and memory", tuple(tables))


def _servers(record: Record, before: int) -> Table:
    """`lutserve bench`: a row a workload and provider."""
    setting = record.data["lutserve"]
    agreement = setting["agreement"]
    flags, shared = distinct(setting["serve"])
    rows = []
    for row in record.data["summary"]:
        apart = agreement.get(row["provider"])
        rows.append(
            (
                word(row["workload"]),
                Value(row["provider"], row["provider"], notes=(flags[row["provider"]],)),
                number(
                    row["median"],
                    f"{row['median']:.1f}",
                    record.origin,
                    notes=(f"{row['min']:.1f} to {row['max']:.1f}",),
                ),
                number(
                    row["ratio"],
                    f"{row['ratio']:.2f}x",
                    record.origin,
                    notes=(f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}",),
                ),
                number(apart["mean"], f"{apart['mean']:.4f}", record.origin) if apart else NOTHING,
            )
        )
    columns = ("workload", "server", "tokens/s", f"against {setting['baseline']}", "nats apart")
    note = (
        "Medians over interleaved rounds, below them the range. Ratios are within a round. Nats apart: "
        f"mean distance of the log-probabilities of a fixed prompt to the baseline's. All with {shared}."
    )
    return Table(f"speed-{before + 1}", f"Servers, {record.name}", columns, tuple(rows), headers=2, note=note)


def _operators(record: Record, rows: Iterable[dict[str, Any]], before: int) -> Table:
    """Operator timings: a row a case, a column a contender."""
    listed = list(rows)
    names = list(dict.fromkeys(name for row in listed for name in row[_TIMINGS]))
    shown = []
    for row in listed:
        timings = row[_TIMINGS]
        base = next(iter(timings.values()))[1]
        values = [word(row["case"])]
        for name in names:
            if name not in timings:
                values.append(NOTHING)
                continue
            low, middle, high = timings[name]
            notes = (f"{low:g} to {high:g}", f"{base / middle:.2f}x")
            values.append(number(middle, f"{middle:g}", record.origin, notes=notes))
        shown.append(tuple(values))
    note = "Microseconds: median; below it the 20th to 80th percentile, and the speed relative to the first."
    note = f"{note} {record.data.get('note', '')}".strip()
    return Table(
        f"speed-{before + 1}", f"Operators, {record.name}", ("case", *names), tuple(shown), note=note
    )


def _plain(record: Record, rows: list[dict[str, Any]], before: int) -> Table:
    """Any other list of results, as it is."""
    columns = tidy(rows)
    shown = tuple(
        tuple(of(row.get(key), record.origin if index else "") for index, key in enumerate(columns))
        for row in rows
    )
    return Table(f"speed-{before + 1}", record.name, columns, shown, note=str(record.data.get("note", "")))
