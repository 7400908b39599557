"""From the numbers of many interleaved runs to medians, spreads and ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.table import Table


@dataclass(frozen=True)
class Measurement:
    """The number of one run."""

    provider: str
    workload: str
    #: counts from 0; runs of one round lie next to each other in time
    round: int
    #: tokens a second
    value: float


@dataclass(frozen=True)
class Row:
    """One provider under one workload, over all rounds. Speeds are in tokens a second."""

    workload: str
    provider: str
    median: float
    min: float
    max: float
    #: median, least and greatest over the rounds of the speed relative to the baseline's in that round
    ratio: float
    ratio_min: float
    ratio_max: float


def summarize(measurements: Sequence[Measurement], baseline: str) -> list[Row]:
    """Return one row for each workload and provider: workload by workload, as they first appear.

    Ratios are formed inside each round, of runs that are neighbours in time, because on a shared machine
    the speed of everything drifts by more than what is to be measured. Rounds without a run of the
    baseline count for the speed and not for the ratio, which is NaN where there is none.
    """
    rows = []
    for workload in dict.fromkeys(m.workload for m in measurements):
        runs = [m for m in measurements if m.workload == workload]
        base = {m.round: m.value for m in runs if m.provider == baseline}
        for provider in dict.fromkeys(m.provider for m in runs):
            mine = [m for m in runs if m.provider == provider]
            speeds = [m.value for m in mine]
            ratios = [m.value / base[m.round] for m in mine if m.round in base] or [math.nan]
            rows.append(Row(workload, provider, *_spread(speeds), *_spread(ratios)))
    return rows


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return median(values), min(values), max(values)


def table(rows: Sequence[Row], baseline: str) -> Table:
    """Return the rows as a table for people."""
    shown = Table(
        "workload",
        "provider",
        box=None,
        header_style="bold",
        caption=f"ratios to {baseline} of the same round",
    )
    for heading in ("tokens/s", "min - max", "ratio", "min - max"):
        shown.add_column(heading, justify="right")
    previous = None
    for row in rows:
        if previous not in (None, row.workload):
            shown.add_section()
        shown.add_row(
            "" if row.workload == previous else row.workload,
            row.provider,
            f"{row.median:.1f}",
            f"{row.min:.1f} - {row.max:.1f}",
            f"{row.ratio:.2f}x",
            f"{row.ratio_min:.2f} - {row.ratio_max:.2f}",
        )
        previous = row.workload
    return shown
