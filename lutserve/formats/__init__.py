"""Weight formats as data: each is a sorted list of values that an index and a scale select from.

`get("sf4_5")` returns one; what quantises with it is `lutserve.quantizers`, what serves it one look-up GEMM.
"""

from __future__ import annotations

import difflib
import json
import re
from functools import cache
from pathlib import Path

from lutserve.errors import UserError
from lutserve.formats.catalogue import ALIASES, CATALOGUE
from lutserve.formats.codebook import TABLE, Codebook, Int8Table

__all__ = ["ALIASES", "NAMES", "TABLE", "Codebook", "Int8Table", "get", "load"]

_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
#: every listed name; besides them `sf4_<v>`, `sf3_<v>` and `sf3_<v>_nz` exist for any real v > 0
NAMES: tuple[str, ...] = (*CATALOGUE, *_INTEGERS)

_STUDENT = re.compile(r"sf([34])_(\d+(?:\.\d+)?)(_nz)?")


def get(name: str) -> Codebook:
    """Return the format called `name`, in any case.

    Names are those of NAMES, the paper's (`e2m1`, `e2m1-sp`, ...: ALIASES), `sf4_<v>`, `sf3_<v>` and
    `sf3_<v>_nz` for any real v > 0, and the path of a JSON file (`load`).

    Raises:
        UserError: no such format, with the names that exist.

    """
    if name.endswith(".json"):
        return load(Path(name))
    return _named(name.lower())


@cache
def _named(name: str) -> Codebook:
    name = ALIASES.get(name, name)
    if name in CATALOGUE:
        return CATALOGUE[name]
    if name in _INTEGERS:
        return _integer(int(name[3:]))
    student = _STUDENT.fullmatch(name)
    # sf4_<v>_nz was never published.
    if student and (student[1] == "3" or not student[3]):
        return _student(int(student[1]), student[2], bool(student[3]))
    near = difflib.get_close_matches(name, [*NAMES, *ALIASES], n=2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(
        f"unknown format {name!r}; {hint}allowed: {', '.join(NAMES)}, sf4_<v> for any v, or a .json file"
    )


def load(path: Path) -> Codebook:
    """Read a (learned) codebook: a JSON object with `values` and, if wanted, `name`, `bits` and `source`.

    Raises:
        UserError: the file cannot be read or is no codebook; says why.

    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read codebook {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    allowed = {"name": str, "values": list, "bits": int, "paper_name": str, "source": str}
    if not isinstance(data, dict) or "values" not in data:
        raise UserError(f'{path} must hold an object with "values", a list of up to {TABLE} numbers')
    for key, value in data.items():
        if key not in allowed:
            raise UserError(f"{path}: unknown key {key!r}; allowed: {', '.join(allowed)}")
        if not isinstance(value, allowed[key]) or isinstance(value, bool):
            raise UserError(f"{path}: {key} must be a {allowed[key].__name__}, not {value!r}")
    values = data.pop("values")
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise UserError(f"{path}: values must be numbers")
    numbers = tuple(sorted(float(v) for v in values))
    if not 2 <= len(numbers) <= TABLE:
        raise UserError(f"{path} has {len(numbers)} values; allowed: 2 to {TABLE}")
    data.setdefault("bits", (len(numbers) - 1).bit_length())
    if not 1 <= data["bits"] <= 4:
        raise UserError(f"{path}: bits={data['bits']}; allowed: 1 to 4")
    return Codebook(**{"name": path.stem, "source": path.name, **data}, values=numbers)


def _integer(bits: int) -> Codebook:
    half = 2 ** (bits - 1)
    values = tuple(float(v) for v in range(-half, half))
    return Codebook(f"int{bits}", values, bits, f"INT{bits}", "two's complement integers", integer=True)


def _student(bits: int, nu: str, without_zero: bool) -> Codebook:
    from lutserve.formats import quantile

    v = float(nu)
    # "sf4_5.0" is "sf4_5": one name for one format, and the published constants where there are any.
    name = f"sf{bits}_{v:g}{'_nz' if without_zero else ''}"
    if name in CATALOGUE:
        return CATALOGUE[name]
    if not 0.1 <= v <= 1e6:
        raise UserError(f"sf{bits}_{nu}: {nu} degrees of freedom; allowed: 0.1 to 1000000")
    if without_zero:
        values = quantile.without_zero(v, quantile.DELTA3, 8)
    elif bits == 4:
        values = quantile.with_zero(v, quantile.DELTA4, 7, 8)
    else:
        # The published 3-bit lists are built with the 4-bit delta.
        values = quantile.with_zero(v, quantile.DELTA4, 3, 4)
    return Codebook(name, values, bits, "", f"quantiles of Student's t, nu = {v:g}")
