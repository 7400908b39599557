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
    #: module of `lutserve.quant_methods` that implements it
    family: str
    summary: str
    #: name of the weights' 4-bit codebook, where they have one
    format: str = ""
    #: bits of the activations
    activations: int = 16
    #: input columns that share a scale where a recipe does not say
    group_size: int = 128
    #: whether some input columns stay in 16 bit, calibrated or learnt
    outliers: bool = False
    #: whether it needs `lutserve quantize` first, because it rounds weights with calibration data
    offline: bool = False


def _axcore(name: str, summary: str) -> Method:
    return Method(name, "axcore", summary, group_size=64)


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("none", "linear16", "the model's own 16-bit weights"),
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
        Method(
            "quik4",
            "mixq",
            "QUIK W4A4O16: int4 weights by GPTQ, down_proj int8, the 256 largest columns in 16 bit; made by "
            "`lutserve quantize`",
            format="int4",
            activations=4,
            offline=True,
        ),
        _axcore("axcore", "AxCore: 4-bit floats, a format for each block, products by integer addition"),
        _axcore("axcore-plus", "axcore with a compensation for each mantissa of the weight"),
        _axcore("mpfpma", "the ablation of axcore with E2M1 only and nothing else"),
        _axcore("mpfpma-s", "mpfpma with subnormal weights converted"),
        _axcore("mpfpma-sc", "mpfpma-s with compensation"),
        _axcore("fpma", "16-bit weights, products by integer addition with compensation, in fp16"),
        _axcore("lmul", "fpma with the constant of L-Mul"),
        Method("tender8", "tender", "Tender W8A8, an emulation for studies: plain torch", activations=8),
        Method("tender4", "tender", "Tender W4A4, an emulation for studies: plain torch", activations=4),
    )
}

#: methods that give every block of a weight a format of its own, stored with calibrated choices if need be
ADAPTIVE = ("axcore", "axcore-plus")

#: what `--help` and errors say of the names that are not in METHODS
FORMATS = (
    "every 4-bit format of `lutserve formats` (nf4, sf4_5, fp4_basic, int4, ...), +a8 or +a4 for activations"
)


def get(name: str, values: tuple[float, ...] | None = None) -> Method:
    """Return the method called `name`; UserError with the allowed names otherwise.

    With the `values` of a learned codebook any name will do: it is that codebook's.
    """
    if name in METHODS and values is None:
        return METHODS[name]
    from lutserve import formats

    base, option = split(name)
    if values is not None:
        if base in METHODS:
            raise UserError(f"a codebook cannot be called {base!r}, which is another method; rename it")
        summary = formats.Codebook(base, values, source="learned").source
        return Method(name, "codebook", summary, base, int(option[1:]) if option else 16)
    try:
        codebook = formats.get(base)
    except UserError:
        if base.endswith(".json"):
            raise
        near = difflib.get_close_matches(base, [*METHODS, *formats.NAMES], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown method {name!r}; {hint}allowed: {', '.join(METHODS)}, {FORMATS}") from None
    if len(codebook.values) > formats.TABLE:
        raise UserError(
            f"{base} has {codebook.bits} bits; a codebook method has at most 4 (int8 is one of its own)"
        )
    return Method(name, "codebook", codebook.source, base, int(option[1:]) if option else 16)


def split(name: str) -> tuple[str, str]:
    """Return the format in a method's name, and a4, a8 or nothing; UserError for another option."""
    base, plus, option = name.partition("+")
    if plus and option not in ("a4", "a8"):
        raise UserError(f"unknown method {name!r}: after + a4 or a8 (bits of the activations) is allowed")
    return base, option
