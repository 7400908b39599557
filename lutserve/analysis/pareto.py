"""Accuracy against the area of a MAC unit: which formats no other one beats in both."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lutserve import formats
from lutserve.analysis.published import MACS, MODELS, W4A4
from lutserve.errors import UserError


@dataclass(frozen=True)
class Point:
    """A format, its MAC area (square micrometres, None if unpublished) and its score: higher is better."""

    format: str
    area: float | None
    score: float


@dataclass(frozen=True)
class Comparison:
    """Formats measured in the same way; `front` holds those that none with a known area beats in both."""

    name: str
    score: str
    points: list[Point]

    @property
    def front(self) -> list[str]:
        """From the smallest to the most accurate."""
        best, found = -math.inf, []
        known = [(p.area, -p.score, p.format) for p in self.points if p.area is not None]
        for _, loss, name in sorted(known):
            if -loss > best:
                best = -loss
                found.append(name)
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, with the front."""
        return asdict(self) | {"front": self.front}


_CHANGE = "mean relative change of accuracy, %"


def published() -> list[Comparison]:
    """The paper's W4A4 accuracies: each model, and the mean over models with a number of every format."""
    found = []
    for smoothing, rows in W4A4.items():
        complete = [i for i in range(len(MODELS)) if all(row[i] is not None for row in rows.values())]
        columns = {model: [i] for i, model in enumerate(MODELS)}
        columns["mean of " + ", ".join(MODELS[i] for i in complete)] = complete
        for name, chosen in columns.items():
            points = [
                _point(fmt, fmean(values))
                for fmt, row in rows.items()
                if len(values := [v for i in chosen if (v := row[i]) is not None]) == len(chosen)
            ]
            found.append(Comparison(f"{smoothing}: {name}", _CHANGE, points))
    return found


def own(record: Path) -> Comparison:
    """The W4A4 perplexities in a record of `lutserve.benchmarks.quantizers`, against its 16-bit cell.

    UserError if the file is no such record.
    """
    try:
        data = json.loads(record.read_text())
        perplexities = {str(row["cell"]): float(row["perplexity"]) for row in data["results"]}
        exact = perplexities["none"]
        name = f"{data['model']}, {data['text']}, {data['windows']} x {data['window']} tokens"
    except OSError as error:
        raise UserError(f"cannot read {record}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{record} is no record of lutserve.benchmarks.quantizers with a cell `none`: {error!r}"
        ) from None
    points = []
    for cell, perplexity in perplexities.items():
        method, _, algo = cell.partition(":")
        fmt, _, activations = method.partition("+")
        if activations == "a4" and algo == "rtn":
            points.append(_point(formats.get(fmt).name, math.log(exact / perplexity)))
    if not points:
        raise UserError(f"{record} has no W4A4 cell (FORMAT+a4:rtn)")
    return Comparison(name, "minus the rise of the loss, nats a token", points)


def _point(fmt: str, score: float) -> Point:
    return Point(fmt, round(MACS[fmt].area, 1) if fmt in MACS else None, score)
