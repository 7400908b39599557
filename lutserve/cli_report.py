"""`lutserve report`: a folder of results as a page, Markdown or CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lutserve.errors import UserError


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder with cells.jsonl of `lutserve eval` and JSON records.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. Default: report.html, .md or .csv.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="html, md or csv. Default: as the file's name ends, or html."),
    ] = None,
) -> None:
    """Write all results in a folder as one page, Markdown or CSV: tables, charts, recipes, provenance."""
    from lutserve.report.render import FORMATS, collect, write

    if form is None:
        form = output.suffix.removeprefix(".") if output else "html"
    if form not in FORMATS:
        given = (
            f"--output {output}" if output and form == output.suffix.removeprefix(".") else f"--format {form}"
        )
        raise UserError(f"{given}; allowed formats: {', '.join(FORMATS)}")
    target = output or Path(f"report.{form}")
    write(collect(folder), form, target)
    print(f"written to {target}")
