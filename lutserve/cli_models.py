"""`lutserve models`: the aliases, and what a model is made of and would occupy."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="List the model aliases, their sizes and which are on this machine; `show NAME`: one in detail."
)


@app.callback(invoke_without_command=True)
def list_models(context: typer.Context) -> None:
    """List the model aliases, their sizes and which are on this machine; `show NAME`: one in detail."""
    if context.invoked_subcommand:
        return
    from rich.table import Table

    from lutserve.console import for_tables
    from lutserve.models import rows

    table = Table(box=None, header_style="bold")
    for heading in ("alias", "hub id", "parameters", "16-bit size", "present", "note"):
        table.add_column(heading, no_wrap=heading != "note")
    for row in rows():
        size = f"{row.gigabytes:.1f} GB"
        table.add_row(row.alias, row.hub_id, f"{row.parameters:g} B", size, row.present, row.note)
    for_tables().print(table)


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="Alias (`lutserve models`), folder or hub id.")],
    group_size: Annotated[
        int | None,
        typer.Option(help="Input columns that share a scale, -1: all. Default: the method's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Print a model's dimensions, its parameters and what each method would make of it; needs no weights."""
    from lutserve.cli_search import config_of
    from lutserve.search.occupancy import describe

    found = describe(config_of(model), group_size=group_size)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    from lutserve.console import for_tables
    from lutserve.search.occupancy import FORMAT

    console, arch = for_tables(), found["architecture"]
    keys = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "positions")
    console.print(
        f"[bold]{arch['family']}[/]: " + ", ".join(f"{key} {arch[key]:,}" for key in keys if arch[key])
    )
    counts = ", ".join(f"{name} {count:,}" for name, count in found["parameters"].items() if count)
    console.print(f"parameters: {counts}{', output layer tied to the embedding' if arch['tie'] else ''}")
    console.print(f"KV cache: {found['kv_bytes_per_token']:,} bytes a token in 16 bit")
    table = Table(box=None, header_style="bold", title="a block's linear layers", title_justify="left")
    for heading in ("layer", "outputs", "inputs", "weights"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for site in arch["sites"]:
        weights = f"{site['out'] * site['columns']:,}"
        table.add_row(site["name"], f"{site['out']:,}", f"{site['columns']:,}", weights)
    console.print(table)
    table = Table(box=None, header_style="bold", title="under each method", title_justify="left")
    for heading in ("method", "bits a weight", "linear layers", "model"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in found["methods"]:
        name = f"{FORMAT}, every 4-bit format" if row["method"] == FORMAT else row["method"]
        bytes_of = (f"{row[key] / 1e6:,.1f} MB" for key in ("linear_bytes", "model_bytes"))
        table.add_row(name, f"{row['bits_per_weight']:.3f}", *bytes_of)
    console.print(table)
