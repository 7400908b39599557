"""Speed against accuracy: servers of `lutserve bench` beside the recipes that compute the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from lutserve.report.charts import Chart, Point, Series
from lutserve.report.folder import Folder, Record, intact
from lutserve.report.matrix import Matrix
from lutserve.report.records import is_bench

#: flags of `lutserve serve` that decide what is computed, with what leaving them out means
_ARITHMETIC = {
    "--method": "none",
    "--group-size": "",
    "--numerics": "fast",
    "--outliers": "online",
    "--lut": "exact",
    "--lut-sites": "",
    "--softmax-sum": "float32",
    "--kv": "exact",
    "--recipe": "",
    "--calibration-file": "",
}

Arithmetic = tuple[tuple[str, str], ...]


def arithmetic(flags: Sequence[str]) -> Arithmetic:
    """What the flags of a server compute, whatever their order and whatever else they say."""
    words = [part for flag in flags for part in flag.split("=", 1)]
    given = {
        name: value for name, value in pairwise(words) if name in _ARITHMETIC and value != _ARITHMETIC[name]
    }
    return tuple(sorted(given.items()))


def charts(folder: Folder, matrices: Iterable[Matrix]) -> tuple[Chart, ...]:
    """A chart for each workload of each bench record that shares a recipe with the matrices."""
    kept = _recoveries(matrices)
    found: list[Chart] = []
    for record in filter(is_bench, folder.records):
        with intact(record):
            for workload in dict.fromkeys(row["workload"] for row in record.data["summary"]):
                chart = _chart(record, workload, kept, len(found))
                found += [chart] if chart else []
    return tuple(found)


def _recoveries(matrices: Iterable[Matrix]) -> dict[str, dict[Arithmetic, float]]:
    """Model -> arithmetic -> mean recovery, of the first matrix that has it."""
    kept: dict[str, dict[Arithmetic, float]] = {}
    for matrix in matrices:
        for row in matrix.rows:
            ratio = matrix.mean_recovery(row)
            if ratio is not None:
                flags = matrix.of(row)[0].flags
                kept.setdefault(row[0], {}).setdefault(arithmetic(flags), ratio)
    return kept


def _chart(
    record: Record, workload: str, kept: dict[str, dict[Arithmetic, float]], before: int
) -> Chart | None:
    serve, base = record.data["lutserve"].get("serve", {}), record.data["lutserve"]["baseline"]
    series: list[Series] = []
    named: set[str] = set()
    for model, ratios in kept.items():
        points = []
        for row in record.data["summary"]:
            flags = serve.get(row["provider"])
            # A server of another checkpoint computes what its flags do not tell.
            if row["workload"] != workload or flags is None or _model(flags) != _model(serve[base]):
                continue
            ratio = ratios.get(arithmetic(flags))
            if ratio is not None:
                name = f"{row['provider']}: {row['ratio']:.2f}x the speed, {100 * ratio:.2f} % recovered"
                # One label for all models: their points lie over each other.
                label = "" if row["provider"] in named else row["provider"]
                points.append(Point(row["ratio"], 100 * ratio, name, label=label, origin=record.origin))
        if len(points) > 1:
            series.append(Series(model, tuple(points)))
            named |= {point.label for point in points}
    if not series:
        return None
    return Chart(
        f"tradeoff-{before + 1}",
        f"Speed against accuracy, {workload} of {record.name}",
        f"Speed relative to {base} of the same round, by the share of the baseline's accuracy that "
        "a recipe recovers, mean over tasks. Up and right is better. Speed is of the benchmark's model, "
        "accuracy on the models named in the legend.",
        f"speed relative to {base}",
        "recovery, %",
        tuple(series),
    )


def _model(flags: Sequence[str]) -> str:
    return flags[flags.index("--model") + 1] if "--model" in flags else ""
