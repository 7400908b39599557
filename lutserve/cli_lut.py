"""The `lutserve lut` commands: make, list, inspect and draw look-up tables of nonlinear functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lutserve import __version__
from lutserve.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    name="lut",
    help="Look-up tables of nonlinear functions: make, list, inspect, draw.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

FunctionArgument = Annotated[str, typer.Argument(help="Function, e.g. silu (`lutserve lut list`).")]
AnyFunction = Annotated[
    str, typer.Argument(metavar="FUNC", help="Function, or module:function for any float -> float in Python.")
]
SpecArgument = Annotated[str, typer.Argument(help="Table, e.g. nli-4, nnlut:16, nnlut:FILE+clamp.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float16 or bfloat16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Function whose place the table may take; default: FUNC.")
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]
RangeOption = Annotated[str | None, typer.Option("--range", help="LOW:HIGH, e.g. -80:90.")]


@app.command(name="list")
def list_tables(
    dtype: DtypeOption = "float16",
    errors: Annotated[
        bool, typer.Option("--errors", help="Errors of every table instead of the table of ids.")
    ] = False,
    span: Annotated[
        str | None, typer.Option("--range", help="LOW:HIGH, where errors are counted if the table is for it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the functions and the tables that need no file, with their ids."""
    from lutserve.luts import report
    from lutserve.luts.resolve import span_of

    fmt = report.format_named(dtype)
    within = span_of(span) if span else None
    rows = [
        report.describe(function, spec, fmt, [report.domain(function, within)])
        for function, spec in report.tables()
    ]
    if as_json:
        print(json.dumps([_brief(row, errors) for row in rows], indent=1))
    elif errors:
        _show_errors(
            ("function", "table", "id"),
            [((row["function"], row["spec"], row["id"]), row["whole"]) for row in rows],
        )
    else:
        ids = {(row["function"], row["spec"]): row["id"] for row in rows}
        columns = list(dict.fromkeys(row["spec"] for row in rows))
        table = _table(("function", *columns))
        for function in dict.fromkeys(row["function"] for row in rows):
            table.add_row(function, *(ids.get((function, spec), "-") for spec in columns))
        _print(table)


@app.command()
def show(
    function: FunctionArgument,
    spec: SpecArgument,
    dtype: DtypeOption = "float16",
    span: RangeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a table's id and its errors against the exact function, a region a line."""
    from lutserve.luts import report
    from lutserve.luts.resolve import span_of

    spans = [span_of(span)] if span else None
    facts = report.describe(function, spec, report.format_named(dtype), spans)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    print(f"{function} {spec} {dtype}: id {facts['id']}")
    _show_errors(("region",), [((f"{row['low']:g} .. {row['high']:g}",), row) for row in facts["regions"]])


@app.command()
def plot(
    function: FunctionArgument,
    spec: SpecArgument,
    output: OutputOption,
    dtype: DtypeOption = "float16",
    span: RangeOption = None,
) -> None:
    """Draw function, table and error into a png or svg file."""
    from lutserve.luts import plot as picture
    from lutserve.luts import report
    from lutserve.luts.resolve import span_of

    fmt = report.format_named(dtype)
    report.describe(function, spec, fmt)  # the errors of bad arguments come first
    shown = span_of(span) if span else report.domain(function, picture.WINDOW)
    picture.plot(function, spec, fmt, shown, output)
    print(f"written to {output}")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Table file, NLI or NN-LUT.")],
    digest: Annotated[
        str | None, typer.Option("--digest", help="Hexadecimal digits the table's digest must begin with.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether a table file is valid, what it is, and whether it is the one that was meant."""
    from lutserve.luts import report

    facts = report.examine(file, digest)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    size = f"{facts['points']} points" if facts["kind"] == "nli" else f"{facts['hidden']} hidden units"
    print(f"{file}: {facts['kind']} of {facts['function']}, {size}, range {facts['range'] or 'unknown'}")
    print(f"serves: {', '.join(facts['serves']) or 'no function of ours'}")
    for fmt, value in facts["digest"].items():
        print(f"digest in {fmt}: {value}")
    if facts["serves"]:
        whole = facts["whole"]
        print(
            f"error in float16: max {whole['max_abs']:.3g} at {whole['at']:g}, mean {whole['mean_abs']:.3g}"
        )


@app.command()
def build(
    func: AnyFunction,
    output: OutputOption,
    kind: Annotated[str, typer.Option(help="Form of the table: nli.")] = "nli",
    points: Annotated[int, typer.Option(help="Pieces of each inner segment: a power of two to 64.")] = 4,
    span: RangeOption = None,
    pin: Annotated[
        str, typer.Option(help="Ends of the range that must be cut points: none, left, right, both.")
    ] = "none",
    scales: Annotated[
        str, typer.Option(help="float16 as published, or float32 for segments too narrow or wide for it.")
    ] = "float16",
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search the cut points of an NLI table and write the table. Without --range: all of fp16."""
    from rich.console import Console

    from lutserve.luts import files, search
    from lutserve.luts.functions import FUNCTIONS
    from lutserve.luts.resolve import resolve, span_of

    if kind != "nli":
        raise UserError(f"unknown kind {kind!r}; allowed: nli (`lutserve lut fit` makes an nnlut)")
    function = resolve(func)
    low, high = span_of(span or "-65504:65504")
    with Console(stderr=True).status("searching") as status:
        table, loss = search.build(
            function,
            name or func,
            low,
            high,
            points,
            pin=pin,
            scales=scales,
            progress=lambda text: status.update(f"searching: {text}"),
        )
    made_by = {"lutserve": __version__, "command": "build", "range": [low, high], "pin": pin, "loss": loss}
    files.save(output, table, made_by)
    known = search.loss_of(function, FUNCTIONS[func].cuts, low, high, points) if func in FUNCTIONS else None
    if as_json:
        cuts = table.cuts.tolist()
        print(json.dumps({"function": func, "points": points, **made_by, "known_loss": known, "cuts": cuts}))
        return
    print(f"cut points: {', '.join(f'{c:.6g}' for c in table.cuts.tolist())}")
    print(f"loss: {loss:.4g} (mean relative error)")
    if known is not None:
        print(f"loss of the cut points of {func} that come with lutserve: {known:.4g}")
    print(f"written to {output}")


@app.command()
def fit(
    func: AnyFunction,
    span: Annotated[str, typer.Option("--range", help="LOW:HIGH, e.g. -80:90.")],
    output: OutputOption,
    hidden: Annotated[int, typer.Option(help="Hidden units: the table has that many cut points.")] = 16,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds to try; the best table is kept.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Training steps a seed.")] = 300,
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train an NN-LUT and write the table."""
    from rich.console import Console
    from rich.progress import Progress

    from lutserve.luts import files
    from lutserve.luts.fit import fit as train
    from lutserve.luts.resolve import resolve, span_of

    function, (low, high) = resolve(func), span_of(span)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=1.0)
        table, error = train(
            function,
            name or func,
            low,
            high,
            hidden,
            seed=seed,
            seeds=seeds,
            steps=steps,
            progress=lambda part, text: bar.update(task, advance=part, description=f"training {text}"),
        )
    made_by = {"lutserve": __version__, "command": "fit", "seed": seed, "seeds": seeds, "steps": steps}
    files.save(output, table, made_by | {"rms_error": error})
    if as_json:
        print(json.dumps({"function": func, "hidden": hidden, "range": [low, high], "rms_error": error}))
        return
    print(f"rms error over {low:g} .. {high:g}: {error:.3g}")
    print(f"written to {output}")


_WIDTH = 160
_ERROR_COLUMNS = ("max_abs", "at", "mean_abs", "max_relative", "mean_relative", "max_ulp", "mean_ulp")


def _brief(row: dict[str, Any], errors: bool) -> dict[str, Any]:
    return {key: row[key] for key in ("function", "spec", "dtype", "id", *(["whole"] if errors else []))}


def _show_errors(headings: tuple[str, ...], rows: list[tuple[tuple[str, ...], dict[str, Any]]]) -> None:
    table = _table((*headings, "values", *(c.replace("_", " ") for c in _ERROR_COLUMNS), "no number"))
    for first, errors in rows:
        numbers = ("-" if errors[c] is None else f"{errors[c]:.3g}" for c in _ERROR_COLUMNS)
        table.add_row(*first, str(errors["count"]), *numbers, str(errors["missing"]))
    _print(table)


def _table(headings: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _print(table: Table) -> None:
    """Every number stays whole: a narrow terminal breaks the lines."""
    from rich.console import Console

    Console(width=max(Console().width, _WIDTH), soft_wrap=True).print(table)
