"""Timings of single operators: interleaved clocks in, one JSON record and one table out."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lutserve import machine
from lutserve.console import for_tables
from lutserve.kernels import library

Timings = dict[str, list[float]]


def spread(microseconds: Sequence[float]) -> list[float]:
    """Return p20, median and p80 of some timings, in their unit."""
    fifths = statistics.quantiles(microseconds, n=5)
    return [round(q, 1) for q in (fifths[0], statistics.median(microseconds), fifths[3])]


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record in one step, so that a reader never sees half a file."""
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(path)


def report(
    name: str, cases: Iterable[tuple[str, Timings]], output: Path, threads: int, note: str = ""
) -> None:
    """Run all cases of `benchmarks/<name>.py`, write `output/<name>_<date>.json` and print a table.

    Args:
        name: module of the benchmark.
        cases: name and `spread` in microseconds of each call of a comparison; the first call is the baseline.
        output: folder, made if need be.
        threads: threads of torch.
        note: what a reader of the record must know about its numbers.

    """
    torch.set_num_threads(threads)
    record = machine.collect() | {
        "command": ["python", "-m", f"lutserve.benchmarks.{name}", *sys.argv[1:]],
        "threads": threads,
        "kernels": library.load(),
        "note": note,
    }
    results: list[dict[str, Any]] = []
    table = Table("case", "microseconds: median (p20 - p80), in brackets the speed relative to the first")
    table.box = None
    for case, timings in cases:
        results.append({"case": case, "microseconds_p20_median_p80": timings})
        base = next(iter(timings.values()))[1]
        cells = (
            f"{who} {m:g} ({low:g} - {high:g}) \\[{base / m:.2f}x]" for who, (low, m, high) in timings.items()
        )
        table.add_row(case, ", ".join(cells))
    for_tables().print(table)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}_{datetime.now():%Y-%m-%dT%H-%M-%S}.json"
    write(path, record | {"results": results})
    print(f"written to {path}", file=sys.stderr)
