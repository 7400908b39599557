"""Operators by themselves: ours against what vLLM and torch have.

    python -m lutserve.benchmarks.kernels [-o out/kernels] [--threads 1]

Every pair is timed in alternation and checked against the same reference first. Writes one JSON record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lutserve import luts
from lutserve.benchmarks.record import report, spread
from lutserve.compat import vllm_ops
from lutserve.kernels import activation, mixq
from lutserve.quant_methods.int8_gemm import FusedGemm, Int8Gemm, OnednnGemm, onednn_is_exact

Call = Callable[[], torch.Tensor]
#: rounds of a comparison: this many, or what fits the seconds, but no fewer than the second number
REPEATS, FEWEST, SECONDS = 15, 5, 20.0


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
    end = time.monotonic() + SECONDS
    for done in range(REPEATS):
        if done >= FEWEST and time.monotonic() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: spread(values) for name, values in times.items()}


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
    """int8 GEMMs: oneDNN's as vLLM calls it, where it is exact, and ours. Weights are met in turn, so none is
    cached.
    """
    n, k = 16384, 2048
    weight_scales = torch.full((n,), 1e-3)
    codes = [torch.randint(-127, 128, (n, k), dtype=torch.int8) for _ in range(16)]
    kinds = {"onednn": OnednnGemm} if onednn_is_exact() else {}
    gemms: dict[str, list[Int8Gemm]] = {
        name: [kind(q, weight_scales, torch.bfloat16) for q in codes]
        for name, kind in (kinds | {"int8_linear": FusedGemm}).items()
    }
    for m in (1, 4, 8, 16, 64, 256, 1024):
        x, scales = torch.randint(-127, 128, (m, k), dtype=torch.int8), torch.rand(m, 1)
        none = torch.empty(m, 0, dtype=torch.bfloat16), torch.empty(0, n, dtype=torch.bfloat16)
        count = 16 if m < 256 else 2
        pair = {
            name: partial(_multiply, some[:count], x, scales, *none, None) for name, some in gemms.items()
        }
        yield f"{count} int8 GEMMs [{m}, {k}] x [{k}, {n}]", compare(pair, 1e-2)


def _multiply(gemms: list[Int8Gemm], *arguments: Any) -> torch.Tensor:
    out = torch.empty(0)
    for gemm in gemms:
        out = gemm(*arguments)
    return out


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the record.")] = Path(
        "out/kernels"
    ),
    threads: Annotated[int, typer.Option(help="Threads to use.")] = 1,
) -> None:
    """Time everything, write the record, print the table."""
    report("kernels", cases(), output, threads)


if __name__ == "__main__":
    typer.run(main)
