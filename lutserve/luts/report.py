"""What `lutserve lut list`, `show` and `check` tell, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lutserve import luts
from lutserve.errors import UserError
from lutserve.luts import bits, files, nli, specs, stats
from lutserve.luts.functions import FUNCTIONS

FORMATS: tuple[bits.Format, ...] = ("float16", "bfloat16")
_LEAST_DIGITS = 8


def format_named(name: str) -> bits.Format:
    """A format by its name; UserError for any other."""
    for fmt in FORMATS:
        if name == fmt:
            return fmt
    raise UserError(f"unknown dtype {name!r}; allowed: {', '.join(FORMATS)}")


def tables() -> Iterator[tuple[str, str]]:
    """Function and spec of every table that needs no file."""
    for function in FUNCTIONS:
        for spec in specs.SPECS:
            size = specs.parse(spec).size
            if not spec.startswith("nnlut") or specs.shipped(function, size):
                yield function, spec


def domain(function: str, within: tuple[float, float] | None = None) -> tuple[float, float]:
    """Inputs where a function's errors are counted: what its NLI table covers, and where it is zero.

    Cut to `within`, unless that leaves nothing.
    """
    cuts = nli.table(function, 2).cuts
    low = -65504.0 if FUNCTIONS[function].tails[0] == "zero" else float(cuts[0])
    high = float(cuts[-1])
    if within is None or min(high, within[1]) <= max(low, within[0]):
        return low, high
    return max(low, within[0]), min(high, within[1])


def describe(
    function: str, spec: str, fmt: bits.Format, spans: Sequence[tuple[float, float]] | None = None
) -> dict[str, Any]:
    """Digest and errors of a table: over its domain or `spans` in "regions", over all of these in "whole"."""
    table, exact = luts.patterns(function, spec, fmt), luts.exact_values(function, fmt)
    spans = spans or stats.regions(*domain(function))
    whole = [(spans[0][0], spans[-1][1])]
    return {
        "function": function,
        "spec": spec,
        "dtype": fmt,
        "id": luts.digest(table)[:12],
        "digest": luts.digest(table),
        "whole": _plain(stats.errors(table, exact, fmt, whole))[0],
        "regions": _plain(stats.errors(table, exact, fmt, spans)),
    }


def _plain(errors: Sequence[stats.Errors]) -> list[dict[str, Any]]:
    """Errors as JSON knows numbers: null for NaN."""
    return [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(e).items()}
        for e in errors
    ]


def examine(path: Path, digest: str | None = None) -> dict[str, Any]:
    """Read a table file and describe it; UserError if it is wrong or its table has another digest.

    digest: the first eight or more hexadecimal digits of the digest that the fp16 or bf16 table must have.
    """
    table = files.load(path)
    served = [name for name in FUNCTIONS if specs.serves(table.function, name)]
    facts: dict[str, Any] = {"file": str(path), "function": table.function, "serves": served}
    if isinstance(table, nli.Table):
        clamp = FUNCTIONS[served[0]].clamp if served else True
        made = {fmt: table.patterns(fmt, clamp) for fmt in FORMATS}
        facts |= {"kind": "nli", "points": table.points, "range": [*table.cuts[[0, -1]].tolist()]}
    else:
        made = {fmt: table.patterns(fmt) for fmt in FORMATS}
        facts |= {"kind": "nnlut", "hidden": len(table.cuts), "range": table.range}
    digests = {fmt: luts.digest(patterns) for fmt, patterns in made.items()}
    if digest is not None:
        wanted = digest.lower()
        if len(wanted) < _LEAST_DIGITS or set(wanted) - set("0123456789abcdef"):
            raise UserError(f"--digest {digest}: give {_LEAST_DIGITS} to 64 hexadecimal digits")
        if not any(known.startswith(wanted) for known in digests.values()):
            found = ", ".join(f"{known[:12]} in {fmt}" for fmt, known in digests.items())
            raise UserError(f"{path}: its table has the digest {found}, not {digest}")
    facts["digest"] = digests
    if served:
        low, high = facts["range"] or domain(served[0])
        exact = luts.exact_values(served[0], "float16")
        facts["whole"] = _plain(stats.errors(made["float16"], exact, "float16", [(low, high)]))[0]
    return facts
