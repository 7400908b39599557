"""What formats and quantisers cost in quality: perplexity of a model quantised in each way, in fp32.

    python -m lutserve.benchmarks.quantizers --data FOLDER [--windows 3] [-o out/quantizers]

FOLDER holds `wikitext2_test.raw.gz` and, for gptq and awq, `c4_train_head1000.jsonl.gz`. A cell is
`FORMAT:ALGO` or `FORMAT+a4:ALGO`, `none` is the model itself. Weights are dequantised and computed with by
transformers in fp32, so that nothing but the rounding counts; no figure depends on the machine's speed. A
cell that is done is not done again, a folder that is half quantised goes on. Writes one JSON record.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from lutserve import machine, models
from lutserve.checkpoint import Checkpoint
from lutserve.console import for_tables
from lutserve.eval.ppl import token_windows
from lutserve.eval.texts import wikitext2
from lutserve.methods import get
from lutserve.quantizers import quantize_activations
from lutserve.quantizers.pipeline import quantize
from lutserve.quantizers.settings import Settings

WINDOW = 2048
FORMATS = ("int4", "nf4", "sf4_5")
CELLS = (
    "none",
    *(f"{name}{activations}:rtn" for activations in ("", "+a4") for name in FORMATS),
    *(f"{name}:{algo}" for algo in ("gptq", "awq") for name in FORMATS),
)


def quantized(model: Path, cell: str, samples: int, folder: Path) -> tuple[Checkpoint, Settings]:
    """Return the folder of a cell, made if need be; activations do not change it."""
    method, _, algo = cell.partition(":")
    settings = Settings(get(method).format, algo or "rtn", samples=samples)
    output = folder / f"{settings.method}-{settings.algo}"
    if not output.exists():
        quantize(model, output, settings, text="c4", say=lambda line: print(line, file=sys.stderr))
    return Checkpoint(output), settings


@contextmanager
def rounded_inputs(model: nn.Module, layers: list[str], settings: Settings) -> Iterator[None]:
    """Round what enters the layers to the format of their weights, token by token and group by group."""

    def round_input(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (quantize_activations(given[0], settings.codebook, settings.group_size), *given[1:])

    hooks = [model.get_submodule(name).register_forward_pre_hook(round_input) for name in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def losses(model: nn.Module, windows: list[list[int]]) -> list[float]:
    """Mean negative log-likelihood of each window, in nats a token; the first token has no context."""
    found = []
    for window in windows:
        ids = torch.tensor(window)
        logits = model(ids[None], use_cache=False).logits[0, :-1]
        found.append(float(nn.functional.cross_entropy(logits, ids[1:])))
    return found


def measure(model: Path, cell: str, windows: list[list[int]], samples: int, folder: Path) -> dict[str, Any]:
    """Return the row of one cell for the record."""
    from transformers import AutoModelForCausalLM

    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    row: dict[str, Any] = {"cell": cell}
    if cell == "none":
        nll = losses(loaded, windows)
    else:
        checkpoint, settings = quantized(model, cell, samples, folder)
        loaded.load_state_dict({name: t.float() for name, t in checkpoint.dequantized()}, strict=False)
        layers = checkpoint.layers if get(cell.partition(":")[0]).activations == 4 else []
        with rounded_inputs(loaded, layers, settings):
            nll = losses(loaded, windows)
        row["settings"] = settings.to_json()
    return row | {"perplexity": math.exp(math.fsum(nll) / len(nll)), "nll": nll}


def main(
    data: Annotated[Path, typer.Option(help="Folder with the evaluation data.")],
    windows: Annotated[int, typer.Option(min=1, help="Windows to score, from the start.")] = 3,
    cells: Annotated[str, typer.Option(help="Cells, comma separated.")] = ",".join(CELLS),
    samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens from C4.")] = 16,
    threads: Annotated[int, typer.Option(help="Threads to use.")] = 1,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for record and models.")] = Path(
        "out/quantizers"
    ),
    model: Annotated[str, typer.Option(help="Alias, folder or hub id.")] = models.DEFAULT,
) -> None:
    """Measure every cell, write the record, print the table."""
    torch.set_num_threads(threads)
    os.environ["LUTSERVE_DATA"] = str(data)
    folder = Path(models.resolve(model))
    pieces = token_windows(wikitext2(data), str(folder), WINDOW)[:windows]
    rows = []
    for cell in cells.split(","):
        kept = output / f"{cell}.{windows}-windows.{samples}-samples.json"
        if not kept.exists():
            row = measure(folder, cell, pieces, samples, output / f"{samples}-samples")
            print(f"{cell}: {row['perplexity']:.3f}", file=sys.stderr)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(row))
        rows.append(json.loads(kept.read_text()))
    record = machine.collect() | {
        "command": ["python", "-m", "lutserve.benchmarks.quantizers", *sys.argv[1:]],
        "model": model,
        "text": "WikiText-2 raw test",
        "window": WINDOW,
        "windows": windows,
        "calibration": f"C4, {samples} windows of 512 tokens",
        "results": rows,
    }
    path = output / f"quantizers_{datetime.now():%Y-%m-%dT%H-%M-%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    table = Table("cell", "perplexity", box=None)
    for row in rows:
        table.add_row(row["cell"], f"{row['perplexity']:.3f}")
    for_tables().print(table)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
