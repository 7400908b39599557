"""Compile the C++ kernels at first use and keep them: one shared library per instruction-set level.

The library lies in `<cache>/kernels/<key>/liblutserve.so`; the key is a digest of everything that shapes the
result (sources, compiler and its version, options, torch), so no build is ever out of date. Threads come
from torch's own pool through its stable ABI: nothing links an OpenMP runtime of its own.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

from lutserve import env
from lutserve.kernels.isa import Level, detect

SOURCES = Path(__file__).parent / "cpu"
_LIMIT = 600  # seconds; a build takes a few, so this only ends a compiler that hangs

# Contraction would fuse a product and a sum into one rounding on some levels and not on others.
_OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden")
# The oldest torch with everything used here in its stable ABI: 2.10, whose parallel_for is the newest part.
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


class BuildError(Exception):
    """The kernels cannot be compiled on this machine; the message says why."""


def build(progress: Callable[[str], None], level: Level | None = None) -> Path:
    """Path of the shared library for `level` (default: `isa.detect()`), compiled now if it is not cached.

    progress: receives one line before and one after a compilation, nothing if there is none.
    Safe to call from several processes at once: one compiles, the others wait for it.
    BuildError where there is no compiler, it fails, or the cache cannot be written.
    """
    level = level or detect()
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    library = env.cache_dir() / "kernels" / _key(compiler, level) / "liblutserve.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_name("lock")):
            if not library.exists():
                _compile(compiler, level, library, progress)
    except OSError as error:
        raise BuildError(f"cannot write the kernel cache {library.parent}: {error}") from error
    return library


def _compile(compiler: list[str], level: Level, library: Path, progress: Callable[[str], None]) -> None:
    """Compile into a temporary name and rename, so that no one ever loads half a library."""
    progress(f"compiling the C++ kernels for {level.name} with {shlex.join(compiler)} (once, half a minute)")
    start = time.monotonic()
    partial = library.with_name(f"partial-{os.getpid()}.so")
    lib = Path(torch.__file__).parent / "lib"
    limit = os.environ.get("MAX_JOBS", "")
    jobs = max(1, int(limit)) if limit.isdecimal() else len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        # The largest first: it takes the longest, and the others fit in beside it.
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda source: source.stat().st_size, reverse=True)
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        flags = _flags(level)
        commands = [[*compiler, *flags, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
        list(pool.map(_run, commands))
        _run([*compiler, *flags, "-shared", *objects, "-o", str(partial), f"-L{lib}", "-ltorch_cpu"])
    partial.replace(library)
    progress(f"compiled the C++ kernels in {time.monotonic() - start:.0f} s: {library}")


def _flags(level: Level) -> list[str]:
    """Options that shape the code."""
    include = Path(torch.__file__).parent / "include"
    return [*_OPTIONS, *level.flags, _STABLE_ABI, f"-I{include}"]


def _key(compiler: list[str], level: Level) -> str:
    """Sixteen hexadecimal digits that change with anything that could change the library."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = _run([*compiler, "--version"])
    for item in (*_flags(level), *compiler, version, str(torch.__version__), platform.machine()):
        digest.update(item.encode() + b"\0")
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    """Standard output of a compiler command; BuildError with the compiler's last words if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT)
    except OSError as error:
        raise BuildError(
            f"cannot run the C++ compiler {command[0]} ({error.strerror}); is g++ installed?"
        ) from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"the C++ compiler {command[0]} did not end within {_LIMIT} s") from None
    if done.returncode:
        raise BuildError(f"the C++ compiler {command[0]} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout
