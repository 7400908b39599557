"""`lutserve flops` counts what a model costs, `lutserve search` chooses a method for every layer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lutserve.errors import UserError

if TYPE_CHECKING:
    from lutserve.search.run import Result


def flops(
    model: Annotated[str, typer.Argument(help="Alias (`lutserve models`), folder or hub id.")],
    recipe: Annotated[Path | None, typer.Option(help="Recipe file (JSON). Default: the model's own.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Length of the prompt. Default: 2048.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Keys that a decoded token attends to.")] = 1024,
    accounting: Annotated[
        str, typer.Option(help="exact, or seed: as the published mixed-precision tables count, 1024 tokens.")
    ] = "exact",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Count MACs, FLOPs, BOPs, bytes and table look-ups of a model; needs its config.json only."""
    from lutserve import recipe as recipes
    from lutserve.search import cost, seed

    config = config_of(model)
    chosen = recipes.load(recipe) if recipe else recipes.from_model(config)
    if accounting == "exact":
        counts: dict[str, Any] = cost.account(config, chosen, tokens or 2048, context)
    elif accounting == "seed":
        counts = seed.account(config, chosen, tokens or 1024)
    else:
        raise UserError(f"--accounting {accounting}; allowed: exact, seed")
    if as_json:
        print(json.dumps(counts, indent=1))
    else:
        _show(counts)


def search(
    model: Annotated[str, typer.Argument(help="Alias (`lutserve models`), folder or hub id.")],
    budget: Annotated[
        list[str],
        typer.Option(
            help="bits=X (mean of the linear layers), bytes=X (model), bops=X (a token), ms:decode_bN=X or "
            "ms:prefill_N=X (all linear layers, with --timing), entries=X (all tables); repeatable."
        ),
    ],
    candidates: Annotated[
        str,
        typer.Option(
            help="What a layer may become: none, int8, llm-int8, mix8, mix4, axcore, axcore-plus and 4-bit "
            "formats, also with +a8 or +a4; a group size may follow, int4@32. Comma separated."
        ),
    ] = "int4,nf4,sf4_5,int8,none",
    group_size: Annotated[int, typer.Option(help="Input columns that share a scale, -1: all.")] = 128,
    sensitivity: Annotated[
        str, typer.Option(help="How damage is predicted: fisher, kl, linear, block or seed-mpl.")
    ] = "fisher",
    granularity: Annotated[str, typer.Option(help="What is chosen as one: site or block.")] = "site",
    data: Annotated[
        str,
        typer.Option(help="Text: a file (.txt, .jsonl, also .gz), c4, wikitext2, pile, pydoc or a data set."),
    ] = "c4",
    samples: Annotated[int, typer.Option(help="Windows of text for the scores.")] = 8,
    held_out: Annotated[int, typer.Option(help="Further windows, for the verification.")] = 4,
    length: Annotated[int, typer.Option("--sequence-length", help="Tokens in a window.")] = 512,
    randoms: Annotated[int, typer.Option("--random", help="Random recipes to compare with.")] = 8,
    tensor_parallel: Annotated[int, typer.Option("--tp", help="Devices that the recipe must fit.")] = 1,
    sweep: Annotated[
        str | None, typer.Option(help="LOW:HIGH:COUNT, more values of the first budget, for a Pareto front.")
    ] = None,
    tables: Annotated[
        str | None, typer.Option("--luts", help="Tables that a nonlinear site may read, e.g. nli-2,nli-4.")
    ] = None,
    lut_sites: Annotated[
        str, typer.Option(help="Sites to choose them for: silu, gelu, softmax_exp, rsqrt.")
    ] = "",
    timing: Annotated[
        Path | None, typer.Option(help="Measured times (JSON, docs/search.md), for budgets in ms.")
    ] = None,
    max_patterns: Annotated[
        int | None, typer.Option(help="Kinds of decoder blocks at most, to keep compilation short.")
    ] = None,
    refine: Annotated[
        str, typer.Option(help="Measure changed recipes afterwards: none, swap or evo.")
    ] = "none",
    rounds: Annotated[int, typer.Option(help="Rounds of --refine.")] = 8,
    plot: Annotated[Path | None, typer.Option(help="Draw the rows into a .png or .svg file.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write.")] = Path("recipe.json"),
) -> None:
    """Choose a method for every layer within budgets, verify the choice, and write a recipe.

    Beside the recipe FILE.json goes FILE.report.json, with all scores and measurements.
    """
    from rich.console import Console
    from rich.progress import Progress

    from lutserve import models
    from lutserve.quantizers.download import folder_of
    from lutserve.search.allocate import parse_budgets
    from lutserve.search.candidates import parse, parse_tables
    from lutserve.search.run import Settings, search
    from lutserve.search.timing import Timing

    settings = Settings(
        candidates=parse(candidates, group_size),
        budgets=parse_budgets(budget),
        sensitivity=sensitivity,
        granularity=granularity,
        samples=samples,
        held_out=held_out,
        length=length,
        randoms=randoms,
        tensor_parallel=tensor_parallel,
        sweep=_sweep(sweep),
        tables=parse_tables(tables) if tables is not None else (),
        lut_sites=[site.strip() for site in lut_sites.split(",") if site.strip()],
        timing=Timing(timing) if timing else None,
        max_patterns=max_patterns,
        refine=refine,
        rounds=rounds,
    )
    console = Console(stderr=True, highlight=False)
    folder = folder_of(models.resolve(model, console.print), console.print)
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=1.0)
        result = search(
            folder,
            settings,
            data,
            watch=lambda what, share: progress.update(bar, completed=share, description=what),
        )
    report = output.with_suffix(".report.json")
    _write(output, result.recipe.to_config())
    _write(report, {"model": model, "data": data} | result.report())
    _table(result)
    if plot:
        from lutserve.search.plot import draw

        draw(result, plot)
    print(f"written to {output} and {report}", file=sys.stderr)


def _sweep(text: str | None) -> list[float]:
    """The budgets of LOW:HIGH:COUNT."""
    if text is None:
        return []
    try:
        low, high, count = (float(part) for part in text.split(":"))
        steps = int(count) - 1
        if steps < 1 or not 0 < low < high:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--sweep {text}; allowed: LOW:HIGH:COUNT, e.g. 4.25:8:6, with COUNT 2 or more"
        ) from None
    return [low + (high - low) * step / steps for step in range(steps + 1)]


def _write(file: Path, value: dict[str, Any]) -> None:
    """Write JSON; the file is complete or as it was."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(json.dumps(value, indent=1) + "\n")
        partial.replace(file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None


def _table(result: Result) -> None:
    from rich.table import Table

    from lutserve.console import for_tables

    table = Table(box=None, header_style="bold")
    table.add_column("recipe", no_wrap=True)
    entries = any(row.entries for row in result.rows)
    extra = [*(["entries"] if entries else []), *result.rows[0].ms]
    for heading in ("bits", "bytes", "BOPs a token", *extra, "predicted KL", "held-out KL", "perplexity"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in [*result.rows, *result.sweep]:
        sizes = [f"{row.bits:.4f}", f"{row.bytes:,.0f}", f"{row.bops:.4g}"]
        sizes += [f"{row.entries:,}"] if entries else []
        sizes += [f"{ms:.3f}" for ms in row.ms.values()]
        table.add_row(row.name, *sizes, f"{row.predicted:.5f}", f"{row.kl:.5f}", f"{row.perplexity:.4f}")
    for_tables().print(table)
    agreement = result.facts["agreement"]
    shown = {name: "undefined" if value is None else f"{value:.3f}" for name, value in agreement.items()}
    print(
        f"predicted against measured: Kendall's tau {shown['tau']}, ratio {shown['measured_over_predicted']}"
    )


def config_of(model: str) -> dict[str, Any]:
    """The `config.json` of a model, without its weights."""
    from lutserve import models
    from lutserve.recipe import read_json

    resolved = models.resolve(model, progress=lambda line: print(line, file=sys.stderr))
    if Path(resolved).is_dir():
        return read_json(Path(resolved) / "config.json")
    from huggingface_hub import hf_hub_download

    try:
        return read_json(Path(hf_hub_download(resolved, "config.json")))
    except Exception as error:  # whatever the hub's client raises offline, for gated and for unknown models
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot get config.json of {resolved}: {reason}") from None


def _show(counts: dict[str, Any], prefix: str = "") -> None:
    """A line for each number, with its path."""
    for key, value in counts.items():
        if isinstance(value, dict):
            _show(value, f"{prefix}{key}.")
        else:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:,.6f}"
            print(f"{prefix}{key}: {value if isinstance(value, bool) else shown}")
