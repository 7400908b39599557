"""The names of approximations: `exact`, `nli-4`, `nnlut:16`, `nli:FILE`, `nnlut:FILE`, and `+clamp`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from lutserve.errors import UserError
from lutserve.luts import files, nli, nnlut
from lutserve.luts.functions import FUNCTIONS

HIDDEN = (16, 32, 256)
"""Sizes of the NN-LUT tables that come with lutserve."""
SHIPPED = ("silu", "gelu", "exp", "reciprocal", "rsqrt")
"""Functions that have them."""
SPECS: tuple[str, ...] = ("exact", *(f"nli-{n}" for n in nli.POINTS), *(f"nnlut:{h}" for h in HIDDEN))
"""The approximations that need no file."""
FORMS = f"{', '.join(SPECS)}, nli:FILE, nnlut:FILE; +clamp after an nnlut"

#: name in a table file -> functions that it may approximate, besides the one of that name
_SERVES = {
    "gelu": {"gelu_tanh"},  # the published NN-LUT takes the erf GELU for both
    "exp": {"softmax_exp"},
    "divide": {"reciprocal"},
    "invsqrt": {"rsqrt"},
}
_CLAMP = "+clamp"
_TABLES = Path(__file__).with_name("tables")


@dataclass(frozen=True)
class Spec:
    """An approximation: its kind, the points or hidden units of a table without a file, or the file."""

    kind: Literal["exact", "nli", "nnlut"]
    size: int = 0
    path: Path | None = None
    clamp: bool = False


def parse(spec: str) -> Spec:
    """Take the name of an approximation apart; UserError, naming the allowed forms, if it is none."""
    clamp = spec.endswith(_CLAMP)
    body = spec.removesuffix(_CLAMP)
    kind, _, rest = body.partition(":")
    if body in SPECS:
        size = int(body.rpartition("-")[2] if kind != "nnlut" else rest) if body != "exact" else 0
        found = Spec("nnlut" if rest else "nli" if size else "exact", size, None, clamp)
    elif kind == "nnlut" and rest.isdigit():
        raise UserError(
            f"no NN-LUT of {rest} hidden units comes with lutserve, only of {', '.join(map(str, HIDDEN))}; "
            f"`lutserve lut fit FUNCTION --hidden {rest}` makes one, to be named nnlut:FILE"
        )
    elif kind == "nnlut" and rest:
        found = Spec("nnlut", 0, Path(rest), clamp)
    elif kind == "nli" and rest:
        found = Spec("nli", 0, Path(rest), clamp)
    else:
        raise UserError(f"unknown look-up table {spec!r}; allowed: {FORMS}")
    if clamp and found.kind != "nnlut":
        raise UserError(f"{spec!r}: only an nnlut can be clamped; an NLI table is constant outside its range")
    return found


def serves(name: str, function: str) -> bool:
    """Whether a table of `name` may stand for `function`."""
    return name == function or function in _SERVES.get(name, ())


def shipped(function: str, hidden: int) -> Path | None:
    """The file of the NN-LUT of this function and size that comes with lutserve, if there is one."""
    name = next((name for name in SHIPPED if serves(name, function)), None)
    return None if name is None else _TABLES / f"nnlut-{name}-{hidden}.json"


def load_file(spec: Spec, path: Path) -> nli.Table | nnlut.Table:
    """Read a table file, which must be of the kind that the spec says."""
    table = files.load(path)
    kind = "nli" if isinstance(table, nli.Table) else "nnlut"
    if kind != spec.kind:
        raise UserError(f"{path} is a table of the other kind; write {kind}:{path}")
    if spec.clamp and isinstance(table, nnlut.Table) and table.range is None:
        raise UserError(f'{path} does not say where it was fitted; for +clamp add "range": [low, high] to it')
    return table


def load(function: str, spec: str) -> nli.Table | nnlut.Table | None:
    """The table of a function, None for `exact`.

    UserError for an unknown function or form, a function without a table of this form, a file that cannot
    be read, is wrong in itself, or belongs to another function.
    """
    wanted = parse(spec)
    if function not in FUNCTIONS:
        raise UserError(f"unknown function {function!r}; allowed: {', '.join(FUNCTIONS)}")
    if wanted.path is not None:
        table = load_file(wanted, wanted.path)
        if not serves(table.function, function):
            raise UserError(f"{wanted.path} is a table of {table.function!r}, not of {function!r}")
        return table
    if wanted.kind == "exact":
        return None
    if wanted.kind == "nli":
        return nli.table(function, wanted.size)
    path = shipped(function, wanted.size)
    if path is None:
        having = ", ".join(name for name in FUNCTIONS if shipped(name, wanted.size))
        raise UserError(
            f"no NN-LUT of {function!r} comes with lutserve, only of {having}; `lutserve lut fit {function} "
            f"--hidden {wanted.size} --range LOW:HIGH -o FILE` makes one, to be named nnlut:FILE"
        )
    return _shipped_table(path)


@cache
def _shipped_table(path: Path) -> nli.Table | nnlut.Table:
    return files.load(path)
