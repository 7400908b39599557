"""Tables against exact arithmetic and against the published per-element algorithm, both on the same CPU.

    python -m lutserve.benchmarks.luts [-o out/luts] [--threads 1]

"published" is what a table replaces: NLI (arXiv 2602.02988) evaluated in torch operations for every element,
segment search, index, interpolation; in attention with scores, weights and probabilities as whole matrices.
Our results must equal it to the bit for activations. Times are for 2**20 outputs of an activation, so
microseconds / 1049 are nanoseconds an element. Writes one JSON record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from lutserve import luts
from lutserve.benchmarks.attention import calls as attentions
from lutserve.benchmarks.kernels import Call, compare
from lutserve.benchmarks.record import report
from lutserve.kernels import activation
from lutserve.luts import nli

POINTS = 4
#: query heads, kv heads, head size, and (queries, keys) of the one request
ATTENTION = (9, 3, 64, (512, 512))
_LARGEST = 65504.0


def published(function: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the published evaluation of a function: any 16-bit tensor in, fp16 of that shape out."""
    table = nli.table(function, POINTS)
    cuts, scales, samples = map(torch.from_numpy, (table.cuts, table.scales, table.samples))
    pieces = torch.tensor([1, *[POINTS] * 8, 1])
    first = torch.cat([torch.zeros(1, dtype=torch.int64), pieces.cumsum(0)[:-1]])

    def evaluate(x: torch.Tensor) -> torch.Tensor:
        x = x.half().float()
        segment = (torch.bucketize(x, cuts, right=True) - 1).clamp(0, 9)
        place = (x - cuts[segment]) * scales[segment]
        whole = place.floor()
        last = pieces[segment]
        step = whole.long().clamp(min=0).minimum(last)
        left = samples[first[segment] + step]
        right = samples[first[segment] + (step + 1).minimum(last)]
        y = (right - left) * (place - whole) + left
        y = torch.where(x <= cuts[0], samples[0], torch.where(x >= cuts[-1], samples[-1], y))
        return y.half().clamp(-_LARGEST, _LARGEST)

    return evaluate


def activations() -> Iterator[tuple[str, dict[str, Call]]]:
    """Yield the name and the calls of each comparison of activations, checked."""
    generator = torch.Generator().manual_seed(0)
    silu = published("silu")
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(512, 4096, generator=generator).to(dtype) * 3
        gate, up = x.chunk(2, -1)
        table = luts.lut_table("silu", f"nli-{POINTS}", dtype)
        plain = gate.contiguous()
        gated: dict[str, Call] = {
            "torch": lambda gate=gate, up=up: torch.nn.functional.silu(gate) * up,
            "vllm": partial(_silu_and_mul, x),
            "table": partial(activation.act_and_mul, x, table),
            "published": lambda gate=gate, up=up: silu(gate).to(up.dtype) * up,
        }
        unary: dict[str, Call] = {
            "torch": partial(torch.nn.functional.silu, plain),
            "table": partial(activation.unary, plain, table),
            "published": lambda plain=plain: silu(plain).to(plain.dtype),
        }
        for name, calls in (("SiLU * up", gated), ("SiLU", unary)):
            if not torch.equal(calls["table"](), calls["published"]()):
                raise RuntimeError(f"{name} {dtype}: the table differs from the published algorithm")
            yield f"{name}, 2**20 elements, {dtype}", calls


def attention() -> Iterator[tuple[str, dict[str, Call]]]:
    """Yield the name and the calls of the attention of a prefill, per dtype."""
    heads, kv_heads, size, (queries, keys) = ATTENTION
    exp = published("softmax_exp")
    for dtype in (torch.bfloat16, torch.float16):
        found, _ = attentions(heads, kv_heads, size, [(queries, keys)], dtype)
        query, key, value = _inputs(heads, kv_heads, size, queries, keys, dtype)
        mask = torch.full((queries, keys), torch.finfo(dtype).min, dtype=dtype).triu(1 + keys - queries)

        def eager(
            query: torch.Tensor = query,
            key: torch.Tensor = key,
            value: torch.Tensor = value,
            mask: torch.Tensor = mask,
        ) -> torch.Tensor:
            scores = (query.transpose(0, 1) @ key.permute(1, 2, 0)) * size**-0.5 + mask
            weights = exp(scores - scores.amax(-1, keepdim=True))
            total = weights.float().sum(-1, keepdim=True).half()
            chances = (weights / total).to(value.dtype)
            return (chances @ value.transpose(0, 1)).transpose(0, 1)

        calls = {"vllm": found["vllm"], "table": found[f"nli-{POINTS}"], "published": eager}
        yield f"attention, prefill of {queries}, {heads} heads, {dtype}", calls


def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    torch.ops._C.silu_and_mul(out, x)
    return out


def _inputs(
    heads: int, kv_heads: int, size: int, queries: int, keys: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value [tokens, heads, size] as `benchmarks.attention.calls` draws them."""
    random = torch.Generator().manual_seed(0)
    key, value = (torch.randn(keys, kv_heads, size, generator=random).to(dtype) for _ in "kv")
    query = torch.randn(queries, heads, size, generator=random).to(dtype)
    group = heads // kv_heads
    return query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)


def cases() -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Yield the name and the timings of each comparison."""
    for name, calls in (*activations(), *attention()):
        yield name, compare(calls, 2e-2)


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the record.")] = Path("out/luts"),
    threads: Annotated[int, typer.Option(help="Threads to use.")] = 1,
) -> None:
    """Time everything, write the record, print the table."""
    report("luts", cases(), output, threads, note="microseconds / 1049 are ns an element of an activation")


if __name__ == "__main__":
    typer.run(main)
