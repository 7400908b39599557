"""`lutserve profile`: look at a model's numbers before choosing tables and formats for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lutserve.errors import UserError

app = typer.Typer(help="Look at a model's numbers before choosing its arithmetic.", no_args_is_help=True)


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
    from lutserve.profile import source

    text = source.read_text(data)
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
    source.write(report, output)
    _show(report, layers)
    print(f"written to {output}", file=sys.stderr)


@app.command()
def distributions(
    model: Annotated[str, typer.Argument(help="Alias (`lutserve models`), folder or hub id.")],
    data: Annotated[
        str,
        typer.Option(
            help="Text file, `wikitext` (in LUTSERVE_DATA), the folder that has it, or `random` tokens, as "
            "in the published profiles."
        ),
    ] = "wikitext",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text to run.")] = 4,
    window: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 2048,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    blocks: Annotated[
        str | None, typer.Option(help="Decoder blocks, comma separated, e.g. 0,15,29. Default: all.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1000, help="Numbers drawn from every tensor.")] = 100_000,
    plot: Annotated[
        Path | None, typer.Option(help="Folder for a picture of every fit: histogram and Q-Q plot.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file.")] = Path(
        "out/distributions.json"
    ),
    layers: Annotated[bool, typer.Option(help="Print every layer, not only the kinds of layers.")] = False,
) -> None:
    """Fit Student's t and the normal distribution to the weights and inputs of all linear layers.

    nu below ten means heavy tails, which sf4_5 and its like fit better than nf4. KS-Delta is how much closer
    the t is to the numbers than the normal distribution (Kolmogorov-Smirnov), negative where it is not.
    """
    from rich.console import Console
    from rich.progress import Progress

    from lutserve import machine, models
    from lutserve.profile import distributions as tool
    from lutserve.profile import source

    text = None if data == "random" else source.read_text(data)
    numbers = None if blocks is None else _numbers("--blocks", blocks)
    gallery = None
    if plot:
        from lutserve.profile.plot import Gallery

        gallery = Gallery(plot)
    path = models.resolve(model, progress=lambda line: print(line, file=sys.stderr))
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("windows and layers", total=None)
        report = tool.profile(
            path,
            text,
            window=window,
            windows=windows,
            dtype=dtype,
            blocks=numbers,
            sample=sample,
            done=lambda done, total: progress.update(bar, completed=done, total=total),
            show=gallery.show if gallery else lambda row, numbers: None,
        )
    report |= {"model": model, "data": data, "made_with": machine.collect()}
    source.write(report, output)
    _show_fits(report, layers)
    print(f"written to {output}", file=sys.stderr)


@app.command()
def timing(
    model: Annotated[str, typer.Argument(help="Alias (`lutserve models`), folder or hub id.")],
    methods: Annotated[
        str, typer.Option(help="Methods as `--method` has them, comma separated.")
    ] = "none,int8,mix8,mix4,int4,nf4,sf4_5,axcore",
    tokens: Annotated[
        str,
        typer.Option(help="Numbers of tokens at once, comma separated: sequences, or a prompt's."),
    ] = "1,8,64,512",
    group_size: Annotated[
        int | None,
        typer.Option(help="Input columns that share a scale, -1: all. Default: the method's own."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Rounds; in each every method has its turn.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: all cores.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file.")] = Path("out/timing.json"),
) -> None:
    """Time every shape of a model's linear layers by every method on this machine; needs no weights.

    The file is what `lutserve search --timing FILE --budget ms:decode_b1=X` reads.
    """
    from rich.console import Console
    from rich.progress import Progress

    from lutserve.cli_search import config_of
    from lutserve.profile import source
    from lutserve.recipe import parse

    chosen: list[dict[str, Any]] = [{"method": name.strip()} for name in methods.split(",")]
    chosen = [group | ({} if group_size is None else {"group_size": group_size}) for group in chosen]
    for group in chosen:
        # What is no method is refused before vLLM is imported.
        parse({"quant_method": "lutserve", "config_groups": {"all": {"targets": ["Linear"], **group}}})
    counts = _numbers("--tokens", tokens, least=1)
    config = config_of(model)

    import torch

    from lutserve import timing as tool

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("shapes", total=None)
        report = tool.profile(
            config,
            chosen,
            counts,
            repeats=repeats,
            done=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    source.write({"model": model} | report, output)
    _show_times(report)
    print(f"written to {output}", file=sys.stderr)


def _show_times(report: dict[str, Any]) -> None:
    from rich.table import Table

    from lutserve.console import for_tables

    table = Table(box=None, header_style="bold", caption="microseconds, median (range)")
    tokens = sorted({row["m"] for row in report["rows"]})
    for heading in ("layer", "outputs", "inputs", "method"):
        table.add_column(heading)
    for m in tokens:
        table.add_column(f"{m} tokens", justify="right", no_wrap=True)
    shown: dict[tuple[str, ...], list[str]] = {}
    for row in report["rows"]:
        key = row["layer"], str(row["n"]), str(row["k"]), row["method"]
        shown.setdefault(key, []).append(f"{row['us']:.0f} ({row['us_min']:.0f}-{row['us_max']:.0f})")
    for names, cells in shown.items():
        table.add_row(*names, *cells)
    for_tables().print(table)


def _numbers(option: str, text: str, least: int = 0) -> list[int]:
    """The numbers of an option."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise UserError(f"{option} {text}; allowed: numbers from {least} up, comma separated")
    return found


def _show_fits(report: dict[str, Any], layers: bool) -> None:
    from rich.table import Table

    from lutserve.console import for_tables

    table = Table(box=None, header_style="bold")
    table.add_column("kind")
    table.add_column("layer")
    for heading in ("fits", "nu, mean (spread)", "median", "KS-Delta", "t better"):
        table.add_column(heading, no_wrap=True, justify="right")
    for row in report["summary"]:
        numbers: tuple[str, ...] = ("-",) * 4
        if row["fits"]:
            mean = f"{row['nu_mean']:.2f} ({row['nu_spread']:.2f})"
            shares = f"{row['ks_delta_mean']:+.4f}", f"{row['t_better']:.0%}"
            numbers = (mean, f"{row['nu_median']:.2f}", *shares)
        table.add_row(row["kind"], row["type"], f"{row['fits']}/{row['layers']}", *numbers)
    console = for_tables()
    console.print(table)
    if not layers:
        return
    table = Table(box=None, header_style="bold")
    table.add_column("kind")
    table.add_column("layer")
    for heading in ("nu", "loc", "scale", "mean", "sigma", "KS t", "KS normal", "KS-Delta", "zeros"):
        table.add_column(heading, no_wrap=True, justify="right")
    keys = ("nu", "loc", "scale", "mu", "sigma", "ks_t", "ks_normal", "ks_delta")
    for row in report["rows"]:
        fit = row["fit"]
        known = fit is not None and not fit["point_mass"]
        shown = [f"{fit[key]:.4g}" for key in keys] if known else ["-"] * len(keys)
        table.add_row(row["kind"], row["layers"][0], *shown, f"{row['zeros']:.1%}")
    console.print(table)


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
