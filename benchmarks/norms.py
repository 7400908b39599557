"""Norms and activations by table against vLLM's and torch's own, one operator at a time.

    python -m lutserve.benchmarks.norms [-o out/norms] [--threads 1]

"native" is what vLLM serves on a CPU in eager mode (torch operations), "vllm_c" its C++ operator, which it
has but does not use there. Interleaved; every result is checked against the first. Writes one JSON record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lutserve import luts
from lutserve.benchmarks.kernels import Call, compare
from lutserve.benchmarks.record import report
from lutserve.compat import vllm_ops
from lutserve.kernels import activation, norm

EPS = 1e-5
#: rows, columns: one token, a batch, a prefill, and the heads of a prefill (q/k norm)
SHAPES = ((1, 576), (1, 4096), (64, 2048), (512, 2048), (4096, 128))


def cases() -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Yield the name and the timings of each comparison."""
    generator = torch.Generator().manual_seed(0)
    roots = luts.lut_table("rsqrt", "nli-4", torch.float16)
    for dtype in (torch.bfloat16, torch.float16):
        for rows, columns in SHAPES:
            x, r = torch.randn(2, rows, columns, generator=generator).to(dtype)
            w, b = torch.randn(2, columns, generator=generator).to(dtype)
            ours: Call = partial(norm.rms_norm, x, w, roots, EPS)
            calls = {"native": partial(_native, x, w), "vllm_c": partial(_vllm_c, x, w), "table": ours}
            yield f"RMSNorm [{rows}, {columns}] {dtype}", compare(_repeated(calls, x), 1e-2)
            calls = {
                "native": partial(_native_add, x, r, w),
                "vllm_c": partial(_vllm_c_add, x, r, w),
                "table": partial(_first, norm.add_rms_norm, x, r, w, roots, EPS),
            }
            yield f"RMSNorm of a sum [{rows}, {columns}] {dtype}", compare(_repeated(calls, x), 1e-2)
            calls = {
                "torch": partial(torch.nn.functional.layer_norm, x, (columns,), w, b, EPS),
                "table": partial(norm.layer_norm, x, w, b, roots, EPS),
            }
            yield f"LayerNorm [{rows}, {columns}] {dtype}", compare(_repeated(calls, x), 1e-2)
        x = torch.randn(512, 2048, generator=generator).to(dtype)
        calls = {
            "torch": partial(torch.nn.functional.gelu, x),
            "table": partial(activation.unary, x, luts.lut_table("gelu", "nli-32", dtype)),
        }
        yield f"GELU [512, 2048] {dtype}", compare(calls, 2e-2)


def _repeated(calls: dict[str, Call], x: torch.Tensor) -> dict[str, Call]:
    """Short calls ten at a time, so that the clock does not matter."""
    return calls if x.numel() > 10000 else {name: partial(_ten, call) for name, call in calls.items()}


def _ten(call: Call) -> torch.Tensor:
    for _ in range(9):
        call()
    last: torch.Tensor = call()
    return last


def _native(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    normed: torch.Tensor = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return normed.to(x.dtype) * w


def _native_add(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x.float() + r.float()
    wide.to(x.dtype)  # the residual
    normed: torch.Tensor = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return normed.to(x.dtype) * w


def _vllm_c(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    vllm_ops.rms_norm(out, x, w, EPS)
    return out


def _vllm_c_add(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out, residual = x.clone(), r.clone()  # it works in place
    vllm_ops.fused_add_rms_norm(out, residual, w, EPS)
    return out


def _first(call: Callable[..., tuple[torch.Tensor, ...]], *arguments: Any) -> torch.Tensor:
    first: torch.Tensor = call(*arguments)[0]
    return first


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the record.")] = Path(
        "out/norms"
    ),
    threads: Annotated[int, typer.Option(help="Threads to use.")] = 1,
) -> None:
    """Time everything, write the record, print the table."""
    report("norms", cases(), output, threads, note="short cases: ten calls together")


if __name__ == "__main__":
    typer.run(main)
