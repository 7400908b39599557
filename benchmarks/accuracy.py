"""What our arithmetic costs in quality: perplexity of several recipes on the same windows of WikiText-2.

    python -m lutserve.benchmarks.accuracy --data FOLDER [--windows 32] [--recipes bf16,axcore] [-o FOLDER]

FOLDER holds `wikitext2_test.raw.gz`. Windows of 2048 tokens, no overlap, as the papers have it. Writes one
JSON record and prints one table.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lutserve import machine, models
from lutserve.console import for_tables
from lutserve.eval.ppl import Perplexity, perplexity, wikitext2
from lutserve.server.client import running_server

WINDOW = 2048
_FP4 = ("mpfpma", "mpfpma-s", "mpfpma-sc", "axcore", "axcore-plus")
#: recipe -> flags of `lutserve serve`
RECIPES: dict[str, tuple[str, ...]] = {
    "bf16": ("--method", "none"),
    "nli-4": ("--method", "none", "--lut", "nli-4"),
    "int8": ("--method", "int8"),
    "mix8": ("--method", "mix8"),
    "fp4_e2m1": ("--method", "fp4_e2m1", "--group-size", "64"),
    **{name: ("--method", name) for name in _FP4},
    **{f"{name}-strict": ("--method", name, "--numerics", "strict") for name in _FP4},
}


def measure(flags: tuple[str, ...], text: str, windows: int | None, log: Path, model: str) -> Perplexity:
    """Return the perplexity of `text` under `model` served with `flags`."""
    # One token more than a window, because vLLM must generate one.
    sizes = ("--max-model-len", str(WINDOW + 1), "--kv-cache-memory-bytes", "1G")
    with running_server(["--model", model, *sizes, *flags], log=log) as server:
        found: Perplexity = perplexity(server.base_url, text, window=WINDOW, windows=windows)
    return found


def main(
    data: Annotated[Path, typer.Option(help="Folder with wikitext2_test.raw.gz.")],
    windows: Annotated[int, typer.Option(help="Windows to score, from the start.")] = 32,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for record and logs.")] = Path(
        "out/accuracy"
    ),
    model: Annotated[str, typer.Option(help="Alias, folder or hub id.")] = models.DEFAULT,
    recipes: Annotated[
        str, typer.Option(help=f"Comma separated, the baseline first: {', '.join(RECIPES)}.")
    ] = "bf16,nli-4,int8,mix8",
) -> None:
    """Measure the recipes, write the record, print the table."""
    chosen = recipes.split(",")
    if unknown := set(chosen) - RECIPES.keys():
        raise typer.BadParameter(f"unknown recipes {', '.join(sorted(unknown))}")
    text = wikitext2(data)
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in chosen:
        flags = RECIPES[name]
        found = measure(flags, text, windows, output / f"{name}.log", model)
        rows.append({"recipe": name, "flags": flags, "perplexity": found.ppl, "nll": found.nll})
    base = rows[0]["perplexity"]
    for row in rows:
        row["ratio"] = row["perplexity"] / base
    setting = {"model": model, "text": "WikiText-2 raw test", "window": WINDOW, "windows": windows}
    record = (
        machine.collect()
        | setting
        | {"command": ["python", "-m", "lutserve.benchmarks.accuracy", *sys.argv[1:]], "results": rows}
    )
    path = output / f"accuracy_{datetime.now():%Y-%m-%dT%H-%M-%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    table = Table("recipe", "perplexity", f"against {chosen[0]}", box=None)
    for row in rows:
        table.add_row(row["recipe"], f"{row['perplexity']:.3f}", f"{row['ratio'] - 1:+.2%}")
    for_tables().print(table)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
