"""`lutserve profile`: look at a model's numbers before choosing tables for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Look at a model's numbers before choosing tables for it.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `ranges` a command of its own while it is the only one."""


@app.command()
def ranges(
    model: Annotated[str, typer.Argument(help="Alias (`lutserve models`), folder or hub id.")],
    data: Annotated[
        str, typer.Option(help="Text file, `wikitext` (in LUTSERVE_DATA), or the folder that has it.")
    ] = "wikitext",
    windows: Annotated[int, typer.Option(min=0, help="Windows of text to run; 0 for all.")] = 4,
    window: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 2048,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file.")] = Path("out/ranges.json"),
    layers: Annotated[bool, typer.Option(help="Print every module, not only a line a site.")] = False,
) -> None:
    """Print and store minimum, maximum and quantiles of the input of every nonlinear site and layer."""
    from rich.console import Console
    from rich.progress import Progress

    from lutserve import models
    from lutserve.profile import ranges as tool

    text = tool.read_text(data)
    path = models.resolve(model, progress=lambda line: print(line, file=sys.stderr))
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("windows", total=None)
        report = tool.profile(
            path,
            text,
            window=window,
            windows=windows or None,
            dtype=dtype,
            done=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    report |= {"model": model, "data": data}
    tool.write(report, output)
    _show(report, layers)
    print(f"written to {output}", file=sys.stderr)


def _show(report: dict[str, Any], layers: bool) -> None:
    from rich.table import Table

    from lutserve.console import for_tables
    from lutserve.profile.histogram import QUANTILES

    console = for_tables()
    table = Table(box=None, header_style="bold")
    columns = ("min", *(f"{100 * share:g} %" for share in QUANTILES), "max")
    for heading in ("site", *(["module"] if layers else [])):
        table.add_column(heading)
    for heading in columns:
        table.add_column(heading, no_wrap=True, justify="right")
    rows = [{"site": site, "module": "all"} | row for site, row in report["summary"].items()]
    for row in [*rows, *(report["sites"] if layers else [])]:
        if row["count"]:
            names = (row["site"], *([row["module"]] if layers else []))
            numbers = (row["min"], *row["quantiles"].values(), row["max"])
            table.add_row(*names, *(f"{number:.4g}" for number in numbers))
    console.print(table)
