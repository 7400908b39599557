"""Instruction-set levels for the C++ kernels: what the CPU must have and what the compiler is told."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lutserve import env
from lutserve.errors import UserError


@dataclass(frozen=True)
class Level:
    """One instruction-set level.

    name: as in LUTSERVE_ISA. needs: CPU flags, spelt as in /proc/cpuinfo. flags: options for g++.
    """

    name: str
    needs: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


PORTABLE = Level("portable")
AVX2 = Level("avx2", ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm"), ("-march=x86-64-v3",))
AVX512 = Level(
    "avx512",
    (*AVX2.needs, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    ("-march=x86-64-v4",),
)
AVX512_BF16 = Level(
    "avx512_bf16",
    (*AVX512.needs, "avx512_bf16", "avx512_vnni"),
    (*AVX512.flags, "-mavx512bf16", "-mavx512vnni"),
)
AMX = Level(
    "amx",
    (*AVX512_BF16.needs, "amx_tile", "amx_int8", "amx_bf16"),
    (*AVX512_BF16.flags, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
)

LEVELS: dict[str, Level] = {level.name: level for level in (AMX, AVX512_BF16, AVX512, AVX2, PORTABLE)}
"""Best first. Every level includes the one after it."""


@cache
def cpu_flags() -> frozenset[str]:
    """Feature flags of this CPU; empty where /proc/cpuinfo is absent or has no such line (ARM)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def missing(level: Level) -> tuple[str, ...]:
    """CPU flags that `level` needs and this machine lacks."""
    return tuple(flag for flag in level.needs if flag not in cpu_flags())


def slow_16_bit() -> tuple[str, ...]:
    """Names of the 16-bit dtypes that this x86 CPU multiplies only by way of fp32; our kernel needs AVX2.

    oneDNN has no packed GEMM for them, or one that emulates.
    """
    flags = cpu_flags()
    if missing(AVX2):
        return ()
    slow = [] if flags & {"avx512_fp16", "amx_fp16"} else ["float16"]
    return (*slow, "bfloat16") if missing(AVX512) else tuple(slow)


def detect() -> Level:
    """Best level of this machine, or the one that LUTSERVE_ISA names.

    UserError if LUTSERVE_ISA names no level, or one that this CPU cannot run.
    """
    name = env.choice("LUTSERVE_ISA", ("auto", *LEVELS), "auto")
    if name == "auto":
        return next(level for level in LEVELS.values() if not missing(level))
    level = LEVELS[name]
    if lacking := missing(level):
        best = next(level.name for level in LEVELS.values() if not missing(level))
        raise UserError(
            f"LUTSERVE_ISA={name}: this CPU lacks {', '.join(lacking)}; the best level here is {best}"
        )
    return level
