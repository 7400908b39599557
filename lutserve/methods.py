"""The registry of linear methods, as data: what `--method NAME` may say.

A method family is one file in `quant_methods/`. Its names are one line each here; the codebook family has
the names of `lutserve.formats`. Nothing in this module imports torch or vLLM, so recipes can be read and
checked anywhere.
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
    #: name of the weights' 4-bit codebook, where they have one
    format: str = ""
    #: bits of the activations
    activations: int = 16
    #: whether some input columns stay in 16 bit, calibrated or learnt
    outliers: bool = False


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("none", "", "the model's own 16-bit weights and GEMM"),
        Method(
            "mix8",
            "mixq",
            "MixQ W8A8O16: int8 weights and activations, outlier columns in 16 bit",
            activations=8,
            outliers=True,
        ),
        Method("int8", "mixq", "W8A8: mix8 without outlier columns", activations=8),
        Method(
            "llm-int8", "mixq", "W8A8, in every call the columns with any |x| > 6 in 16 bit", activations=8
        ),
        Method(
            "mix4",
            "mixq",
            "MixQ W4A8O16: int4 weights, int8 activations, outlier columns in 16 bit, down_proj as in mix8",
            format="int4",
            activations=8,
            outliers=True,
        ),
        Method(
            "mix4:a4",
            "mixq",
            "MixQ W4A4O16 as published, for studies: plain torch",
            format="int4",
            activations=4,
            outliers=True,
        ),
    )
}

#: what `--help` and errors say of the names that are not in METHODS
FORMATS = (
    "every 4-bit format of `lutserve formats` (nf4, sf4_5, fp4_basic, int4, ...), +a8 or +a4 for activations"
)


def get(name: str) -> Method:
    """Return the method called `name`; UserError with the allowed names otherwise."""
    if name in METHODS:
        return METHODS[name]
    from lutserve import formats

    base, plus, option = name.partition("+")
    if plus and option not in ("a4", "a8"):
        raise UserError(f"unknown method {name!r}: after + a4 or a8 (bits of the activations) is allowed")
    try:
        codebook = formats.get(base)
    except UserError:
        near = difflib.get_close_matches(base, [*METHODS, *formats.NAMES], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown method {name!r}; {hint}allowed: {', '.join(METHODS)}, {FORMATS}") from None
    if len(codebook.values) > formats.TABLE:
        raise UserError(
            f"{base} has {codebook.bits} bits; a codebook method has at most 4 (int8 is one of its own)"
        )
    return Method(name, "codebook", codebook.source, base, int(option[1:]) if plus else 16)
