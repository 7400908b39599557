"""Unary functions as tables: one 16-bit output for each of the 65,536 inputs of a 16-bit dtype."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from lutserve.errors import UserError
from lutserve.luts import bits, nli
from lutserve.luts.functions import FUNCTIONS

if TYPE_CHECKING:
    import torch

_NLI_POINTS = {f"nli-{n}": n for n in nli.POINTS}
SPECS: tuple[str, ...] = ("exact", *_NLI_POINTS)
"""Allowed approximations: `exact`, or NLI (arXiv 2602.02988) with 2, 4, 16 or 32 points a segment."""


def validate(spec: str) -> None:
    """Raise UserError, naming the allowed forms, unless `spec` names an approximation."""
    if spec not in SPECS:
        raise UserError(f"unknown look-up table {spec!r}; allowed: {', '.join(SPECS)}")


@cache
def lut_table(function: str, spec: str, dtype: torch.dtype) -> torch.Tensor:
    """Table of `function` (silu, gelu, gelu_tanh or softmax_exp) in the approximation `spec`.

    Returns a CPU tensor [65536] of `dtype` (float16 or bfloat16): element i is the output for the input
    whose bit pattern is i. `exact` is the float64 function rounded once to `dtype`; `nli-<n>` is described
    in `lutserve.luts.nli`. The tensor is cached and shared: do not write to it.
    UserError for an unknown function, approximation or dtype.
    """
    import torch

    return torch.from_numpy(_patterns(function, spec, dtype).view(np.int16)).view(dtype)


@cache
def table_id(function: str, spec: str, dtype: torch.dtype) -> str:
    """Twelve hexadecimal digits that identify the table's contents (sha256 of its bytes, little-endian)."""
    return hashlib.sha256(_patterns(function, spec, dtype).astype("<u2").tobytes()).hexdigest()[:12]


@cache
def _patterns(function: str, spec: str, dtype: torch.dtype) -> bits.U16:
    """The table as bit patterns, uint16 [65536]; checks the arguments."""
    validate(spec)
    if function not in FUNCTIONS:
        raise UserError(f"unknown function {function!r}; allowed: {', '.join(FUNCTIONS)}")
    fmt = _format(dtype)
    if spec in _NLI_POINTS:
        return nli.patterns(function, _NLI_POINTS[spec], fmt)
    exact = FUNCTIONS[function].exact
    values = [x if x != x else exact(x) for x in bits.decode(bits.PATTERNS, fmt).tolist()]
    return bits.encode(np.array(values), fmt)


def _format(dtype: torch.dtype) -> bits.Format:
    """Name of a 16-bit floating-point dtype; UserError for any other."""
    name = str(dtype).removeprefix("torch.")
    if name == "float16":
        return "float16"
    if name == "bfloat16":
        return "bfloat16"
    raise UserError(f"tables exist for float16 and bfloat16, not for {name}")
