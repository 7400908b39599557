"""What our arithmetic costs in quality: perplexity of several recipes on the same windows of WikiText-2.

    python -m lutserve.benchmarks.accuracy --data FOLDER [--windows 32] [--dtype bfloat16] [-o out/accuracy]
        [--outlier-heavy]
        [--recipes bf16,nli-4,mix8] [--recipes "exact=--method none" --recipes "nli-2=--lut nli-2"]

FOLDER holds `wikitext2_test.raw.gz`. Windows of 2048 tokens, no overlap, as the papers have it. The first
recipe is what the others are compared with. With --outlier-heavy all serve a form of the model that computes
the same but has columns 32 to 64 times as large, made and calibrated once. Writes one JSON record and prints
one table.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lutserve import machine, methods, models
from lutserve.benchmarks import models as benchmark_models
from lutserve.console import for_tables
from lutserve.errors import UserError
from lutserve.eval.ppl import Perplexity, perplexity
from lutserve.eval.texts import wikitext2
from lutserve.quantizers.calibrate import calibrate
from lutserve.quantizers.columns import FILE
from lutserve.server.client import running_server

WINDOW = 2048
#: recipe -> flags of `lutserve serve`
RECIPES: dict[str, tuple[str, ...]] = {
    "bf16": ("--method", "none"),
    "nli-4": ("--method", "none", "--lut", "nli-4"),
    "int8": ("--method", "int8"),
    "mix8": ("--method", "mix8"),
}


def chosen(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return recipes and their flags from --recipes: names with commas between, or NAME=FLAGS.

    A name is one of RECIPES or of a method.

    UserError for a name that has no flags, for a name given twice, and for flags that cannot be split.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        for part in [text] if "=" in text else text.split(","):
            name, given, flags = part.strip().partition("=")
            if not name or "/" in name or name in found:
                raise UserError(f"--recipes {part}: {name!r} is no name, or is there twice")
            try:
                found[name] = tuple(shlex.split(flags)) if given else _named(name)
            except ValueError as error:
                raise UserError(f"--recipes {part}: {error}") from None
    return found or RECIPES


def _named(name: str) -> tuple[str, ...]:
    try:
        return RECIPES.get(name) or ("--method", methods.get(name).name)
    except UserError as error:
        raise UserError(f"--recipes {name}: {', '.join(RECIPES)}, NAME=FLAGS, or a method; {error}") from None


def measure(flags: tuple[str, ...], text: str, windows: int | None, log: Path, model: str) -> Perplexity:
    """Return the perplexity of `text` under `model` served with `flags`."""
    # One token more than a window, because vLLM must generate one.
    sizes = ("--max-model-len", str(WINDOW + 1), "--kv-cache-memory-bytes", "1G")
    with running_server(["--model", model, *sizes, *flags], log=log) as server:
        found: Perplexity = perplexity(server.base_url, text, window=WINDOW, windows=windows)
    return found


def heavy(model: str) -> Path:
    """Return the folder of the form of `model` with large columns, and a calibration of it inside."""
    source = Path(models.resolve(model))
    target = benchmark_models.default_folder(f"{source.name}-outliers")
    folder: Path = benchmark_models.outlier_heavy(source, target)
    if not (folder / FILE).is_file():
        calibrate(folder, folder, samples=16)
    return folder


def main(
    data: Annotated[Path, typer.Option(help="Folder with wikitext2_test.raw.gz.")],
    windows: Annotated[int, typer.Option(help="Windows to score, from the start.")] = 32,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for record and logs.")] = Path(
        "out/accuracy"
    ),
    model: Annotated[str, typer.Option(help="Alias, folder or hub id.")] = models.DEFAULT,
    recipes: Annotated[
        list[str] | None,
        typer.Option(help="Names with commas between, or NAME=FLAGS of `lutserve serve`; may be repeated."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    outlier_heavy: Annotated[
        bool, typer.Option("--outlier-heavy", help="The model with some columns 32 to 64 times as large.")
    ] = False,
) -> None:
    """Measure every recipe, write the record, print the table."""
    if dtype not in ("bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype}; allowed: bfloat16, float16", param_hint="--dtype")
    try:
        flags_of = chosen(recipes or ())
    except UserError as error:
        raise typer.BadParameter(str(error), param_hint="--recipes") from None
    text, label = wikitext2(data), model
    if outlier_heavy:
        # Where the calibration text lies.
        os.environ.setdefault("LUTSERVE_DATA", str(data))
        folder = heavy(model)
        model, label = str(folder), folder.name
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name, flags in flags_of.items():
        found = measure(("--dtype", dtype, *flags), text, windows, output / f"{name}.log", model)
        rows.append({"recipe": name, "flags": flags, "perplexity": found.ppl, "nll": found.nll})
    base = rows[0]["perplexity"]
    for row in rows:
        row["ratio"] = row["perplexity"] / base
    setting: dict[str, Any] = {"model": label, "dtype": dtype, "text": "WikiText-2 raw test"}
    setting |= {"window": WINDOW, "windows": windows}
    record = (
        machine.collect()
        | setting
        | {"command": ["python", "-m", "lutserve.benchmarks.accuracy", *sys.argv[1:]], "results": rows}
    )
    path = output / f"accuracy_{datetime.now():%Y-%m-%dT%H-%M-%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    table = Table("recipe", "perplexity", f"against {rows[0]['recipe']}", box=None)
    for row in rows:
        table.add_row(row["recipe"], f"{row['perplexity']:.3f}", f"{row['ratio'] - 1:+.2%}")
    for_tables().print(table)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
