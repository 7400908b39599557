"""Unary functions as tables: one 16-bit output for each of the 65,536 inputs of a 16-bit dtype."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from lutserve.errors import UserError
from lutserve.luts import bits, nli, nnlut, specs
from lutserve.luts.functions import FUNCTIONS
from lutserve.luts.specs import SPECS

if TYPE_CHECKING:
    import torch

__all__ = ["FUNCTIONS", "SPECS", "check", "entries", "input_range", "lut_table", "table_id", "validate"]


def validate(spec: str) -> None:
    """Raise UserError, naming the allowed forms, unless `spec` names an approximation; reads its file."""
    wanted = specs.parse(spec)
    if wanted.path is not None:
        specs.load_file(wanted, wanted.path)


def check(function: str, spec: str) -> None:
    """Raise UserError unless `lut_table(function, spec, ...)` would give a table; cheap, builds none.

    Says in one line what is wrong: an unknown function or form, a function that has no table of this form,
    a file that is missing, damaged, hostile, or for another function.
    """
    specs.load(function, spec)


@cache
def lut_table(function: str, spec: str, dtype: torch.dtype) -> torch.Tensor:
    """Table of `function` (a key of FUNCTIONS) in the approximation `spec`.

    `exact` is the float64 function rounded once to `dtype`. `nli-<n>` is described in `lutserve.luts.nli`,
    `nnlut:<hidden units>` in `lutserve.luts.nnlut`; `nli:<file>` and `nnlut:<file>` read a table file, once
    a process. An nnlut followed by `+clamp` gives the function's limits outside the range of its fit.

    Returns a CPU tensor [65536] of `dtype` (float16 or bfloat16): element i is the output for the input
    whose bit pattern is i. The tensor is cached and shared: do not write to it.
    UserError as `check`, and for another dtype.
    """
    import torch

    return torch.from_numpy(patterns(function, spec, dtype_format(dtype)).view(np.int16)).view(dtype)


@cache
def table_id(function: str, spec: str, dtype: torch.dtype) -> str:
    """Twelve hexadecimal digits that identify the table's contents: the first ones of its digest."""
    return digest(patterns(function, spec, dtype_format(dtype)))[:12]


def digest(table: bits.U16) -> str:
    """Sha256 of a table's bytes, little-endian, in hexadecimal digits."""
    return hashlib.sha256(table.astype("<u2").tobytes()).hexdigest()


@cache
def patterns(function: str, spec: str, fmt: bits.Format) -> bits.U16:
    """The table as bit patterns, uint16 [65536]; UserError as `check`."""
    table = specs.load(function, spec)
    if table is None:
        return bits.encode(exact_values(function, fmt), fmt)
    if isinstance(table, nli.Table):
        return table.patterns(fmt, FUNCTIONS[function].clamp)
    return table.patterns(fmt, FUNCTIONS[function].tails if specs.parse(spec).clamp else None)


def entries(function: str, spec: str) -> int:
    """Numbers that an approximation stores: samples of an NLI table; cuts, slopes and biases of an NN-LUT.

    0 for `exact`. UserError as `check`.
    """
    table = specs.load(function, spec)
    if isinstance(table, nli.Table):
        return len(table.samples)
    return 0 if table is None else len(table.cuts) + len(table.slopes) + len(table.biases)


def input_range(function: str, spec: str) -> tuple[float, float] | None:
    """Inputs that a table was made for, (low, high): outside, NLI is constant and an NN-LUT goes on.

    None where there is no such range: for `exact`, and for an NN-LUT file that does not say.
    UserError as `check`.
    """
    table = specs.load(function, spec)
    if isinstance(table, nli.Table):
        return float(table.cuts[0]), float(table.cuts[-1])
    return None if table is None else table.range


@cache
def exact_values(function: str, fmt: bits.Format) -> nnlut.F64:
    """The exact function at every input of `fmt`, float64 [65536], not rounded; NaN where it has no value."""
    exact = FUNCTIONS[function].exact
    return np.array([x if x != x else exact(x) for x in bits.decode(bits.PATTERNS, fmt).tolist()])


def dtype_format(dtype: torch.dtype) -> bits.Format:
    """Name of a 16-bit floating-point dtype; UserError for any other."""
    name = str(dtype).removeprefix("torch.")
    if name == "float16":
        return "float16"
    if name == "bfloat16":
        return "bfloat16"
    raise UserError(f"tables exist for float16 and bfloat16, not for {name}")
