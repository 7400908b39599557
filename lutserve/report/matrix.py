"""Cells as tables: a row a model and recipe, a column a task and metric, each value beside its baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lutserve.eval.claim import lower_is_better
from lutserve.report.charts import Chart, Point, Series, frontier
from lutserve.report.folder import Cell, Folder
from lutserve.report.values import NOTHING, Section, Table, Value, distinct, number, word

#: metrics between 0 and 1, which are written in percent
_SHARES = frozenset({"acc", "acc_norm", "exact_match", "f1", "flip_rate"})
#: what a task is judged by, the first that it has
_PRIMARY = ("ppl", "acc", "exact_match", "acc_norm", "word_perplexity", "perplexity")
#: level -> the least recovery that has it, and what a legend says
LEVELS = {
    "full": (0.995, "at least 99.5 %"),
    "good": (0.98, "at least 98 %"),
    "fair": (0.95, "at least 95 %"),
    "poor": (-math.inf, "below 95 %"),
}


@dataclass(frozen=True)
class Column:
    """A metric of a task."""

    task: str
    metric: str

    @property
    def title(self) -> str:
        """What a reader calls it."""
        unit = ",\u00a0%" if self.metric in _SHARES else ""
        return f"{self.task} {self.metric}{unit}" if self.metric != "ppl" else f"{self.task}{unit}"


Row = tuple[str, str]


class Matrix:
    """The cells of one preset.

    rows: model and recipe. columns: every metric. primary: the columns that tasks are judged by, and those
    with published values.
    """

    def __init__(self, name: str, cells: Sequence[Cell]) -> None:
        self.name = name
        self.cells = {(cell.model, cell.recipe, cell.task): cell for cell in cells}
        self.rows: list[Row] = list(dict.fromkeys((cell.model, cell.recipe) for cell in cells))
        self.columns = list(dict.fromkeys(Column(c.task, metric) for c in cells for metric in c.metrics))
        judged = {Column(cell.task, _primary(cell)) for cell in cells}
        judged |= {Column(cell.task, metric) for cell in cells for metric in cell.published}
        self.primary = [column for column in self.columns if column in judged]
        self.accuracies = [column for column in self.primary if column.metric == "acc"]

    def cell(self, row: Row, column: Column) -> Cell | None:
        """The cell in which a value is, if it was measured."""
        cell = self.cells.get((*row, column.task))
        return cell if cell and column.metric in cell.metrics else None

    def value(self, row: Row, column: Column) -> float | None:
        """A measured value."""
        cell = self.cell(row, column)
        return cell.metrics[column.metric].value if cell else None

    def recovery(self, row: Row, column: Column) -> float | None:
        """How much of its baseline a value reaches, 1 being all; None for the baseline itself.

        Only values of as many documents compare.
        """
        cell = self.cell(row, column)
        if cell is None or cell.baseline is None or cell.baseline == cell.recipe:
            return None
        base = self.cells.get((cell.model, cell.baseline, cell.task))
        if base is None or base.n != cell.n or column.metric not in base.metrics:
            return None
        return _ratio(cell.metrics[column.metric].value, base.metrics[column.metric].value, column.metric)

    def mean_recovery(self, row: Row) -> float | None:
        """The mean recovery over the tasks; 1 for a baseline, None if there is nothing to compare with."""
        found = [self.recovery(row, column) for column in self.primary]
        known = [ratio for ratio in found if ratio is not None]
        if known:
            return sum(known) / len(known)
        return 1.0 if any(c.baseline == row[1] for c in self.cells.values() if c.model == row[0]) else None

    def mean_accuracy(self, row: Row) -> float | None:
        """The mean accuracy over the tasks, where all of them are there."""
        found = [self.value(row, column) for column in self.accuracies]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if len(known) > 1 and len(known) == len(found) else None

    def bits(self, row: Row) -> float | None:
        """Stored bits a weight."""
        found = (cell.bits for cell in self.of(row))
        return next((bits for bits in found if bits is not None), None)

    def of(self, row: Row) -> list[Cell]:
        """The cells of a row."""
        return [cell for cell in self.cells.values() if (cell.model, cell.recipe) == row]

    def table(self, number_of: int) -> Table:
        """The matrix as readers see it."""
        mean = any(self.mean_accuracy(row) is not None for row in self.rows)
        columns = ["model", "recipe", *(column.title for column in self.primary)]
        columns += ["mean acc, %"] if mean else []
        columns += ["bits a weight"] if any(self.bits(row) is not None for row in self.rows) else []
        flags, shared = distinct({row: self.of(row)[0].flags for row in self.rows})
        rows = []
        for row in self.rows:
            values = [word(row[0]), Value(row[1], row[1], notes=(flags[row],) if flags[row] else ())]
            values += [self._shown(row, column) for column in self.primary]
            if mean:
                values.append(number(self.mean_accuracy(row), _written(self.mean_accuracy(row), "acc")))
            if columns[-1] == "bits a weight":
                values.append(number(self.bits(row), f"{self.bits(row):.2f}" if self.bits(row) else ""))
            rows.append(tuple(values))
        note = "Below a value: the share of the baseline that it recovers, then the published value."
        note += f" All with {shared}." if shared else ""
        return Table(
            f"matrix-{number_of}",
            f"Accuracy, {self.name}" if self.name else "Accuracy",
            tuple(columns),
            tuple(rows),
            headers=2,
            note=note,
            levels=True,
        )

    def _shown(self, row: Row, column: Column) -> Value:
        cell = self.cell(row, column)
        if cell is None:
            return NOTHING
        metric = cell.metrics[column.metric]
        notes = []
        text = _written(metric.value, column.metric)
        ratio = self.recovery(row, column)
        if ratio is not None:
            notes.append(f"{100 * ratio:.2f} %")
        published = cell.published.get(column.metric)
        if published is not None:
            notes.append(f"publ. {_written(published, column.metric)}")
        if metric.stderr:
            text += f" ± {_written(metric.stderr, column.metric)}"
        return number(metric.value, text, cell.origin, notes=tuple(notes), level=level(ratio))


def matrices(folder: Folder) -> list[Matrix]:
    """The matrices of a folder."""
    names = dict.fromkeys(cell.preset for cell in folder.cells)
    return [Matrix(name, [cell for cell in folder.cells if cell.preset == name]) for name in names]


def section(found: Iterable[Matrix]) -> Section:
    """The tables, and perplexity by bits wherever the bits are known."""
    listed = list(found)
    tables = tuple(matrix.table(index) for index, matrix in enumerate(listed, 1))
    charts: list[Chart] = []
    for matrix in listed:
        charts += _by_bits(matrix, len(charts))
    return Section("accuracy", "Accuracy", tables, tuple(charts))


def level(ratio: float | None) -> str:
    """The level of a recovery; none for none."""
    if ratio is None:
        return ""
    # "poor" also for what is not a number
    return next((name for name, (least, _) in LEVELS.items() if ratio >= least), "poor")


def _by_bits(matrix: Matrix, before: int) -> list[Chart]:
    """A chart for each model and perplexity, of the recipes whose bits are known."""
    charts: list[Chart] = []
    for column in matrix.primary:
        for model in dict.fromkeys(row[0] for row in matrix.rows):
            points = tuple(
                Point(
                    bits, value, f"{row[1]}: {value:.4g} at {bits:.2f} bits", label=row[1], origin=cell.origin
                )
                for row in matrix.rows
                if row[0] == model
                and (cell := matrix.cell(row, column))
                and (bits := cell.bits)
                and math.isfinite(value := cell.metrics[column.metric].value)
            )
            if (
                column.metric not in ("ppl", "perplexity", "word_perplexity")
                or len({point.x for point in points}) < 2
            ):
                continue
            best = frontier(points)
            names = ", ".join(point.label for point in best)
            charts.append(
                Chart(
                    f"pareto-{before + len(charts) + 1}",
                    f"{column.title} by bits a weight, {model}",
                    f"{len(points)} recipes; less is better in both directions. On the line, where no other "
                    f"recipe has fewer bits and a lower perplexity: {names}.",
                    "bits a weight",
                    column.title,
                    (
                        Series("recipe", points),
                        Series("best for its bits", tuple(replace(p, label="") for p in best), line=True),
                    ),
                )
            )
    return charts


def _primary(cell: Cell) -> str:
    return next((name for name in _PRIMARY if name in cell.metrics), next(iter(cell.metrics)))


def _ratio(value: float, base: float, metric: str) -> float | None:
    if lower_is_better(metric):
        value, base = base, value
    return None if base == 0 else value / base


def _written(value: float | None, metric: str) -> str:
    if value is None:
        return ""
    if metric in _SHARES:
        return f"{100 * value:.2f}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"
