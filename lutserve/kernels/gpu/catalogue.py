"""Every Triton kernel in the form in which it is served, and what it may use of a GPU.

The tests compile each of these for each architecture and hold it to its budget; the table in docs/gpu.md is
made from the same list (`python -m lutserve.kernels.gpu.aot`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from lutserve.kernels import kv4
from lutserve.kernels.gpu import (
    activation,
    attention,
    attention_steps,
    axcore,
    int8,
    kv4_attention,
    lut_gemm,
    mixq,
    norm,
)
from lutserve.kernels.gpu import kv4 as kv4_write


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel with one set of constants.

    name: as the docs call it. function: what `triton.jit` returned. arguments: type of every argument that is
    no constant, in any order, `*fp16` for a pointer, `:16` after a type for a multiple of 16 (of pointers:
    bytes), as the JIT finds them for ordinary tensors. registers: the most a thread may use. shared: the most
    KiB of shared memory a block may use. stack: bytes that a call of the division's slow path may take, which
    are no spills. mma: the instructions of tensor cores are there (or must not be).
    fusion: products and sums may be contracted; bit-exact kernels say False. spills: the most loads and
    stores of spilled registers.
    """

    name: str
    function: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    registers: int
    shared: int = 0
    stack: int = 0
    mma: bool = False
    warps: int = 4
    stages: int = 3
    fusion: bool = True
    spills: int = 0
    architectures: tuple[int, ...] = (80, 90)


def _pointers(kind: str, *names: str) -> dict[str, str]:
    """Aligned pointers of one type."""
    return {f"{name}_ptr": f"*{kind}:16" for name in names}


def _integers(*names: str) -> dict[str, str]:
    """Integers that are multiples of 16."""
    return dict.fromkeys(names, "i32:16")


def _attention(
    dtype: str, rows: int, splits: int, registers: int, shared: int, exact: bool = False
) -> Kernel:
    """Two-pass attention at head size 128, four heads a kv head; with splits, the launch that sums."""
    tables = {"recip_ptr": None} | ({"exp_ptr": None} if exact else {})
    kind = "exact" if exact else "table"
    return Kernel(
        f"lut_attention, {dtype}, {rows} rows, {kind}{', split' if splits > 1 else ''}",
        attention.lut_attention_kernel,
        {
            **_pointers(dtype, "query", "out"),
            **({} if exact else _pointers("fp16", "exp")),
            **_pointers("i32" if dtype == "bf16" else "fp16", "cache"),
            **_pointers("i32", "table", "query_start", "lengths"),
            **_pointers("fp32", "maxima", "totals", "sums"),
            **_integers("table_stride", "query_stride", "head_stride", "block_stride", "kv_head_stride"),
            **{"requests": "i32", "tokens": "i32", "heads": "i32:16", "scale": "fp32", "window": "i32"},
        },
        tables
        | {"MAXIMA": splits == 1, "SUMS": True, "SPLITS": splits, "WINDOW": False, "FP16_SUM": False}
        | {"PAIRED": dtype == "bf16", "GROUP": 4, "BLOCK": 16, "SIZE": 128, "WIDTH": 128}
        | {"ROWS": rows, "TILE": 64},
        registers,
        shared,
        mma=True,
        warps=4 if rows == 16 else 8,
        stages=2,
        fusion=False,
    )


def _kv4(dtype: str, by_unit: bool, rows: int, splits: int, registers: int, shared: int) -> Kernel:
    """Attention over a 4-bit cache at head size 128: nf4, or AxCore's by unit with two classes."""
    layout = kv4.Layout(1152 if by_unit else 16, 128, by_unit)
    optional = _pointers(dtype, "value") | _pointers("i32", "offsets") if by_unit else {}
    optional |= _pointers("fp16", "exp")
    kind = "axcore" if by_unit else "nf4"
    return Kernel(
        f"kv4_attention, {dtype}, {rows} rows, {kind}{', split' if splits > 1 else ''}",
        kv4_attention.kv4_attention_kernel,
        {
            **_pointers(dtype, "query", "out", "key_tables", "value_table"),
            **_pointers("u8", "cache"),
            **_pointers("i32", "table", "query_start", "lengths"),
            **_pointers("fp32", "maxima", "totals", "sums"),
            **_integers("table_stride", "query_stride", "head_stride", "block_stride", "kv_head_stride"),
            **_integers("value_stride", "value_head_stride"),
            **{"requests": "i32", "tokens": "i32", "heads": "i32:16", "scale": "fp32"},
            **optional,
        },
        {
            **{name: None for name in ("value_ptr", "offsets_ptr", "recip_ptr") if name not in optional},
            **{"MAXIMA": splits == 1, "SUMS": True, "SPLITS": splits, "FP16_SUM": False},
            **{"CLASSES": 2 if by_unit else 1, "GROUP": 4, "BLOCK": layout.block_size, "SIZE": 128},
            **{"GROUPS": layout.groups, "VALUE_SCALES": layout.value_scales, "TAIL": layout.tail},
            "ROWS": rows,
        },
        registers,
        shared,
        mma=True,
        warps=8,
        stages=2,
        fusion=False,
    )


def _int8(rows: int, columns: int, registers: int, shared: int) -> Kernel:
    """MixQ's int8 linear layer with its outlier columns."""
    return Kernel(
        f"int8_linear_rows, {rows} rows",
        int8.int8_linear_rows_kernel,
        {
            **_pointers("i8", "codes", "weight"),
            **_pointers("fp32", "scales", "weight_scales"),
            **_pointers("bf16", "side", "outliers", "bias", "out"),
            **_integers("n", "k", "slots"),
            "m": "i32",
        },
        {"ROWS": rows, "COLUMNS": columns, "STEP": 128, "SLOTS": 32},
        registers,
        shared,
        mma=True,
        stages=4,
        fusion=False,
    )


def _kv4_write(by_unit: bool, registers: int, shared: int) -> Kernel:
    """The writer of a 4-bit cache at head size 128."""
    layout = kv4.Layout(1152 if by_unit else 16, 128, by_unit)
    return Kernel(
        f"kv4_write, {'axcore' if by_unit else 'nf4'}",
        kv4_write.write_kernel,
        {
            **_pointers("bf16", "key", "value"),
            **_pointers("u8", "cache"),
            **_pointers("i64", "slots"),
            **_pointers("fp32", "bounds"),
            **_integers("key_stride", "key_head_stride", "value_stride", "value_head_stride"),
            **_integers("block_stride", "head_stride"),
            **{"key_divisor": "fp32", "value_divisor": "fp32"},
        },
        {
            **{"BY_UNIT": by_unit, "BLOCK": layout.block_size, "SIZE": 128, "GROUPS": layout.groups},
            **{"VALUE_SCALES": layout.value_scales, "TAIL": layout.tail},
        },
        registers,
        shared,
        stack=8,
        warps=4 if by_unit else 1,
        fusion=False,
    )


def _gemm(
    name: str,
    dtype: str,
    registers: int,
    shared: int,
    warps: int,
    stages: int,
    spills: int = 0,
    **constants: Any,
) -> Kernel:
    """One form of the look-up GEMM, with 16-bit activations of `dtype` or int8 ones, without bias."""
    int8 = dtype == "i8"
    out = "fp32" if constants["SPLITS"] > 1 else "fp16" if int8 else dtype
    optional = {"x_scales": "*fp32:16"} if int8 else {}
    if constants["TYPED"]:
        optional = {"tables": "*i32:16", "types": "*u8:16"}
    return Kernel(
        name,
        lut_gemm.gemm_kernel,
        {
            **{"x": f"*{dtype}:16", "packed": "*i32:16", "codebooks": "*fp32:16", "scales": "*fp32:16"},
            **{"out": f"*{out}:16", "m_size": "i32", "n_size": "i32:16", "k_size": "i32:16"},
            **{"group_size": "i32:16", "groups": "i32:16", "class_stride": "i32:16", "row_stride": "i32:16"},
            **optional,
        },
        {
            **{name: None for name in ("x_scales", "tables", "types", "bias") if name not in optional},
            **{"INT8": int8, "BIASED": False, "WHOLE": True},
            **{"dtype": {"fp16": tl.float16, "bf16": tl.bfloat16, "i8": tl.int8}[dtype]},
            **constants,
        },
        registers,
        shared,
        mma=True,
        warps=warps,
        stages=stages,
        spills=spills,
        stack=8 * spills,
    )


_SMALL = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "SPLITS": 4}
_LARGE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SPLITS": 1}
_CLASSES = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLITS": 1}

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
    Kernel(
        "mixq_prepare",
        mixq.prepare_kernel,
        {
            **_pointers("bf16", "x", "side"),
            **_pointers("i32", "index", "keep"),
            **_pointers("i8", "codes"),
            **_pointers("fp32", "scales", "ratios", "worst"),
            **_integers("x_stride", "k", "slots"),
        },
        {"SLOTS": 128, "BLOCK": 2048},
        registers=96,
        shared=16,
        fusion=False,
    ),
    _int8(16, 32, registers=96, shared=48),
    _int8(64, 64, registers=192, shared=80),
    Kernel(
        "lut_rms_norm with residual",
        norm.norm_kernel,
        {
            **_pointers("bf16", "x", "residual", "weight", "out", "sum"),
            **_pointers("fp16", "table"),
            **_integers("width"),
            "eps": "fp32",
        },
        {"bias_ptr": None, "CENTRED": False, "BLOCK": 1024},
        registers=96,
        shared=16,
        warps=1,
        fusion=False,
    ),
    Kernel(
        "cache_write",
        attention.cache_write_kernel,
        {
            **_pointers("bf16", "key", "value", "cache"),
            **_pointers("i64", "slots"),
            **_integers("key_stride", "key_head_stride", "value_stride", "value_head_stride"),
            **_integers("block_stride", "head_stride"),
        },
        {"PAIRED": True, "BLOCK": 16, "SIZE": 128, "WIDTH": 128},
        registers=64,
        shared=1,
        warps=1,
    ),
    _attention("bf16", 16, 8, registers=255, shared=64),
    _attention("fp16", 64, 1, registers=255, shared=100),
    Kernel(
        "attention, parts combined",
        attention_steps.combine_kernel,
        {
            **_pointers("fp32", "sums", "totals"),
            **_pointers("i32", "query_start"),
            **_pointers("bf16", "out"),
            **{"requests": "i32", "tokens": "i32", "heads": "i32:16"},
        },
        {"recip_ptr": None, "SIZE": 128, "WIDTH": 128, "SPLITS": 8, "FP16_SUM": False},
        registers=64,
        shared=16,
        warps=1,
        fusion=False,
    ),
    _kv4_write(True, registers=128, shared=16),
    _kv4("bf16", False, 16, 8, registers=160, shared=32),
    _kv4("bf16", True, 16, 8, registers=255, shared=32),
    _gemm("lut_gemm, 16 rows, fp16", "fp16", 255, 100, 4, 4, CLASSES=1, TYPED=False, **_SMALL),
    _gemm("lut_gemm, 16 rows, int8", "i8", 255, 100, 4, 4, CLASSES=1, TYPED=False, **_SMALL),
    _gemm("lut_gemm, 16 rows, fp16, 2 classes", "fp16", 255, 100, 4, 4, CLASSES=2, TYPED=False, **_SMALL),
    _gemm("lut_gemm, 128 rows, bf16", "bf16", 255, 160, 8, 3, CLASSES=1, TYPED=False, **_LARGE),
    _gemm(
        "lut_gemm, 32 rows, fp16, 7 classes",
        "fp16",
        255,
        160,
        4,
        1,
        spills=32,
        CLASSES=7,
        TYPED=True,
        **_CLASSES,
    ),
    Kernel(
        "axcore_strict",
        axcore.strict_kernel,
        {
            **{"x": "*fp16:16", "packed": "*i32:16", "scales": "*fp16:16", "products": "*fp16:16"},
            **{"types": "*u8:16", "out": "*fp16:16", "m_size": "i32", "n_size": "i32:16", "octets": "i32:16"},
            **{"group_octets": "i32:16", "row_stride": "i32:16"},
        },
        {"bias": None, "TYPED": True, "FPMA": False, "BIASED": False, "BLOCK_M": 16, "BLOCK_N": 64},
        registers=255,
        fusion=False,
    ),
    Kernel(
        "fpma_linear",
        axcore.uniform_kernel,
        {
            **{"x": "*fp16:16", "weight": "*fp16:16", "out": "*fp16:16", "m_size": "i32", "n_size": "i32:16"},
            **{"k_size": "i32:16", "row_stride": "i32:16", "compensation": "i32", "tile": "i32:16"},
        },
        {"bias": None, "BIASED": False, "BLOCK_M": 16, "BLOCK_N": 64},
        registers=255,
        shared=4,
        fusion=False,
    ),
)
