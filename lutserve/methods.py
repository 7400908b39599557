"""The registry of linear methods, as data: what `--method NAME` may say.

A method family is one file in `quant_methods/` and its names are one line each here. Nothing in this
module imports torch or vLLM, so recipes can be read and checked anywhere.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lutserve.errors import UserError


@dataclass(frozen=True)
class Method:
    """One arithmetic for a linear layer."""

    name: str
    #: module of `lutserve.quant_methods` that implements it; empty for the model's own 16-bit GEMM
    family: str
    summary: str


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("none", "", "the model's own 16-bit weights and GEMM"),
        Method("mix8", "mixq", "MixQ W8A8O16: int8 weights and activations, outlier columns in 16 bit"),
        Method("int8", "mixq", "W8A8: mix8 without outlier columns"),
    )
}


def get(name: str) -> Method:
    """Return the method called `name`; UserError with the allowed names otherwise."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown method {name!r}; {hint}allowed: {', '.join(METHODS)}")
