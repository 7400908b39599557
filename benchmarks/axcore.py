"""AxCore's layers: the published algorithm as a plain C loop against our strict and our fast operator.

    python -m lutserve.benchmarks.axcore [-o out/axcore] [--threads 1]

The loop is compiled here with -O3, once for any x86-64 and once for this CPU, whose fp16 conversions it may
then use. Timed in alternation; loop and strict operator must agree to the bit. Writes one JSON record.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lutserve.benchmarks.kernels import compare
from lutserve.benchmarks.record import report
from lutserve.kernels import activation, axcore, lut_gemm
from lutserve.kernels.axcore_reference import BLOCK, activation_maps, product_tables
from lutserve.luts import fpma, fpma_classes

GROUP = 64
#: M, N, K
SHAPES = ((1, 2048, 2048), (8, 1024, 1024))
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


def run_fast(x: torch.Tensor, maps: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Map the activations and multiply by classes."""
    out: torch.Tensor = lut_gemm.lut_gemm(torch.stack([activation.unary(x, m) for m in maps]), *rest)
    return out


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
            formats = tuple(fpma.FP4[kind] for kind in kinds)
            classes = fpma_classes.classes(formats)
            books, places = torch.from_numpy(classes.codebooks), (panels - kinds[0]).contiguous()
            maps, wide = activation_maps(classes.shifts), lut_gemm.pack_scales(scales)
            calls["fast"] = partial(run_fast, x, maps, packed, books, wide, places, GROUP, n, None, False)
            yield f"[{m}, {k}] x [{k}, {n}], {name}", compare(calls, 5e-3)


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
