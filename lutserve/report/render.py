"""Writing a report: one page that needs nothing else, Markdown, or the matrix as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lutserve import __version__
from lutserve.errors import UserError
from lutserve.report import charts, layers, matrix, recipes, records, search, speed
from lutserve.report.folder import Folder, Origin
from lutserve.report.matrix import Matrix
from lutserve.report.recipes import Shown
from lutserve.report.values import Section, Table, Value


@dataclass(frozen=True)
class Report:
    """Everything that a folder says."""

    folder: Folder
    matrices: list[Matrix]
    sections: list[Section]
    recipes: list[Shown]

    @property
    def origins(self) -> list[Origin]:
        """The records that something shown comes from."""
        used = {recipe.origin for recipe in self.recipes}
        for section in self.sections:
            used |= {value.origin for table in section.tables for row in table.rows for value in row}
            used |= {p.origin for chart in section.charts for series in chart.series for p in series.points}
        return [origin for origin in self.folder.origins if origin.id in used]

    @property
    def unused(self) -> list[str]:
        """The files that nothing shown comes from, but for those that belong to a cell."""
        known = {Path(cell.results) for cell in self.folder.cells if cell.results}
        used = {origin.id for origin in self.origins}
        return [r.name for r in self.folder.records if r.origin not in used and r.path.resolve() not in known]


def collect(path: Path) -> Report:
    """Read a folder; UserError if it cannot be read or has nothing to show."""
    folder = Folder.read(path)
    folder.cells += records.perplexities(folder)
    matrices = matrix.matrices(folder)
    fast = records.section(folder)
    fast = replace(fast, charts=speed.charts(folder, matrices))
    sections = [matrix.section(matrices), fast, layers.section(folder), search.section(folder)]
    shown = recipes.collect(folder)
    if not any(sections) and not shown:
        raise UserError(f"{path} has JSON files, but none that lutserve wrote")
    return Report(folder, matrices, [section for section in sections if section], shown)


def write(report: Report, form: str, output: Path) -> None:
    """Write a report in one of FORMATS into a file, which is complete or as it was.

    Raises:
        UserError: the file cannot be written, or CSV is asked for where there are no accuracies.

    """
    text = FORMATS[form](report)
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None


def html(report: Report) -> str:
    """One page: styles, script and drawings are in it, and it asks no network for anything."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lutserve.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page: Any = environment.get_template("page.html")
    text: str = page.render(
        report=report,
        name=report.folder.path.resolve().name,
        version=__version__,
        made=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        levels={name: legend for name, (_, legend) in matrix.LEVELS.items()},
        sheet=charts,
    )
    return text


def markdown(report: Report) -> str:
    """Every table under its heading."""
    parts = [f"# {report.folder.path.resolve().name}"]
    for section in report.sections:
        parts.append(f"## {section.title}")
        for table in section.tables:
            parts += [f"### {table.title}", *([table.note] if table.note else []), _markdown_table(table)]
    for shown in report.recipes:
        parts += [f"## Recipe {shown.title}", _markdown_table(shown.table), f"```json\n{shown.text}\n```"]
    return "\n\n".join(parts) + "\n"


def flat(report: Report) -> str:
    """The matrices as CSV: a row a preset, model and recipe, another for published values if there are any.

    Columns are tasks and metrics, in the units of lm-eval.
    """
    if not report.matrices:
        raise UserError(f"{report.folder.path} has no accuracies, which is what csv is for; take md or html")
    columns = list(dict.fromkeys(column for found in report.matrices for column in found.columns))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"{column.task}_{column.metric}" for column in columns]
    writer.writerow(["preset", "model", "recipe", "source", "bits", *names, "mean_acc"])
    for found in report.matrices:
        for row in found.rows:
            values = [found.value(row, column) for column in columns]
            head = [found.name, *row]
            writer.writerow([*head, "measured", found.bits(row), *values, found.mean_accuracy(row)])
            cells = {cell.task: cell for cell in found.of(row)}
            published = [cells[c.task].published.get(c.metric) if c.task in cells else None for c in columns]
            if any(value is not None for value in published):
                writer.writerow([*head, "published", None, *published, None])
    return text.getvalue()


def _markdown_table(table: Table) -> str:
    rule = ["---" if index < table.headers else "---:" for index in range(len(table.columns))]
    return "\n".join(
        "| " + " | ".join(cells) + " |"
        for cells in (map(_safe, table.columns), rule, *(map(_plain, row) for row in table.rows))
    )


def _plain(value: Value) -> str:
    return _safe(f"{value.text} ({', '.join(value.notes)})" if value.notes else value.text)


def _safe(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


#: name -> what writes it
FORMATS: dict[str, Callable[[Report], str]] = {"html": html, "md": markdown, "csv": flat}
