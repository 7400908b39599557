"""Attention by itself: with tables, exact, and over 4-bit caches against vLLM's own, same inputs and shapes.

    python -m lutserve.benchmarks.attention [-o out/attention] [--threads 1] [--seconds 2] [--only decode]

All are timed in alternation and checked against vLLM's result first. Writes one JSON record, which also says
how many tokens each cache holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from lutserve import kv_formats, luts
from lutserve.benchmarks.record import report, spread
from lutserve.compat import vllm_ops
from lutserve.kernels import attention, kv4, kv4_attention
from lutserve.layers.kv_cache import Tensors

BLOCK = 128
#: name -> query heads, kv heads, head size
MODELS = {"SmolLM2-135M": (9, 3, 64), "Llama-3.2-1B": (32, 8, 64), "Llama-3-8B": (32, 8, 128)}
#: name -> (queries, keys) of each request
STEPS: dict[str, Sequence[tuple[int, int]]] = {
    "decode at 1024": ((1, 1024),),
    "decode at 4096": ((1, 4096),),
    "decode 8 x 1024": ((1, 1024),) * 8,
    "prefill 512": ((512, 512),),
    "prefill 2048": ((2048, 2048),),
    "chunk 512 of 4096": ((512, 4096),),
}
#: relative (Frobenius) distance from vLLM's result, which itself rounds to the dtype
TOLERANCE = 2e-2
#: the same of 4-bit caches, whose keys and values are others
TOLERANCES = {"kv nf4": 0.3, "kv axcore": 0.4}


def calls(
    heads: int, kv_heads: int, size: int, requests: Sequence[tuple[int, int]], dtype: torch.dtype
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, Callable[[], object]]]:
    """Return the attentions to compare, and the two ways to write the cache."""
    random = torch.Generator().manual_seed(0)
    counts = [-(-keys // BLOCK) for _, keys in requests]
    tokens = sum(counts) * BLOCK
    key, value = (torch.randn(tokens, kv_heads, size, generator=random).to(dtype) for _ in "kv")
    table = torch.zeros(len(requests), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count] = torch.arange(count) + sum(counts[:row])
    starts = torch.tensor([0, *(queries for queries, _ in requests)]).cumsum(0).int()
    lengths = torch.tensor([keys for _, keys in requests]).int()
    query = torch.randn(int(starts[-1]), heads, size, generator=random).to(dtype)
    scale = size**-0.5
    slots = torch.arange(tokens)

    ours = torch.zeros(sum(counts), kv_heads, BLOCK, 2 * size, dtype=dtype)
    theirs = torch.zeros_like(ours).view(-1, kv_heads, 2 * BLOCK, size).chunk(2, dim=2)
    isa = _get_attn_isa(dtype, BLOCK, size)
    writes: dict[str, Callable[[], object]] = {
        "vllm": partial(vllm_ops.cpu_attn_reshape_and_cache, key, value, *theirs, slots, isa),
        "ours": partial(attention.cache_write, key, value, ours, slots),
    }
    for write in writes.values():
        write()
    plan = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(requests),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    out = torch.empty_like(query)

    def vllm() -> torch.Tensor:
        window, causal, softcap = -1, True, 0
        rest = (window, table, softcap, plan, None)
        vllm_ops.cpu_attention_with_kv_cache(query, *theirs, out, starts, lengths, scale, causal, None, *rest)
        return out

    def lut(exp_table: torch.Tensor | None) -> torch.Tensor:
        attention.lut_attention(query, ours, table, starts, lengths, out, scale, 0, exp_table, None, False)
        return out

    nli = luts.lut_table("softmax_exp", "nli-4", torch.float16)
    attentions: dict[str, Callable[[], torch.Tensor]] = {
        "vllm": vllm,
        "nli-4": partial(lut, nli),
        "exact": partial(lut, None),
    }
    for name in TOLERANCES:
        scheme = kv_formats.get(name.removeprefix("kv "))
        tensors = Tensors.of(scheme, dtype)
        width = kv4.Layout(BLOCK, size, scheme.by_unit).bytes_per_token
        cache = torch.zeros(sum(counts), kv_heads, BLOCK, width, dtype=torch.uint8)
        divisors = scheme.keys.divisor, scheme.values.divisor
        writes[name] = partial(kv4.write, key, value, cache, slots, tensors.bounds, *divisors, scheme.by_unit)
        writes[name]()
        # This step's values, which a cache by units sees before they are quantised.
        last = [slice(sum(counts[:i]) * BLOCK, None) for i in range(len(requests))]
        recent = [value[at][keys - n : keys] for at, (n, keys) in zip(last, requests, strict=True)]
        tables = tensors.key_tables, tensors.offsets, tensors.value_table
        new = torch.cat(recent) if scheme.by_unit else None
        places = cache, table, starts, lengths
        attentions[name] = partial(_kv4, query, new, *places, out, *tables, scale, None, None, False)
    return attentions, writes


def _kv4(query: torch.Tensor, new: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    kv4_attention.kv4_attention(query, new, *rest)
    out: torch.Tensor = rest[4]
    return out


def tokens(size: int) -> str:
    """How many tokens 4-bit caches hold in the memory of one, in the block sizes that are served."""
    ratios = []
    for name, block in (("nf4", BLOCK), ("axcore", kv_formats.AXCORE_BLOCK)):
        width = kv4.Layout(block, size, kv_formats.get(name).by_unit).bytes_per_token
        ratios.append(f"{name} {4 * size / width:.2f}")
    return f"head size {size}: {', '.join(ratios)}"


def check(attentions: dict[str, Callable[[], torch.Tensor]]) -> None:
    """RuntimeError where a result is far from vLLM's."""
    want = attentions["vllm"]().float()
    for name, call in attentions.items():
        error, allowed = (
            ((call().float() - want).norm() / want.norm()).item(),
            TOLERANCES.get(name, TOLERANCE),
        )
        if not error <= allowed:
            raise RuntimeError(f"{name} is off by {error:.2e}, allowed are {allowed:.0e}")


def clock(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Return microseconds (p20, median, p80) of each call, interleaved for so many seconds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["vllm"]) < 5:
        for name, call in functions.items():
            start = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: spread(values) for name, values in times.items()}


def cases(seconds: float, only: str) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Yield the name and the timings of each comparison."""
    for dtype in (torch.bfloat16, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        for model, shape in MODELS.items():
            for step, requests in STEPS.items():
                if only not in step:
                    continue
                attentions, writes = calls(*shape, requests, dtype)
                check(attentions)
                yield f"{model} {kind}, {step}", clock(attentions, seconds)
            if only in "write":
                yield f"{model} {kind}, write 4096 tokens", clock(writes, seconds)


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the record.")] = Path(
        "out/attention"
    ),
    threads: Annotated[int, typer.Option(help="Threads to use.")] = 1,
    seconds: Annotated[float, typer.Option(help="Seconds for each comparison.")] = 2.0,
    only: Annotated[str, typer.Option(help="Steps whose names have this in them, e.g. decode.")] = "",
) -> None:
    """Time everything, write the record, print the table."""
    sizes = sorted({size for _, _, size in MODELS.values()})
    note = f"tokens in the memory of one 16-bit token: {'; '.join(map(tokens, sizes))}"
    report("attention", cases(seconds, only), output, threads, note)


if __name__ == "__main__":
    typer.run(main)
