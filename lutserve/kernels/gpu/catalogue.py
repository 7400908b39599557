"""Every Triton kernel in the form in which it is served, and what it may use of a GPU.

The tests compile each of these for each architecture and hold it to its budget; the table in docs/gpu.md is
made from the same list (`python -m lutserve.kernels.gpu.aot`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lutserve.kernels.gpu import activation


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel with one set of constants.

    name: as the docs call it. function: what `triton.jit` returned. arguments: type of every argument that is
    no constant, in any order, `*fp16` for a pointer, `:16` after a type for a multiple of 16 (of pointers:
    bytes), as the JIT finds them for ordinary tensors. registers: the most a thread may use. shared: the most
    KiB of shared memory a block may use. mma: the instructions of tensor cores are there (or must not be).
    fusion: products and sums may be contracted; bit-exact kernels say False.
    """

    name: str
    function: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    registers: int
    shared: int = 0
    mma: bool = False
    warps: int = 4
    stages: int = 3
    fusion: bool = True
    architectures: tuple[int, ...] = (80, 90)


KERNELS = (
    Kernel(
        "act_and_mul, fp16",
        activation.act_and_mul_kernel,
        {"x": "*fp16:16", "table": "*fp16:16", "out": "*fp16:16", "width": "i32:16", "row_stride": "i32:16"},
        {"BLOCK": 1024},
        registers=40,
    ),
    Kernel(
        "act_and_mul, bf16",
        activation.act_and_mul_kernel,
        {"x": "*bf16:16", "table": "*bf16:16", "out": "*bf16:16", "width": "i32:16", "row_stride": "i32:16"},
        {"BLOCK": 1024},
        registers=40,
    ),
    Kernel(
        "lut_unary",
        activation.unary_kernel,
        {"x": "*fp16:16", "table": "*fp16:16", "out": "*fp16:16", "length": "i32:16"},
        {"BLOCK": 1024},
        registers=40,
    ),
)
