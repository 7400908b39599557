"""`lutserve quantize`: write a folder with 4-bit weights, or look into one.

The names of the options that other quantisation scripts use (`--woq_dtype`, `--gptq_actorder`, ...) are
accepted beside our own; `docs/quantize.md` has the list.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lutserve.errors import UserError

if TYPE_CHECKING:
    from lutserve.quantizers.settings import Settings
    from lutserve.quantizers.source import Source
    from lutserve.recipe import Recipe


def quantize(
    model: Annotated[
        str | None, typer.Argument(help="Alias (`lutserve models`), folder or hub id. Default: smollm2-135m.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "--dtype",
            "--woq_dtype",
            help="Weight format (`lutserve formats`), or axcore, int8, mix8, mix4, quik4.",
        ),
    ] = None,
    algo: Annotated[
        str | None,
        typer.Option(
            "--algo", "--woq_algo", help="rtn, gptq, awq or smoothquant. Default: rtn, for quik4 gptq."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe file, e.g. of `lutserve search`, instead of --method: formats by layer."),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            "--group_size",
            "--woq_group_size",
            help="Weights that share a scale; -1 for whole rows. Default: 128, AxCore 64.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", "--output_dir", help="Folder to make.")
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            "--dataset",
            help="Text for gptq, awq, smoothquant, axcore: a file (.txt, .jsonl, also .gz); c4, wikitext2 or "
            "pile (from LUTSERVE_DATA, LUTSERVE_SHARED or the hub); a data set on the hub; or pydoc.",
        ),
    ] = "c4",
    samples: Annotated[
        int, typer.Option("--samples", "--gptq_nsamples", "--calib_iters", help="Calibration windows.")
    ] = 128,
    length: Annotated[
        int,
        typer.Option(
            "--sequence-length", "--gptq_pad_max_length", "--pad_max_length", help="Tokens in a window."
        ),
    ] = 512,
    ignore: Annotated[
        str, typer.Option(help="Layers that stay in 16 bit: names or re:..., comma separated.")
    ] = "lm_head",
    alpha: Annotated[
        float | None, typer.Option(help="Smoothing exponent; 0.5 with smoothquant, else no smoothing.")
    ] = None,
    mse: Annotated[
        bool,
        typer.Option(
            "--mse", "--enable_mse_search", "--woq_enable_mse_search", help="rtn: search the clip ratio."
        ),
    ] = False,
    full_range: Annotated[
        bool,
        typer.Option(
            "--full-range",
            "--enable_full_range",
            "--woq_enable_full_range",
            help="rtn, integers: use all codes.",
        ),
    ] = False,
    act_order: Annotated[
        bool,
        typer.Option(
            "--act-order/--no-act-order",
            "--gptq_actorder",
            help="gptq: columns with large activations first.",
        ),
    ] = True,
    damping: Annotated[
        float,
        typer.Option("--damping", "--gptq_percdamp", help="gptq: share of the mean diagonal added to it."),
    ] = 0.01,
    block_size: Annotated[
        int, typer.Option("--block-size", "--gptq_block_size", help="gptq: columns updated at once.")
    ] = 128,
    bits: Annotated[
        int | None,
        typer.Option("--bits", "--woq_bits", help="Width of the plain format `int` (int with 4 is int4)."),
    ] = None,
    scheme: Annotated[
        str, typer.Option("--scheme", "--woq_scheme", help="sym; asym exists in the Python library only.")
    ] = "sym",
    smooth: Annotated[bool, typer.Option("--sq", help="The same as --alpha 0.5.")] = False,
    activations: Annotated[
        bool,
        typer.Option(
            "--enable_activation", "--woq_enable_activation", help="The same as +a4 after the method."
        ),
    ] = False,
    layout: Annotated[
        str,
        typer.Option(
            help="lutserve, or compressed-tensors: none, int8 and int4 rounded to nearest, for vLLM alone."
        ),
    ] = "lutserve",
    inspect: Annotated[
        Path | None,
        typer.Option(
            help="Show bits, bytes and error of each layer of a quantised folder, also one that "
            "llm-compressor, AWQ or GPTQ made."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="With --inspect: the original model, to measure the error of each weight from."),
    ] = None,
) -> None:
    """Quantise a model into a folder that `lutserve serve` and `vllm serve` take.

    A run that was interrupted, even by kill -9, goes on where it was when the command is repeated.
    """
    if inspect is not None:
        _inspect(inspect, against)
        return
    if against is not None:
        raise UserError(f"--against {against} goes with --inspect DIR")
    from lutserve import methods
    from lutserve import recipe as recipes
    from lutserve.quantizers.settings import Settings

    if output is None:
        raise UserError("say where to write: -o DIR")
    if layout not in ("lutserve", "compressed-tensors"):
        raise UserError(f"--layout {layout}; allowed: lutserve, compressed-tensors")
    if scheme != "sym":
        raise UserError(f"--scheme {scheme}: only sym can be served; asym is in lutserve.quantizers.rtn")
    if recipe is None:
        layers, name = None, _method(method, bits, activations)
        kind = methods.get(name)
        usual, size = "gptq" if kind.offline else "rtn", kind.group_size
    else:
        repeated = {
            "--method": method is not None,
            "--group-size": group_size is not None,
            "--bits": bits is not None,
            "--enable_activation": activations,
            "--ignore": ignore != "lm_head",
        }
        for option, given in repeated.items():
            if given:
                raise UserError(f"--recipe says for each layer what {option} says for all; give one of them")
        layers, name, usual, size = recipes.load(recipe), "", "rtn", Settings.group_size
    size = size if group_size is None else group_size
    ignored = tuple(name.strip() for name in ignore.split(",") if name.strip())
    if layout == "compressed-tensors":
        more = {"--algo": algo not in (None, "rtn"), "--mse": mse, "--full-range": full_range}
        more |= {"--alpha": alpha is not None, "--sq": smooth}
        for option, given in more.items():
            if given:
                raise UserError(f"--layout compressed-tensors only rounds to nearest; leave {option} out")
        group = {"method": name, "group_size": size}
        uniform = {"config_groups": {"all": group}, "ignore": ignored}
        _export(model, output, layers or recipes.parse(uniform, "options"))
        return
    settings = Settings(
        method=name,
        layers=layers,
        algo=(algo or usual).lower(),
        group_size=size,
        ignore=ignored,
        mse=mse,
        full_range=full_range,
        act_order=act_order,
        damping=damping,
        block_size=block_size,
        alpha=0.5 if smooth and alpha is None else alpha,
        samples=samples,
        length=length,
    )
    _run(model, output, settings, calibration)


def _export(model: str | None, output: Path, recipe: Recipe) -> None:
    from lutserve import models
    from lutserve.quantizers.compressed import export

    export(_source(model or models.DEFAULT).folder, output, recipe)
    print(output)


def _method(method: str | None, bits: int | None, activations: bool) -> str:
    """The method's name from the options that spell it."""
    if method is None:
        raise UserError("say into which format: --method NAME (`lutserve formats`), or --recipe FILE")
    if method == "int":
        if bits is None:
            raise UserError("--method int needs --bits, e.g. --bits 4; or give int4")
        method = f"int{bits}"
    elif bits is not None:
        from lutserve import formats

        real = formats.get(method.partition("+")[0]).bits
        if bits != real:
            raise UserError(f"--bits {bits}: {method} has {real} bits; leave --bits out")
    return f"{method}+a4" if activations else method


def _run(model: str | None, output: Path, settings: Settings, calibration: str) -> None:
    """Quantise with a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from lutserve import models
    from lutserve.quantizers.download import folder_of
    from lutserve.quantizers.pipeline import Step, quantize

    console = Console(stderr=True, highlight=False)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    name = model or models.DEFAULT
    folder = folder_of(models.resolve(name, console.print), console.print)
    title = folder.name if (Path(name).expanduser() / "config.json").is_file() else name
    with progress:
        bar = progress.add_task("starting", total=1.0)

        def watch(step: Step) -> None:
            where = f"block {min(step.block + 1, step.blocks)}/{step.blocks}"
            progress.update(bar, completed=step.done, description=f"{where} {step.what}".strip())

        quantize(
            folder,
            output,
            settings,
            text=calibration,
            name=title,
            watch=watch,
            say=lambda line: console.print(line, markup=False),
        )
    print(output)


def _inspect(folder: Path, against: str | None) -> None:
    from rich.table import Table

    from lutserve import comparison
    from lutserve.console import for_tables

    stored = comparison.open_folder(folder)
    facts = stored.facts()
    if against is not None:
        facts = comparison.measured(stored, facts, _source(against))
    table = Table(box=None, header_style="bold")
    table.add_column("layer", no_wrap=True)
    for heading in ("out x in", "bits", "bytes", "weight dB", "output dB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in facts:
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        errors = (
            "-" if error is None else f"{error:.2f}" for error in (layer.weight_sqnr, layer.output_sqnr)
        )
        table.add_row(layer.name, shape, f"{layer.bits:.3f}", f"{layer.bytes:,}", *errors)
    for_tables().print(table)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in facts)
    size = sum(layer.bytes for layer in facts)
    print(f"{stored.title}: {len(facts)} layers", end=", ")
    print(f"{weights:,} weights in {size:,} bytes ({8 * size / weights:.3f} bits each)", end="; ")
    print(f"with all else {stored.size():,} bytes")
    if against is not None and stored.folded:
        print("weight dB: rows and columns of the original scaled as they are here, where scales are folded")


def _source(model: str) -> Source:
    from lutserve import models
    from lutserve.quantizers.download import folder_of
    from lutserve.quantizers.source import Source

    def say(line: str) -> None:
        typer.echo(line, err=True)

    return Source(folder_of(models.resolve(model, say), say))
