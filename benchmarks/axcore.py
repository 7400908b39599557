"""AxCore's layers as operators: strict ones against the published algorithm as a plain C loop, fast ones
against layers of a 4-bit format and of 16 bit.

    python -m lutserve.benchmarks.axcore [-o out/axcore] [--threads 1]

The loop is compiled here with -O3, once for any x86-64 and once for this CPU, whose fp16 conversions it may
then use. Timed in alternation; loop and strict operator must agree to the bit, and fast ones with the weight
that they stand for. Weights of fast layers are met in turn, so none is cached. Writes one JSON record.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lutserve.benchmarks.kernels import compare
from lutserve.benchmarks.record import report
from lutserve.kernels import activation, axcore, axcore_fast, linear16, lut_gemm
from lutserve.kernels.axcore_reference import BLOCK, activation_maps, product_tables
from lutserve.luts import fpma, fpma_classes
from lutserve.quant_methods.axcore import by_addition
from lutserve.quantizers.fp4 import Fp4Weight

GROUP = 64
#: M, N, K of strict layers
SHAPES = ((1, 2048, 2048), (8, 1024, 1024))
#: N, K of fast layers, how many, and M
FAST, WEIGHTS, ROWS = (2048, 2048), 8, (1, 256)
LOOP = r"""
#include <string.h>
static const int kOffset[3][8] = {{0}, {0, -1024, 0, 512, 1024, 1536, 2048, 2560},
                                  {0, -1024, 0, 512, 1024, 1280, 1536, 1792}};
static const int kC[3] = {0, 43, 54};
static const _Float16 kPower[8] = {0, .25, .5, 1, 2, 4, 8, 16};

static _Float16 product(unsigned short a, unsigned code, int type) {
  _Float16 value;
  const unsigned sign = (a & 0x8000) ^ (code & 8) << 12;
  unsigned short bits = 0;
  if (type == 0) {
    memcpy(&value, &a, 2);
    value *= kPower[code & 7];
    return code & 8 ? -value : value;
  }
  if ((a & 0x7FFF) && (code & 7)) {
    int n = (a & 0x7FFF) + kOffset[type][code & 7] + kC[type];
    bits = (n < 0 ? 0 : n & 0x7FFF) | sign;
  }
  memcpy(&value, &bits, 2);
  return value;
}

void layer(const unsigned short* x, const unsigned char* codes, const _Float16* scales,
           const unsigned char* types, _Float16* out, long m, long n, long k, long g) {
  for (long i = 0; i < m; ++i) {
    for (long j = 0; j < n; ++j) {
      float total = 0;
      for (long b = 0; b < k / g; ++b) {
        const int type = types[j / 64 * (k / g) + b];
        _Float16 sum = 0;
        for (long c = b * g; c < (b + 1) * g; ++c) sum += product(x[i * k + c], codes[j * k + c], type);
        total += (float)(_Float16)(sum * scales[j * (k / g) + b]);
      }
      out[i * n + j] = total;
    }
  }
}
"""


def compiled(folder: Path, *flags: str) -> Any:
    """The loop as a function, compiled with -O3 and `flags`."""
    source, library = folder / "loop.c", folder / f"loop{len(flags)}.so"
    source.write_text(LOOP)
    command = ["gcc", "-O3", "-ffp-contract=off", *flags, "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library)).layer


def run_loop(
    layer: Any, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, types: torch.Tensor
) -> torch.Tensor:
    """Call the compiled loop."""
    out = torch.empty(len(x), len(codes), dtype=torch.float16)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, codes, scales, types, out))
    sizes = (ctypes.c_long(size) for size in (len(x), *codes.shape, GROUP))
    layer(*pointers, *sizes)
    return out


Call = Callable[[torch.Tensor], torch.Tensor]


def fast_layer(codes: torch.Tensor, scales: torch.Tensor, types: torch.Tensor) -> Call:
    """AxCore's layer of a bf16 model, by the operator that this machine is served with."""
    n, packed, wide = len(codes), lut_gemm.pack(codes), lut_gemm.pack_scales(scales)
    panels = types.repeat_interleave(BLOCK // lut_gemm.COLUMNS, 0)
    used, places = panels.unique(return_inverse=True)
    formats = tuple(fpma.FP4[kind] for kind in used.tolist())
    kinds = places.to(torch.uint8)
    if by_addition("bfloat16"):
        added = torch.from_numpy(fpma_classes.addends(formats, dtype="bfloat16"))

        def by_additions(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = axcore_fast.axcore_fast(x, packed, added, wide, kinds, GROUP, n, None)
            return out

        return by_additions
    classes = fpma_classes.classes(formats, dtype="bfloat16")
    maps, books = activation_maps(classes.shifts, "bfloat16"), torch.from_numpy(classes.codebooks)

    def by_classes(x: torch.Tensor) -> torch.Tensor:
        mapped = torch.stack([activation.unary(x, m) for m in maps])
        out: torch.Tensor = lut_gemm.lut_gemm(mapped, packed, books, wide, kinds, GROUP, n, None, False)
        return out

    return by_classes


def fast_layers(generator: torch.Generator, n: int, k: int) -> dict[str, list[Call]]:
    """Layers of one shape by name; those of one place have one weight, up to rounding to bf16."""
    layers: dict[str, list[Call]] = {}
    for _ in range(WEIGHTS):
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
        scales = (torch.rand(n, k // GROUP, generator=generator) * 0.05).half()
        types = torch.ones(n // BLOCK, k // GROUP, dtype=torch.uint8)
        mixed = torch.randint(0, 3, types.shape, dtype=torch.uint8, generator=generator)
        weight = Fp4Weight(codes, scales, types, GROUP).dequantize().bfloat16()
        table, packed = torch.tensor(fpma.get("e2m1").values)[None, None], lut_gemm.pack(codes)
        ours, wide = linear16.pack(weight), lut_gemm.pack_scales(scales)
        layers.setdefault("torch bf16", []).append(partial(_linear, weight))
        layers.setdefault("linear16", []).append(partial(_linear16, ours, n))
        layers.setdefault("4-bit table", []).append(partial(_table, packed, table, wide, n))
        layers.setdefault("axcore, E2M1", []).append(fast_layer(codes, scales, types))
        layers.setdefault("axcore, three formats", []).append(fast_layer(codes, scales, mixed))
    return layers


def _linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight)


def _linear16(weight: torch.Tensor, n: int, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = linear16.linear16(x, weight, n, None)
    return out


def _table(
    codes: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, n: int, x: torch.Tensor
) -> torch.Tensor:
    out: torch.Tensor = lut_gemm.lut_gemm(x[None], codes, table, scales, None, GROUP, n, None, False)
    return out


def _in_turn(layers: Sequence[Call], x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(0)
    for layer in layers:
        out = layer(x)
    return out


def fast_cases() -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Yield the name and the timings of fast layers."""
    generator = torch.Generator().manual_seed(0)
    n, k = FAST
    layers = fast_layers(generator, n, k)
    for m in ROWS:
        x = torch.randn(m, k, generator=generator).bfloat16()
        exact = layers["torch bf16"][0](x).float()
        for name in ("linear16", "4-bit table", "axcore, E2M1"):
            error = ((layers[name][0](x).float() - exact).norm() / exact.norm()).item()
            if error > 0.06:
                raise RuntimeError(f"{name} is off by {error:.2e}")
        calls = {name: partial(_in_turn, some, x) for name, some in layers.items()}
        yield f"{WEIGHTS} fast layers [{m}, {k}] x [{k}, {n}] bf16", compare(calls, float("inf"))


def cases() -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Yield the name and the timings of each comparison."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        loops = {"loop": compiled(Path(folder)), "loop, this CPU": compiled(Path(folder), "-march=native")}
    for m, n, k in SHAPES:
        x = torch.randn(m, k, generator=generator).half()
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
        scales = (torch.rand(n, k // GROUP, generator=generator) * 0.05).half()
        for name, kinds in (("E2M1", (1,)), ("three formats", (0, 1, 2))):
            drawn = torch.randint(0, len(kinds), (n // BLOCK, k // GROUP), generator=generator)
            types = torch.tensor(kinds, dtype=torch.uint8)[drawn]
            calls: dict[str, Any] = {
                who: partial(run_loop, loop, x, codes, scales, types) for who, loop in loops.items()
            }
            panels, packed = types.repeat_interleave(BLOCK // lut_gemm.COLUMNS, 0), lut_gemm.pack(codes)
            ours = (x, packed, axcore.pack_scales(scales), panels, product_tables(), GROUP, n, False, None)
            calls["strict"] = partial(axcore.axcore_strict, *ours)
            if any(not torch.equal(call(), calls["strict"]()) for call in calls.values()):
                raise RuntimeError("the loop and the strict operator differ")
            yield f"strict [{m}, {k}] x [{k}, {n}], {name}", compare(calls, 0.0)
    yield from fast_cases()


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the record.")] = Path(
        "out/axcore"
    ),
    threads: Annotated[int, typer.Option(help="Threads to use; the loops have one.")] = 1,
) -> None:
    """Time everything, write the record, print the table."""
    report("axcore", cases(), output, threads)


if __name__ == "__main__":
    typer.run(main)
