"""The `lutserve` command: a hall with doors. Every command's work is done in the module it imports.

Imports of torch and vLLM happen behind the doors, so that `lutserve --help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lutserve import (
    __version__,
    cli_eval,
    cli_formats,
    cli_lut,
    cli_models,
    cli_outliers,
    cli_profile,
    cli_quantize,
    cli_report,
    cli_search,
    env,
)
from lutserve.cli_group import with_default
from lutserve.errors import UserError
from lutserve.methods import FORMATS, METHODS
from lutserve.torchvision_guard import hide_broken_torchvision

# At import, not in main(): the processes that vLLM spawns import this module again and nothing else of
# ours before they import transformers, which trips over a torchvision that does not fit torch.
hide_broken_torchvision()

app = typer.Typer(
    name="lutserve",
    help="Serve LLMs with approximate arithmetic inside vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


bench = typer.Typer(cls=with_default("serve"), help="Measure throughput of several servers, interleaved.")

app.add_typer(bench, name="bench")
app.add_typer(cli_profile.app, name="profile")
app.add_typer(cli_lut.app, name="lut")
app.add_typer(cli_eval.app, name="eval")
app.add_typer(cli_formats.app, name="formats")
app.add_typer(cli_models.app, name="models")
app.command(name="quantize")(cli_quantize.quantize)
app.command(name="flops")(cli_search.flops)
app.command(name="search")(cli_search.search)
app.command(name="calibrate")(cli_outliers.calibrate)
app.command(name="outliers")(cli_outliers.outliers)
app.command(name="report")(cli_report.report)

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

_METHOD_HELP = (
    "; ".join(["Linear layers", *(f"{m.name}: {m.summary}" for m in METHODS.values()), FORMATS]) + "."
)

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Alias (`lutserve models`), folder or hub id. Default: smollm2-135m."),
]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="Recipe file (JSON).")]
MethodOption = Annotated[str | None, typer.Option("--method", help=_METHOD_HELP)]
GroupOption = Annotated[
    str | None,
    typer.Option(
        "--group-size", help="Input columns that share a scale, -1: all. Default: 128, AxCore's methods 64."
    ),
]
NumericsOption = Annotated[
    str | None,
    typer.Option("--numerics", help="AxCore's methods: fast (the default) or strict, the published sums."),
]
LutOption = Annotated[
    str | None,
    typer.Option(
        "--lut",
        help="Table of the nonlinear sites: exact, nli-<2|4|16|32>, nnlut:<16|32|256>, nli:FILE, nnlut:FILE; "
        "+clamp after an nnlut. See `lutserve lut`.",
    ),
]
SitesOption = Annotated[
    str | None,
    typer.Option(
        "--lut-sites",
        help="Sites that use --lut, comma separated: silu, gelu, softmax_exp (the default: these three), "
        "softmax_recip, rsqrt.",
    ),
]
SumOption = Annotated[
    str | None, typer.Option("--softmax-sum", help="Precision of a softmax's sum: float32 or float16.")
]
CountOption = Annotated[
    bool, typer.Option("--lut-count-saturations", help="Count inputs outside their table's range.")
]
Linear16Option = Annotated[
    str | None,
    typer.Option(
        "--linear16",
        help="Who multiplies the layers that stay 16 bit: auto (our kernel where vLLM's is slow) or vllm.",
    ),
]
OutliersOption = Annotated[
    str | None,
    typer.Option(
        "--outliers",
        help="Outlier columns of mix8 and mix4. online: learnt while serving (the default); static: only the "
        "calibrated ones, so that answers do not depend on what was served before.",
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration-file", help="File of `lutserve calibrate`. Default: the one in the model's folder."
    ),
]
KvOption = Annotated[
    str | None, typer.Option("--kv", help="KV cache: exact, axcore, or a 4-bit format (nf4, int4, ...).")
]


def _version(show: bool) -> None:
    if show:
        print(f"lutserve {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    env.check()


@app.command(context_settings=PASS_THROUGH)
def serve(
    context: typer.Context,
    model: ModelOption = None,
    recipe: RecipeOption = None,
    method: MethodOption = None,
    group_size: GroupOption = None,
    numerics: NumericsOption = None,
    outliers: OutliersOption = None,
    calibration_file: CalibrationOption = None,
    lut: LutOption = None,
    lut_sites: SitesOption = None,
    softmax_sum: SumOption = None,
    lut_count_saturations: CountOption = False,
    kv: KvOption = None,
    linear16: Linear16Option = None,
) -> None:
    """Start the OpenAI-compatible server. Every other flag goes to vLLM (`vllm serve --help`)."""
    from lutserve import models
    from lutserve.recipe import load
    from lutserve.server.launch import serve as run

    flags = list(context.args)
    if flags and not flags[0].startswith("-"):
        if model is not None:
            raise UserError(f"two models: {flags[0]!r} and --model {model!r}; give one")
        model = flags.pop(0)
    chosen = load(recipe) if recipe else None
    overrides = {"method": method, "group_size": group_size, "lut": lut, "lut_sites": lut_sites, "kv": kv}
    overrides |= {"numerics": numerics, "softmax_sum": softmax_sum, "linear16": linear16}
    overrides["outliers"] = outliers
    overrides["calibration"] = str(calibration_file.absolute()) if calibration_file else None
    overrides["count_saturations"] = "true" if lut_count_saturations else None
    run(model or models.DEFAULT, flags, chosen, **overrides)


@bench.command(name="serve", context_settings=PASS_THROUGH)
def bench_serve(
    context: typer.Context,
    model: Annotated[
        Path | None,
        typer.Option(help="Model folder; default: a random Llama of 1.1 B parameters, made once."),
    ] = None,
    providers: Annotated[
        str | None,
        typer.Option(help="Servers to compare, comma separated, the baseline first; a --method is one too."),
    ] = None,
    workloads: Annotated[str | None, typer.Option(help="Kinds of traffic, comma separated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times every server meets every workload.")] = 3,
    restart: Annotated[
        bool | None,
        typer.Option(
            help="Start the servers anew in every round, which evens out where their memory happens to lie. "
            "Default: only if they do not fit into memory together."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "out/bench"
    ),
) -> None:
    """Measure throughput of several servers, interleaved. Every other flag goes to `lutserve serve`."""
    from lutserve.benchmarks.serve import run
    from lutserve.console import for_tables

    report = run(
        output=output,
        model=model,
        providers=providers.split(",") if providers else None,
        workloads=workloads.split(",") if workloads else None,
        rounds=rounds,
        server_args=context.args,
        together=None if restart is None else not restart,
    )
    report.show(for_tables())
    print(f"written to {report.path}", file=sys.stderr)


@bench.command(name="throughput", context_settings=PASS_THROUGH)
def bench_throughput(
    context: typer.Context,
    types: Annotated[
        str,
        typer.Option(
            help="Comma separated, the baseline first: fp16, bf16, vllm-w8a8, a --method; NAME=DIR for "
            "folders that are quantised already (awq=DIR, gptq=DIR, quik4=DIR)."
        ),
    ] = "bf16,int8,mix8,mix4",
    batch: Annotated[str, typer.Option(help="Requests in flight, comma separated.")] = "1,8,32",
    with_ppl: Annotated[
        bool, typer.Option("--with-ppl", help="Perplexity on WikiText-2 beside speed; needs --model, --data.")
    ] = False,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 2048 tokens for it, from the start.")] = 10,
    data: Annotated[Path | None, typer.Option(help="Folder with wikitext2_test.raw.gz.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Alias, folder or hub id; default: a random Llama of 1.1 B parameters, made once."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times every server meets every batch size.")] = 3,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "out/throughput"
    ),
) -> None:
    """MixQ's throughput table: tokens/s by type and batch size. Other flags go to `lutserve serve`."""
    from lutserve.benchmarks.throughput import run

    table, path = run(
        types=types,
        batch=batch,
        model=model,
        rounds=rounds,
        output=output,
        windows=windows if with_ppl else None,
        data=data,
        server_args=context.args,
    )
    print(table)
    print(f"written to {path} and {path.with_suffix('.md')}", file=sys.stderr)


@app.command()
def doctor(
    port: Annotated[int, typer.Option(help="Port to look at.")] = 8000,
) -> None:
    """Say whether lutserve can serve here and with which kernels; exit 1 with the reasons if not."""
    from rich.console import Console

    from lutserve.doctor import examine

    console = Console(highlight=False, soft_wrap=True)
    problems = 0
    for finding in examine(port, progress=lambda text: console.print(f"  {text}", style="dim")):
        problems += bool(finding.problem)
        mark = "[red]✗[/]" if finding.problem else "[green]✓[/]"
        console.print(f"{mark} [bold]{finding.subject}[/]: {finding.fact}")
        if finding.problem:
            console.print(f"    -> {finding.problem}", markup=False)
    if problems:
        raise typer.Exit(1)


@app.command(name="env")
def show_env(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Print machine, versions and settings, for bug reports and run records."""
    import json

    from lutserve import machine

    facts = machine.collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, entry in value.items():
                print(f"  {name}: {entry}")
        else:
            print(f"{key}: {value}")


def main() -> int:
    """Run the command line; a UserError is one line on stderr and status 2."""
    try:
        app()
    except UserError as error:
        print(f"lutserve: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Ctrl-C, or SIGTERM while vLLM was still starting.
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
