"""Two recipes on the same questions: paired differences, which see far less noise than two averages."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lutserve.errors import UserError
from lutserve.eval import store


@dataclass(frozen=True)
class Side:
    """Finished cells of one recipe in one store."""

    folder: Path
    recipe: str
    #: (model, task) -> row
    rows: dict[tuple[str, str], store.Row]

    def __str__(self) -> str:
        return f"{self.folder}:{self.recipe}"


@dataclass(frozen=True)
class Difference:
    """B minus A on one metric of one task, over the items that both have."""

    model: str
    task: str
    metric: str
    a: float
    b: float
    #: mean over the items of B's value minus A's, and its standard error
    mean: float
    stderr: float | None
    #: share of questions that are right on one side only; None where items are no questions
    flips: float | None
    n: int


def side(text: str) -> Side:
    """Return what `FOLDER` (with one recipe) or `FOLDER:RECIPE` names.

    Raises:
        UserError: no store there, or not exactly one recipe is meant.

    """
    folder, _, recipe = (text, "", "") if Path(text).is_dir() else text.rpartition(":")
    rows = store.read(Path(folder or text))
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    if not recipe and len(recipes) == 1:
        recipe = recipes[0]
    if recipe not in recipes:
        raise UserError(f"{text}: give {folder or text}:RECIPE; its recipes are {', '.join(recipes)}")
    chosen = {(row["model"], row["task"]): row for row in rows if row["recipe"] == recipe}
    return Side(Path(folder or text), recipe, chosen)


def compare(a: Side, b: Side) -> list[Difference]:
    """Return the differences on every task that both sides have finished.

    Raises:
        UserError: they have no task in common, or its items are not the same.

    """
    common = [key for key in a.rows if key in b.rows]
    if not common:
        raise UserError(f"{a} and {b} have no model and task in common")
    found = []
    for model, task in common:
        values = [_items(one, one.rows[model, task]) for one in (a, b)]
        if values[0].keys() != values[1].keys():
            raise UserError(f"{model} {task}: {a} and {b} have other items (--limit, data or windows differ)")
        for metric in next(iter(values[0].values()), {}):
            pairs = [(values[0][item][metric], values[1][item][metric]) for item in values[0]]
            found.append(_difference(model, task, metric, pairs))
    return found


def _difference(model: str, task: str, metric: str, pairs: list[tuple[float, float]]) -> Difference:
    changes = [second - first for first, second in pairs]
    right_or_wrong = all(value in (0, 1) for pair in pairs for value in pair)
    return Difference(
        model=model,
        task=task,
        metric=metric,
        a=statistics.fmean(first for first, _ in pairs),
        b=statistics.fmean(second for _, second in pairs),
        mean=statistics.fmean(changes),
        stderr=statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None,
        flips=sum(map(bool, changes)) / len(changes) if right_or_wrong else None,
        n=len(pairs),
    )


def _items(one: Side, row: store.Row) -> dict[str, dict[str, float]]:
    """Item -> metric -> value: questions of an lm-eval task, windows of a perplexity."""
    if row["samples"] is None:
        nll = _read(one.folder / row["results"])[0].get("nll")
        if nll is None:
            raise UserError(
                f"{one.folder / row['results']} has neither samples nor windows; compare single tasks"
            )
        window = row["settings"]["window"]
        return {f"{window}:{index}": {"nll": value} for index, value in enumerate(nll)}
    found = {}
    for sample in _read(one.folder / row["samples"]):
        values = {name: sample[name] for name in row["metrics"] if isinstance(sample.get(name), (int, float))}
        if values:
            found[f"{sample['doc_id']}:{sample['doc_hash']}:{sample['filter']}"] = values
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one a line."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({error}); remove its line from cells.jsonl and run again"
        ) from None


def table(differences: list[Difference]) -> Table:
    """Return the differences for the terminal."""
    found = Table("model", "task", "metric", "A", "B", "B - A", "stderr", "flips", "n", box=None)
    for d in differences:
        stderr = "" if d.stderr is None else f"{d.stderr:.2g}"
        flips = "" if d.flips is None else f"{d.flips:.1%}"
        cells = (f"{d.a:.4f}", f"{d.b:.4f}", f"{d.mean:+.4f}", stderr, flips, str(d.n))
        found.add_row(d.model, d.task, d.metric, *cells)
    return found
