"""Operators by themselves: ours against what vLLM and torch have, and the shapes of calls that oneDNN likes.

    python -m lutserve.benchmarks.kernels [-o out/kernels] [--threads 1]

Every pair is timed in alternation and checked against the same reference first. Writes one JSON record.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from lutserve import luts, machine
from lutserve.compat import vllm_ops
from lutserve.kernels import activation, library, mixq

Call = Callable[[], torch.Tensor]
REPEATS = 15


def compare(calls: Mapping[str, Call], tolerance: float) -> dict[str, list[float]]:
    """Return microseconds (p20, median, p80) of each call, interleaved; all must agree with the first.

    Raises:
        RuntimeError: a result is further than `tolerance` (relative, Frobenius) from the first call's.
    """
    first = next(iter(calls.values()))().float()
    for name, call in calls.items():
        error = ((call().float() - first).norm() / first.norm()).item()
        if not error <= tolerance:
            raise RuntimeError(f"{name} is off by {error:.2e}, allowed are {tolerance:.0e}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: [round(q, 1) for q in _quantiles(values)] for name, values in times.items()}


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    fifths = statistics.quantiles(values, n=5)
    return fifths[0], statistics.median(values), fifths[3]


def cases() -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Yield the name and the timings of each comparison."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    table = luts.lut_table("silu", "nli-32", torch.bfloat16)
    for m in (1, 8, 64, 512):
        x = normal(m, 16384).bfloat16()
        pair = {"torch": partial(_silu_and_mul, x), "table": partial(activation.act_and_mul, x, table)}
        yield f"gated SiLU [{m}, 2 x 8192] bf16", compare(pair, 2e-2)

    for m, k in ((1, 2048), (8, 2048), (512, 2048), (1, 8192), (512, 8192)):
        x = normal(m, k).bfloat16()
        index, keep = torch.empty(0, dtype=torch.int32), torch.full((k // 32,), -1, dtype=torch.int32)
        ours = partial(_first, mixq.prepare, x, index, keep)
        pair = {"vllm": partial(_first, vllm_ops.onednn_scaled_int8_quant, x), "mixq_prepare": ours}
        yield f"quantise [{m}, {k}] bf16", compare(pair, 1e-2)

    for dtype in (torch.bfloat16, torch.float16):
        for m, s in ((1, 16), (1, 96), (8, 96), (64, 96)):
            out, side, weight = (t.to(dtype) for t in (normal(m, 2048), normal(m, s), normal(s, 2048)))
            pair = {"torch": partial(_addmm, out, side, weight), "loop": partial(_loop, out, side, weight)}
            yield f"outliers [{m}, {s}] x [{s}, 2048] {dtype}", compare(pair, 1e-2)

    yield from _gemms()


def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _first(call: Callable[..., tuple[torch.Tensor, ...]], *arguments: Any) -> torch.Tensor:
    return call(*arguments)[0]


def _addmm(out: torch.Tensor, side: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return out.zero_().addmm_(side, weight)


def _loop(out: torch.Tensor, side: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    mixq.add_outliers(out.zero_(), side, weight)
    return out


def _gemms() -> Iterator[tuple[str, dict[str, list[float]]]]:
    """The int8 GEMM of oneDNN by number of rows. Few rows meet 16 weights in turn, so that none is cached."""
    k, n = 2048, 16384
    scales = torch.full((1, n), 1e-3)
    codes = [torch.randint(-127, 128, (n, k), dtype=torch.int8) for _ in range(16)]
    handles = [
        vllm_ops.create_onednn_scaled_mm(q.t(), scales, torch.bfloat16, True, False, 32) for q in codes
    ]
    x = torch.randint(-127, 128, (1024, k), dtype=torch.int8)
    ones = torch.ones(1024, 1)
    out = torch.empty(1024, n, dtype=torch.bfloat16)

    def multiply(rows: int, step: int, cold: bool) -> torch.Tensor:
        for handle in handles if cold else handles[:1]:
            for part in range(0, rows, step):
                cut = slice(part, part + step)
                vllm_ops.onednn_scaled_mm(handle, x[cut], out[cut], ones[cut], None, None, None)
        return out[:1]

    some = {f"{m} rows": partial(multiply, m, m, True) for m in (1, 2, 3, 4, 6, 8)}
    yield f"int8 GEMM [few, {k}] x 16 cold [{k}, {n}]", compare(some, 0.0)
    many = {f"by {step}": partial(multiply, 1024, step, False) for step in (1024, 512, 256, 128)}
    yield f"int8 GEMM [1024, {k}] x [{k}, {n}]", compare(many, 0.0)


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the record.")] = Path(
        "out/kernels"
    ),
    threads: Annotated[int, typer.Option(help="Threads to use.")] = 1,
) -> None:
    """Time everything, write the record, print the table."""
    torch.set_num_threads(threads)
    results: list[dict[str, Any]] = []
    table = Table("case", "microseconds: median (p20 - p80)", box=None)
    record = machine.collect() | {
        "command": ["python", "-m", "lutserve.benchmarks.kernels", *sys.argv[1:]],
        "threads": threads,
        "kernels": library.load(),
    }
    for name, timings in cases():
        results.append({"case": name, "microseconds_p20_median_p80": timings})
        table.add_row(
            name, ", ".join(f"{who} {m:g} ({low:g} - {high:g})" for who, (low, m, high) in timings.items())
        )
    console = Console()
    console.print(table, width=None if console.is_terminal else 200)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"kernels_{datetime.now():%Y-%m-%dT%H-%M-%S}.json"
    path.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
