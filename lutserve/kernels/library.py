"""The operator library `lutserve::`: how an operator is registered, and which kernel serves it.

Each operator has one place, a module of this package, that holds its plain-torch reference (the
specification), its fake and its schema, joined by `define`. A faster kernel is one .cpp file in `cpu/` that
registers for the dispatch key CPU, or a launcher of a Triton kernel in `gpu/` for CUDA; nothing else changes.
`torch.ops.lutserve.<name>` works as soon as its module is imported; `load()` makes it fast.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import cast

import torch

from lutserve import env
from lutserve.errors import UserError
from lutserve.kernels import isa
from lutserve.kernels.build import BuildError, build
from lutserve.kernels.gpu import LAUNCHERS

_logger = logging.getLogger("vllm.lutserve.kernels")
_library = torch.library.Library("lutserve", "DEF")


def define(
    schema: str, reference: Callable[..., object], fake: Callable[..., object]
) -> torch._ops.OpOverload:
    """Register one operator and return it.

    schema: `name(arguments) -> results`. reference: serves every device for which no kernel is registered.
    fake: same arguments; returns empty tensors of the right shapes. Both raise RuntimeError (torch._check)
    for arguments that are not as documented.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lutserve::{name}", fake, lib=_library)
    return cast(torch._ops.OpOverload, getattr(torch.ops.lutserve, name).default)


@cache
def load() -> str:
    """Load this machine's fast kernels; idempotent. Returns `cpu/<level>`, `triton/sm_<n>` or `reference`.

    LUTSERVE_BACKEND=auto takes Triton's kernels where there is a CUDA device and otherwise C++ ones, compiled
    the first time, and falls back to the torch reference with one warning; `reference` loads nothing; `cpu`
    and `triton` raise UserError where the kernels cannot be had.
    """
    backend = env.choice("LUTSERVE_BACKEND", ("auto", "reference", "cpu", "triton"), "auto")
    if backend == "reference":
        return "reference"
    gpu = backend == "triton" or (backend == "auto" and torch.cuda.is_available())
    try:
        loaded = _load_triton() if gpu else _load_cpu()
    except (BuildError, OSError) as error:
        kind = "Triton" if gpu else "C++"
        if backend != "auto":
            raise UserError(
                f"LUTSERVE_BACKEND={backend}, but the {kind} kernels cannot be had: {error}"
            ) from error
        _logger.warning(
            "no %s kernels, so plain torch serves: the same results, slower. Reason: %s", kind, error
        )
        return "reference"
    _logger.info("kernels: %s", loaded)
    return loaded


def _load_cpu() -> str:
    level = isa.detect()
    torch.ops.load_library(build(_logger.info, level))
    return f"cpu/{level.name}"


def _load_triton() -> str:
    """Register the launchers of `gpu/` for the dispatch key CUDA."""
    if not torch.cuda.is_available():
        raise BuildError("torch finds no CUDA device")
    if find_spec("triton") is None:
        raise BuildError("triton is not installed; pip install 'lutserve[cuda]'")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise BuildError(f"they need sm_80 or newer, the device is sm_{major}{minor}")
    for op in LAUNCHERS:
        _library.impl(op, launcher(op), "CUDA")
    return f"triton/sm_{major}{minor}"


def launcher(op: str) -> Callable[..., object]:
    """Return the launcher of the Triton kernel that serves `op`; imports triton and the operator."""
    module, _, function = LAUNCHERS[op].partition(":")
    found: Callable[..., object] = getattr(
        importlib.import_module(f"lutserve.kernels.gpu.{module}"), function
    )
    return found


def backend_for(op: str) -> str:
    """What serves the operator `op`: `reference`, or for example `cpu/avx512_bf16` or `triton/sm_90`."""
    loaded = load()
    key = "CUDA" if loaded.startswith("triton") else "CPU"
    return loaded if torch._C._dispatch_has_kernel_for_dispatch_key(f"lutserve::{op}", key) else "reference"
