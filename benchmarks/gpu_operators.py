"""Operators on a GPU beside vLLM's and cuBLAS, and beside what this device can do at all.

    python -m lutserve.benchmarks.gpu_operators      # a stage of `gpu`: prints a line of JSON for each case

Every result is compared with the exact one first; one that is off, or a call that fails, is reported and not
timed. Calls are timed as CUDA graphs, with a cold L2 cache, in alternation. Shapes are those of Llama-3-8B.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from vllm.scalar_type import scalar_types

from lutserve import kv_formats, luts
from lutserve.benchmarks.record import Timings, spread
from lutserve.compat import vllm_ops
from lutserve.errors import UserError
from lutserve.kernels import activation, attention, kv4, kv4_attention, library, lut_gemm, mixq, norm
from lutserve.kernels.axcore_reference import activation_maps
from lutserve.kernels.reference import quantize_rows
from lutserve.layers.kv_cache import Tensors
from lutserve.luts import fpma, fpma_classes
from lutserve.quant_methods.int8_gemm import CutlassGemm
from lutserve.quantizers.outliers import places

Run = Callable[[], torch.Tensor]

DEVICE = "cuda"

#: output and input columns of the MLP, both ways
SHAPES = ((4096, 14336), (14336, 4096))
DECODE, PREFILL = (1, 4, 16), (512, 4096)
GROUP, OUTLIERS, ROUNDS = 128, 128, 5
#: query heads, kv heads, head size, keys in a block of the cache
HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 64
#: keys of a decoded request, and tokens of one that is all prefill
CONTEXT, LENGTH = 32768, 2048
#: columns of a gated activation's result, and of a norm
WIDTHS = (14336, 4096)
#: relative (Frobenius) distance from the exact result that is allowed: where only sums are rounded, with
#: tables, with int8 activations and weights, with random keys and values in 4 bits (bits are for the tests)
ROUNDED, TABLE, INT8, FOUR_BITS = 2e-3, 1e-2, 3e-2, 0.5


@dataclass(frozen=True)
class Work:
    """What a call cannot do without."""

    #: bytes read and written
    moved: int
    #: operations of products in fp16 and in int8, two for each
    fp16: int = 0
    int8: int = 0


@dataclass(frozen=True)
class Contender:
    """A call to time, and what its result is to be."""

    #: packs what has to be packed, and returns the call
    build: Callable[[], Run]
    expected: torch.Tensor
    #: relative distance from it
    allowed: float
    work: Work


@dataclass(frozen=True)
class Target:
    """A speed that we want."""

    call: str
    baseline: str
    at_least: float


@dataclass(frozen=True)
class Case:
    """Calls that do the same, the first the baseline."""

    name: str
    contenders: Mapping[str, Contender]
    targets: Sequence[Target] = field(default=())


def call(function: Callable[..., torch.Tensor], *arguments: Any) -> Callable[[], Run]:
    """Return a `Contender.build` that has nothing to pack."""
    return partial(partial, function, *arguments)


def graphed(run: Run) -> Callable[[], None]:
    """Return the call as a CUDA graph, which also shows that it waits for nothing."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


def timed(graphs: Mapping[str, Callable[[], None]]) -> Timings:
    """Return microseconds (p20, median, p80) of each graph, over ROUNDS interleaved rounds."""
    from triton.testing import do_bench

    times: Timings = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, replay in graphs.items():
            times[name] += [1e3 * t for t in do_bench(replay, warmup=5, rep=30, return_mode="all")]
    return {name: spread(found) for name, found in times.items()}


def ceilings() -> dict[str, float]:
    """Return what this device reaches: GB/s of a copy, 10**12 operations/s of square products."""
    side, size = 8192, 2**30
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    half = torch.randn(side, side, device=DEVICE).half()
    codes = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=DEVICE)
    runs: dict[str, Run] = {
        "copy": partial(torch.empty_like(source).copy_, source),
        "fp16": partial(torch.mm, half, half.t()),
        "int8": partial(torch._int_mm, codes, codes.t()),
    }
    times = timed({name: graphed(run) for name, run in runs.items()})
    return {
        "copy_gb_s": round(2 * size / 1e3 / times["copy"][1], 1),
        "fp16_tflop_s": round(2 * side**3 / 1e6 / times["fp16"][1], 1),
        "int8_top_s": round(2 * side**3 / 1e6 / times["int8"][1], 1),
    }


def distance(found: torch.Tensor, want: torch.Tensor) -> float:
    """Relative (Frobenius) distance of two tensors."""
    return float((found.double() - want.double()).norm() / want.double().norm())


def fastest(work: Work, reached: Mapping[str, float]) -> float:
    """Return microseconds that the work takes at the device's ceilings."""
    products = work.fp16 / reached["fp16_tflop_s"] + work.int8 / reached["int8_top_s"]
    return max(work.moved / reached["copy_gb_s"] / 1e3, products / 1e6)


def measure(case: Case, reached: Mapping[str, float]) -> dict[str, Any]:
    """Check, then time the calls of a case; what is off or fails is in `failed`, with the reason."""
    graphs: dict[str, Callable[[], None]] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, contender in case.contenders.items():
        # Whatever fails, be it a kernel of vLLM's that this device lacks or one of ours, is a result.
        try:
            run = contender.build()
            error = distance(run(), contender.expected)
            if error <= contender.allowed:
                graphs[name], errors[name] = graphed(run), error
            else:
                failed[name] = f"off by {error:.1e}, allowed are {contender.allowed:.1e}"
        except Exception as problem:
            failed[name] = f"{type(problem).__name__}: {problem}"[:500]
    times = timed(graphs)
    share = {name: fastest(case.contenders[name].work, reached) / times[name][1] for name in times}
    return {
        "case": case.name,
        "microseconds_p20_median_p80": times,
        "of_ceiling": {name: round(value, 3) for name, value in share.items()},
        "relative_error": errors,
        "failed": failed,
        "targets": [
            {
                "call": target.call,
                "baseline": target.baseline,
                "at_least": target.at_least,
                "reached": round(times[target.baseline][1] / times[target.call][1], 3)
                if target.call in times and target.baseline in times
                else None,
            }
            for target in case.targets
        ],
    }


def _product(x: torch.Tensor, codes: torch.Tensor, books: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Exact `lut_gemm`, fp32 [M, N]; x: [C, M, K], codes: [N, K], books: [1, C, 16], scales: [N, groups]."""
    wide = scales.float().repeat_interleave(GROUP, 1)
    parts = (part.float() @ (book[codes.int()] * wide).t() for part, book in zip(x, books[0], strict=True))
    return sum(parts, torch.zeros((), device=x.device))


def _w4a16(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> Run:
    """Return vLLM's GEMM of fp16 x with weights (code - 8) * scale: Machete on Hopper, elsewhere Marlin."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils, quant_utils

    (n, k), kind = codes.shape, scalar_types.uint4b8
    packed = quant_utils.pack_quantized_values_into_int32(codes.t().int(), kind, packed_dim=0)
    by_group = scales.t().contiguous()
    if torch.cuda.get_device_capability() == (9, 0):
        weight = vllm_ops.machete_prepack_B(packed.t().contiguous().t(), x.dtype, kind, x.dtype)
        return partial(vllm_ops.machete_mm, x, weight, kind, b_group_scales=by_group, b_group_size=GROUP)
    weight = vllm_ops.gptq_marlin_repack(packed.contiguous(), k, n, 4)
    permuted = marlin_utils.marlin_permute_scales(by_group, k, n, GROUP)
    workspace = marlin_utils.marlin_make_workspace_new(x.device)
    nothing = (None, None, None)  # scales of activations, a global scale, zero points
    sizes = (workspace, kind, len(x), n, k)
    return partial(
        vllm_ops.marlin_gemm, x, None, weight, None, permuted, *nothing, *sizes, use_fp32_reduce=True
    )


def _lut_gemm(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    out: torch.Tensor = lut_gemm.lut_gemm(x, *rest)
    return out


def _axcore(x: torch.Tensor, maps: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _lut_gemm(torch.stack([activation.unary(x, table) for table in maps]), *rest, False)


def four_bit(rows: Sequence[int], at_least: Mapping[str, float]) -> Iterator[Case]:
    """Linear layers with 4-bit weights; at_least: speed of our calls relative to fp16."""
    classes = fpma_classes.classes((fpma.get("e2m1"),))
    maps, class_books = (
        activation_maps(classes.shifts).to(DEVICE),
        torch.from_numpy(classes.codebooks).to(DEVICE),
    )
    # Whole numbers, for int8 activations; to `lut_gemm` any table is like this one.
    books = torch.arange(-8.0, 8.0, device=DEVICE).view(1, 1, 16)
    for n, k in SHAPES:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=DEVICE)
        scales = (torch.rand(n, k // GROUP, device=DEVICE) * 0.01 + 0.005).half()
        packed, wide = lut_gemm.pack(codes), lut_gemm.pack_scales(scales)
        weight = (codes.half() - 8) * scales.repeat_interleave(GROUP, 1)
        for m in rows:
            x = torch.randn(m, k, device=DEVICE).half()
            exact, rest = _product(x[None], codes, books, scales), (wide, None, GROUP, n, None)
            mapped = torch.stack([activation.unary(x, table) for table in maps])
            by_classes = _product(mapped, codes, class_books, scales)
            ends, operations = 2 * m * (n + k), 2 * m * n * k
            whole, small = weight.nbytes + ends, packed.nbytes + wide.nbytes + ends
            fp16, int8 = Work(small, operations), Work(small, 0, operations)
            axcore = call(_axcore, x, maps, packed, class_books, *rest)
            yield Case(
                f"4-bit weights [{m}, {k}] x [{k}, {n}]",
                {
                    "fp16": Contender(
                        call(functional.linear, x, weight), exact, ROUNDED, Work(whole, operations)
                    ),
                    "vLLM W4A16": Contender(partial(_w4a16, x, codes, scales), exact, ROUNDED, fp16),
                    "lut_gemm": Contender(
                        call(_lut_gemm, x[None], packed, books, *rest, False), exact, ROUNDED, fp16
                    ),
                    "lut_gemm, int8": Contender(
                        call(_lut_gemm, x[None], packed, books, *rest, True), exact, INT8, int8
                    ),
                    "AxCore E2M1": Contender(
                        axcore, by_classes, ROUNDED, Work(small, len(maps) * operations)
                    ),
                },
                [Target(ours, "fp16", ratio) for ours, ratio in at_least.items()],
            )


def _w8a8(x: torch.Tensor, gemm: CutlassGemm) -> torch.Tensor:
    codes, scales, _ = vllm_ops.scaled_int8_quant(x)
    out: torch.Tensor = vllm_ops.cutlass_scaled_mm(codes, gemm.weight.t(), scales, gemm.scales, x.dtype)
    return out


def _mix8(
    x: torch.Tensor, gemm: CutlassGemm, index: torch.Tensor, keep: torch.Tensor, outliers: torch.Tensor
) -> torch.Tensor:
    codes, scales, side, _, _ = mixq.prepare(x, index, keep)
    return gemm(codes, scales, side, outliers, None)


def eight_bit(rows: Sequence[int], at_least: Mapping[str, float]) -> Iterator[Case]:
    """Linear layers of mix8, with OUTLIERS columns in fp16; at_least: its speed relative to others."""
    for n, k in SHAPES:
        weight = torch.randn(n, k, device=DEVICE).half()
        gemm = CutlassGemm(*quantize_rows(weight), weight.dtype)
        columns = torch.arange(OUTLIERS, device=DEVICE) * (k // OUTLIERS)
        outliers = gemm.columns(columns).contiguous()
        for m in rows:
            x = torch.randn(m, k, device=DEVICE).half()
            exact = x.float() @ weight.float().t()
            ends, operations = 2 * m * (n + k), 2 * m * n * k
            small = gemm.weight.nbytes + ends
            mixed = Work(small + outliers.nbytes, 2 * m * n * OUTLIERS, operations)
            mix8 = call(_mix8, x, gemm, *places(k, columns), outliers)
            yield Case(
                f"8-bit weights [{m}, {k}] x [{k}, {n}]",
                {
                    "fp16": Contender(
                        call(functional.linear, x, weight),
                        exact,
                        ROUNDED,
                        Work(weight.nbytes + ends, operations),
                    ),
                    "vLLM W8A8": Contender(call(_w8a8, x, gemm), exact, INT8, Work(small, 0, operations)),
                    "mix8": Contender(mix8, exact, INT8, mixed),
                },
                [Target("mix8", baseline, ratio) for baseline, ratio in at_least.items()],
            )


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *requests: torch.Tensor
) -> torch.Tensor:
    """Attention by vLLM's FlashAttention; key and value: [blocks, BLOCK, KV_HEADS, SIZE]."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    table, starts, lengths = requests
    out: torch.Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q=len(query) // len(lengths),
        cu_seqlens_q=starts,
        max_seqlen_k=table.shape[1] * BLOCK,
        seqused_k=lengths,
        softmax_scale=SIZE**-0.5,
        causal=True,
        block_table=table,
        fa_version=get_flash_attn_version(head_size=SIZE),
    )
    return out


def _attention(query: torch.Tensor, exp_table: torch.Tensor | None, *cache: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(query)
    attention.lut_attention(query, *cache, out, SIZE**-0.5, 0, exp_table, None, False)
    return out


def _four_bit_cache(
    name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *requests: torch.Tensor
) -> tuple[torch.Tensor, Run]:
    """The cache with these keys and values, and attention over it."""
    scheme = kv_formats.get(name)
    bounds, keys, offsets, values = (
        None if t is None else t.to(DEVICE) for t in vars(Tensors.of(scheme, query.dtype)).values()
    )
    layout = kv4.Layout(BLOCK, SIZE, scheme.by_unit)
    shape = (len(key) // BLOCK, KV_HEADS, BLOCK, layout.bytes_per_token)
    cache = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
    divisors = (scheme.keys.divisor, scheme.values.divisor)
    kv4.write(key, value, cache, torch.arange(len(key), device=DEVICE), bounds, *divisors, scheme.by_unit)
    count = len(requests[2])
    latest = value.unflatten(0, (count, -1))[:, -(len(query) // count) :].flatten(0, 1)

    def run() -> torch.Tensor:
        out = torch.empty_like(query)
        kv4_attention.kv4_attention(
            query, latest if scheme.by_unit else None, cache, *requests, out, keys, offsets, values,
            SIZE**-0.5, None, None, False,
        )  # fmt: skip
        return out

    return cache, run


def attend(count: int, queries: int, keys: int, at_least: Mapping[str, float]) -> Case:
    """Attention of the last `queries` (1, or all) of `count` requests' keys.

    at_least: speed of 4-bit caches relative to each baseline.
    """
    key, value = (torch.randn(count * keys, KV_HEADS, SIZE, device=DEVICE).half() for _ in "kv")
    query = torch.randn(count * queries, HEADS, SIZE, device=DEVICE).half()
    table = torch.arange(count * keys // BLOCK, dtype=torch.int32, device=DEVICE).view(count, -1)
    starts = torch.arange(count + 1, dtype=torch.int32, device=DEVICE) * queries
    requests = table, starts, torch.full((count,), keys, dtype=torch.int32, device=DEVICE)
    q, k, v = (t.float().unflatten(0, (count, -1)).transpose(1, 2) for t in (query, key, value))
    exact = functional.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)
    exact = exact.transpose(1, 2).flatten(0, 1)
    paged = torch.empty(count * keys // BLOCK, KV_HEADS, BLOCK, 2 * SIZE, device=DEVICE, dtype=query.dtype)
    attention.cache_write(key, value, paged, torch.arange(len(key), device=DEVICE))
    exp = luts.lut_table("softmax_exp", "nli-4", torch.float16).to(DEVICE)
    operations = 4 * count * HEADS * SIZE * (keys if queries == 1 else queries * (keys + 1) // 2)
    whole = Work(paged.nbytes + 2 * query.nbytes, operations)
    blocks = (t.view(-1, BLOCK, KV_HEADS, SIZE) for t in (key, value))
    contenders = {
        "FlashAttention": Contender(call(_flash, query, *blocks, *requests), exact, ROUNDED, whole),
        "16 bit, exact": Contender(call(_attention, query, None, paged, *requests), exact, ROUNDED, whole),
        "16 bit, nli-4": Contender(call(_attention, query, exp, paged, *requests), exact, TABLE, whole),
    }
    for name in ("nf4", "axcore"):
        cache, run = _four_bit_cache(name, query, key, value, *requests)
        work = Work(cache.nbytes + 2 * query.nbytes, operations)
        contenders[name] = Contender(call(run), exact, FOUR_BITS, work)
    targets = [Target(name, who, ratio) for who, ratio in at_least.items() for name in ("nf4", "axcore")]
    return Case(f"attention, {count} x {queries} queries, {keys} keys", contenders, targets)


def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(len(x), x.shape[1] // 2)
    torch.ops._C.silu_and_mul(out, x)
    return out


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    vllm_ops.rms_norm(out, x, weight, 1e-5)
    return out


def elementwise() -> Iterator[Case]:
    """Gated SiLU and RMS norm by tables."""
    silu = luts.lut_table("silu", "nli-4", torch.float16).to(DEVICE)
    rsqrt = luts.lut_table("rsqrt", "nli-4", torch.float16).to(DEVICE)
    inner, outer = WIDTHS
    for m in (1, 16, 4096):
        x = torch.randn(m, 2 * inner, device=DEVICE).half()
        gate, up = x.float().chunk(2, 1)
        exact, work = functional.silu(gate) * up, Work(3 * x.nbytes // 2)
        yield Case(
            f"gated SiLU [{m}, 2 x {inner}]",
            {
                "vLLM": Contender(call(_silu_and_mul, x), exact, ROUNDED, work),
                "act_and_mul": Contender(call(activation.act_and_mul, x, silu), exact, TABLE, work),
            },
        )
        x, weight = x[:, :outer].contiguous(), torch.randn(outer, device=DEVICE).half()
        exact, work = functional.rms_norm(x.float(), (outer,), weight.float(), 1e-5), Work(2 * x.nbytes)
        yield Case(
            f"RMS norm [{m}, {outer}]",
            {
                "vLLM": Contender(call(_rms_norm, x, weight), exact, ROUNDED, work),
                "lut_rms_norm": Contender(call(norm.rms_norm, x, weight, rsqrt, 1e-5), exact, TABLE, work),
            },
        )


def cases() -> Iterator[Case]:
    """Yield all cases, what has targets first, because the run may be cut off."""
    yield from four_bit(DECODE, {"lut_gemm": 3.0, "AxCore E2M1": 3.0})
    for count in (1, 8):
        yield attend(count, 1, CONTEXT, {"FlashAttention": 1.5, "16 bit, exact": 1.5})
    yield from four_bit(PREFILL, {"lut_gemm": 0.8, "AxCore E2M1": 0.45})
    yield from eight_bit(PREFILL, {"fp16": 1.4, "vLLM W8A8": 0.95})
    yield from elementwise()
    yield attend(1, LENGTH, LENGTH, {})
    yield from eight_bit(DECODE, {})


def main() -> None:
    """Print the device's ceilings and then every case, a line of JSON each."""
    kernels = library.load()
    if not kernels.startswith("triton"):
        raise UserError(f"the kernels are {kernels}, not Triton's; unset LUTSERVE_BACKEND, install triton")
    torch.manual_seed(0)
    reached = ceilings()
    print(json.dumps({"kernels": kernels, "ceilings": reached}), flush=True)
    for case in cases():
        print(json.dumps(measure(case, reached)), flush=True)


if __name__ == "__main__":
    main()
