"""The operator library `lutserve::`: how an operator is registered, and which kernel serves it.

Each operator has one place, a module of this package, that holds its plain-torch reference (the
specification), its fake and its schema, joined by `define`. A faster kernel is one .cpp file in `cpu/` that
registers for the dispatch key CPU; nothing else changes. `torch.ops.lutserve.<name>` works as soon as its
module is imported; `load()` makes it fast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import cast

import torch

from lutserve import env
from lutserve.errors import UserError
from lutserve.kernels import isa
from lutserve.kernels.build import BuildError, build

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
    """Compile (the first time) and load the C++ kernels; idempotent. Returns `cpu/<level>` or `reference`.

    LUTSERVE_BACKEND=auto falls back to the torch reference with one warning, `reference` loads nothing, and
    `cpu` raises UserError where the kernels cannot be had.
    """
    backend = env.choice("LUTSERVE_BACKEND", ("auto", "reference", "cpu"), "auto")
    if backend == "reference":
        return "reference"
    level = isa.detect()
    try:
        torch.ops.load_library(build(_logger.info, level))
    except (BuildError, OSError) as error:
        if backend == "cpu":
            raise UserError(f"LUTSERVE_BACKEND=cpu, but the C++ kernels cannot be had: {error}") from error
        _logger.warning(
            "no C++ kernels, so plain torch serves: the same results, slower. Reason: %s",
            error,
        )
        return "reference"
    _logger.info("C++ kernels: cpu/%s", level.name)
    return f"cpu/{level.name}"


def backend_for(op: str) -> str:
    """What serves the operator `op` on CPU tensors: `reference`, or for example `cpu/avx512_bf16`."""
    loaded = load()
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"lutserve::{op}", "CPU")
    return loaded if compiled else "reference"
