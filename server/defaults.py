"""Defaults for vLLM's server: what a careful operator would set, each overridden by the user's own flag."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lutserve.errors import UserError

GIB = 2**30


def given(flags: Sequence[str], *names: str) -> bool:
    """Whether the user passed one of the flags, as `--x`, `--x=1` or with underscores."""
    keys = {flag.split("=", 1)[0].replace("_", "-") for flag in flags if flag.startswith("-")}
    return any(name in keys for name in names)


def value_of(flags: Sequence[str], *names: str) -> str | None:
    """Return the value the user gave a flag under any of its names, in either form; the last one counts."""
    found = None
    for position, flag in enumerate(flags):
        key, equals, value = flag.partition("=")
        if key.replace("_", "-") in names:
            found = value if equals else next(iter(flags[position + 1 :]), None)
    return found


def number_of(flags: Sequence[str], *names: str, default: int) -> int:
    """Return a flag's value as a number; UserError if it is none."""
    value = value_of(flags, *names)
    if value is None:
        return default
    if not value.isdecimal():
        raise UserError(f"{names[0]} {value}: give a whole number")
    return int(value)


def available_memory() -> int:
    """Return the bytes of memory that can be taken without swapping (Linux's MemAvailable)."""
    with open("/proc/meminfo") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line")


def kv_cache_bytes(free: int) -> int:
    """Return the KV cache size for `free` bytes of memory: a quarter, at least 1 GiB.

    Weights, their 16-bit originals while they are quantised, and activations live in the rest.
    """
    return max(free // 4, GIB)


def cpu_flags(flags: Sequence[str]) -> list[str]:
    """Return the vLLM flags to add on a CPU."""
    extra: list[str] = []
    if not given(flags, "--dtype"):
        # fp16 GEMMs run at fp32 speed on almost every CPU; bf16 has AMX or AVX512-BF16.
        extra += ["--dtype", "bfloat16"]
    if not given(flags, "--kv-cache-memory-bytes", "--gpu-memory-utilization") and not os.environ.get(
        "VLLM_CPU_KVCACHE_SPACE"
    ):
        # Without it vLLM asks for 92 % of all memory and refuses to start when that is not free.
        extra += ["--kv-cache-memory-bytes", str(kv_cache_bytes(available_memory()))]
    if not given(flags, "--enforce-eager", "--no-enforce-eager", "-O", "--compilation-config", "-cc"):
        # Compiling costs minutes at every start; `--no-enforce-eager` asks for it.
        extra += ["--enforce-eager"]
    return extra


def memory_nodes() -> int:
    """Return how many NUMA nodes this machine has."""
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))


def cpu_binding(cores: Sequence[int], parts: int, nodes: int) -> str | None:
    """Return the cores of each tensor-parallel worker as vLLM reads them ("0,1|2,3"); None: it knows itself.

    vLLM gives each worker a NUMA node of its own and refuses to start with more workers than nodes. Then the
    cores are dealt out in equal runs. UserError for more workers than cores.
    """
    if parts <= nodes:
        return None
    if parts > len(cores):
        raise UserError(f"--tensor-parallel-size {parts}: this process may use {len(cores)} cores")
    share = len(cores) // parts
    return "|".join(",".join(map(str, cores[i * share : (i + 1) * share])) for i in range(parts))


def cpu_environment(flags: Sequence[str]) -> dict[str, str]:
    """Return the environment variables to set on a CPU where the user has not set them."""
    environment: dict[str, str] = {}
    cores = len(os.sched_getaffinity(0))
    parts = number_of(flags, "--tensor-parallel-size", "-tp", default=1)
    if binding := cpu_binding(sorted(os.sched_getaffinity(0)), parts, memory_nodes()):
        environment["VLLM_CPU_OMP_THREADS_BIND"] = binding
    if cores <= 4 and parts == 1:
        # The default layout has a scheduler process that spins on shared memory while the worker
        # computes: a whole core lost. On few cores the worker lives inside the scheduler instead.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        environment["OMP_NUM_THREADS"] = str(cores)
        # Idle threads wait actively for a fraction of a millisecond, which covers the gaps inside a step,
        # and then sleep: spinning on (libgomp's default) starves the API server, and a neighbour on the
        # same cores then costs us most of our speed instead of its share.
        environment["GOMP_SPINCOUNT"] = "50000"
    if not given(flags, "--no-enforce-eager", "-O", "--compilation-config", "-cc"):
        # vLLM's logprobs code compiles itself at its first use even in eager mode: half a minute for the
        # first request that asks, and the end of the engine where there is no C++ compiler.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment
