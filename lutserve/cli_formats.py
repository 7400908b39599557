"""`lutserve formats`: the weight formats, their values, and how well they fit three distributions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from lutserve.formats import Codebook

Row = dict[str, Any]


def show(
    name: Annotated[
        str | None,
        typer.Argument(help="Format: a listed name, the paper's name, sf4_<v>, or a .json file with values."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    group_size: Annotated[
        int, typer.Option(min=1, max=256, help="Weights that share a scale, in the errors shown.")
    ] = 128,
) -> None:
    """Print the weight formats: values, codes, divisor, and the error on normal and heavy-tailed data."""
    import torch

    from lutserve import formats
    from lutserve.console import for_tables

    # Many small operations: more threads would only wait for each other.
    torch.set_num_threads(1)
    console = for_tables()
    if name is None:
        rows = [_row(formats.get(known), group_size) for known in formats.NAMES]
        if as_json:
            print(json.dumps(rows, indent=2))
        else:
            console.print(_overview(rows))
        return
    row = _row(formats.get(name), group_size)
    if as_json:
        print(json.dumps(row, indent=2))
    else:
        _print_one(console.print, row)


def _row(codebook: Codebook, group_size: int) -> Row:
    """All that there is to say about a format, as JSON."""
    from lutserve.quantizers.quality import DISTRIBUTIONS, sqnr_on

    errors = {data: round(sqnr_on(data, codebook, group_size), 4) for data in DISTRIBUTIONS}
    return codebook.to_json() | {"group_size": group_size, "sqnr_db": errors}


def _int8(row: Row) -> str:
    """How the format looks in an int8 GEMM."""
    if row["int8"] is None:
        return "-"
    return "exact" if row["int8"]["exact"] else "rounded"


def _overview(rows: list[Row]) -> Table:
    from rich.table import Table

    size = rows[0]["group_size"]
    table = Table(box=None, header_style="bold", caption=f"SQNR in dB, round to nearest, groups of {size}")
    table.add_column("format", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    for heading in ("bits", "values", "divisor", "int8", *rows[0]["sqnr_db"]):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        errors = [f"{error:.2f}" for error in row["sqnr_db"].values()]
        facts = [str(row["bits"]), str(len(row["values"])), f"{row['divisor']:g}", _int8(row)]
        table.add_row(row["name"], row["paper_name"], *facts, *errors)
    return table


def _print_one(say: Any, row: Row) -> None:
    from rich.table import Table

    from lutserve.formats import TABLE

    paper = f" ({row['paper_name']})" if row["paper_name"] else ""
    say(f"[bold]{row['name']}[/]{paper}: {row['source']}")
    say(f"{row['bits']} bits, {len(row['values'])} values, divisor {row['divisor']:g}", end="")
    say(f" (GPTQ {row['gptq_divisor']:g}), zero is code {row['zero']}")
    errors = ", ".join(f"{data} {error:.2f}" for data, error in row["sqnr_db"].items())
    say(f"SQNR in dB, groups of {row['group_size']}: {errors}")
    if row["int8"]:
        say(f"int8 table {_int8(row)}, times {row['int8']['scale']:.9g}")
    if len(row["values"]) > TABLE:
        say(f"values: the integers {row['values'][0]:g} to {row['values'][-1]:g}")
        return
    table = Table(box=None, header_style="bold")
    for heading in ("code", "value", "scaled", "up to", "int8"):
        table.add_column(heading, justify="right")
    ends = [f"{m:.9g}" for m in row["midpoints"]] + ["inf"]
    for code, (value, end) in enumerate(zip(row["values"], ends, strict=True)):
        scaled = f"{value / row['divisor']:.6f}"
        table.add_row(str(code), f"{value:.9g}", scaled, end, str(row["int8"]["values"][code]))
    say(table)
