"""What the outlier columns of mix8 cost beside int8, and what preparing a gated activation in one pass saves.

    python -m lutserve.benchmarks.outliers [-o out/outliers] [--threads 1]

Layers hold the same weights and see inputs without outliers, so all must give the same result up to rounding,
which is checked; they are timed in alternation. Writes one JSON record.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from lutserve import luts
from lutserve.benchmarks.kernels import Call, compare
from lutserve.benchmarks.record import Timings, report
from lutserve.kernels import activation, mixq
from lutserve.quant_methods.mixq import MixqKernel
from lutserve.quantizers.outliers import places

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))  # output by input columns
ROWS = (1, 16, 64, 256)
COLUMNS = (16, 64, 128)


def cases() -> Iterator[tuple[str, Timings]]:
    """Yield the name and the timings of each comparison."""
    generator = torch.Generator().manual_seed(0)
    for n, k in SHAPES:
        weight = (torch.randn(n, k, generator=generator) * k**-0.5).bfloat16()
        layers = {"int8": MixqKernel(weight, False)}
        for count in COLUMNS:
            gain = torch.zeros(k)
            gain[torch.randperm(k, generator=generator)[:count]] = 1
            layers[f"mix8, {count} columns"] = MixqKernel(weight, True, gain, True)
        for m in ROWS:
            # No value stands out of its row, so nothing is learnt or looked for.
            x = torch.randn(m, k, generator=generator).clamp(-4, 4).bfloat16()
            calls: dict[str, Call] = {name: partial(layer, x) for name, layer in layers.items()}
            yield f"[{m}, {k}] x [{k}, {n}]", compare(calls, 2e-2)
    table, k = luts.lut_table("silu", "nli-4", torch.bfloat16), 8192
    index, keep = places(k, torch.arange(0, k, k // 96))
    for m in (1, 8, 64, 256):
        x = torch.randn(m, 2 * k, generator=generator).bfloat16()
        pair: dict[str, Call] = {
            "two operators": partial(_two, x, table, index, keep),
            "one": partial(_one, x, table, index, keep),
        }
        yield f"gate and prepare [{m}, 2 x {k}]", compare(pair, 0.0)


def _two(x: torch.Tensor, table: torch.Tensor, index: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    codes: torch.Tensor = mixq.prepare(activation.act_and_mul(x, table), index, keep)[0]
    return codes


def _one(x: torch.Tensor, table: torch.Tensor, index: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    codes: torch.Tensor = mixq.gate_and_prepare(x, table, index, keep)[1]
    return codes


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the record.")] = Path(
        "out/outliers"
    ),
    threads: Annotated[int, typer.Option(help="Threads to use.")] = 1,
) -> None:
    """Time everything, write the record, print the table."""
    report("outliers", cases(), output, threads)


if __name__ == "__main__":
    typer.run(main)
