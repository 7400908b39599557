"""Table files: read, checked without trust, and written.

Two JSON forms: NN-LUT's published one (bare -Infinity and Infinity included), told by its "op", and ours for
NLI, told by its "schema". docs/luts.md describes both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lutserve.errors import UserError
from lutserve.luts import nli, nnlut

SCHEMA = "lutserve.nli"
VERSION = 1
MAX_HIDDEN = 4096
_MAX_BYTES = 1 << 20
_FP16_OVERFLOW = 65520.0  # from here on a value rounds to infinity
_NNLUT_KEYS = {"op", "hidden", "cut_points", "slopes", "biases", "version", "range", "made_by"}
_NLI_KEYS = {"schema", "version", "function", "points", "scales", "cuts", "samples", "made_by"}


def load(path: Path) -> nli.Table | nnlut.Table:
    """Read a table file of either form; UserError in one line for whatever is wrong with it."""
    data = _json(path)
    try:
        return _nnlut(data) if "op" in data else _nli(data)
    except _WrongError as wrong:
        raise UserError(f"{path}: {wrong}; docs/luts.md describes table files") from None


def save(path: Path, table: nli.Table | nnlut.Table, made_by: dict[str, Any]) -> None:
    """Write a table to a file, whole or not at all; `made_by` is kept for the reader."""
    form = _nli_json(table, made_by) if isinstance(table, nli.Table) else nnlut.to_json(table, made_by)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(form, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


class _WrongError(Exception):
    """What is wrong with the contents of a file."""


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read table file {path}: {error.strerror}") from None
    if len(raw) > _MAX_BYTES:
        raise UserError(f"{path} is larger than {_MAX_BYTES >> 20} MiB: no table file")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error) or 'nested too deeply'}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def _nnlut(data: dict[str, Any]) -> nnlut.Table:
    _keys(data, _NNLUT_KEYS, {"op", "hidden", "cut_points", "slopes", "biases"})
    if data.get("version", VERSION) != VERSION:
        raise _WrongError(f"version {_short(data['version'])} is unknown; allowed: {VERSION}")
    name = _name(data, "op")
    hidden = data["hidden"]
    if type(hidden) is not int or not 1 <= hidden <= MAX_HIDDEN:
        raise _WrongError(f"hidden={_short(hidden)} must be a whole number from 1 to {MAX_HIDDEN}")
    cuts = _numbers(data, "cut_points", hidden + 2)
    if cuts[0] != -math.inf or cuts[-1] != math.inf:
        raise _WrongError("cut_points must begin with -Infinity and end with Infinity")
    _ordered("cut_points", cuts, strictly=False)
    slopes = _finite("slopes", _numbers(data, "slopes", hidden + 1))
    biases = _finite("biases", _numbers(data, "biases", hidden + 1))
    span = None
    if data.get("range") is not None:
        low, high = _finite("range", _numbers(data, "range", 2), limit=math.inf)
        _ordered("range", [low, high], strictly=True)
        span = low, high
    inner = nnlut.to_fp16(_finite("cut_points", cuts[1:-1], limit=math.inf))
    return nnlut.Table(name, inner, nnlut.to_fp16(slopes), nnlut.to_fp16(biases), span)


def _nli(data: dict[str, Any]) -> nli.Table:
    if data.get("schema") != SCHEMA:
        raise _WrongError(f'neither an NN-LUT table ("op") nor an NLI table ("schema": "{SCHEMA}")')
    if data.get("version") != VERSION:
        raise _WrongError(f"version {_short(data.get('version'))} is unknown; allowed: {VERSION}")
    _keys(data, _NLI_KEYS, _NLI_KEYS - {"made_by"})
    name, points, scales = _name(data, "function"), data["points"], nli.scales_named(data["scales"])
    if type(points) is not int or points not in nli.FILE_POINTS:
        allowed = ", ".join(map(str, nli.FILE_POINTS))
        raise _WrongError(f"points={_short(points)}; allowed: {allowed}")
    if scales is None:
        raise _WrongError(f"scales={_short(data['scales'])}; allowed: {', '.join(nli.SCALES)}")
    cuts = _finite("cuts", _numbers(data, "cuts", nli.CUTS))
    rounded = nnlut.to_fp16(cuts).tolist()
    _ordered("cuts (rounded to fp16)", rounded, strictly=True)
    samples = np.array(_finite("samples", _numbers(data, "samples", 8 * points + 3)))
    table = nli.make(name, cuts, points, lambda _: samples, scales)
    for k, value in enumerate(table.scales.tolist()):
        if not 0 < value < math.inf:
            width = rounded[k + 1] - rounded[k]
            raise _WrongError(f"segment {k} of width {width:g} has no {scales} scale with {points} points")
    return table


def _nli_json(table: nli.Table, made_by: dict[str, Any]) -> dict[str, Any]:
    usual = nli.make(table.function, table.cuts.tolist(), table.points, lambda _: table.samples)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "function": table.function,
        "points": table.points,
        "scales": "float16" if np.array_equal(usual.scales, table.scales) else "float32",
        "cuts": table.cuts.tolist(),
        "samples": table.samples.tolist(),
        "made_by": made_by,
    }


def _short(value: object) -> str:
    """A value as it can stand in one line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _keys(data: dict[str, Any], allowed: set[str], needed: set[str]) -> None:
    for key in sorted(data.keys() - allowed):
        raise _WrongError(f"unknown key {_short(key)}; allowed: {', '.join(sorted(allowed))}")
    for key in sorted(needed - data.keys()):
        raise _WrongError(f"key {key!r} is missing")


def _name(data: dict[str, Any], key: str) -> str:
    name = data[key]
    if not isinstance(name, str) or not 0 < len(name) <= 100 or not name.isprintable():
        raise _WrongError(f"{key}={_short(name)} must be the name of a function")
    return name


def _numbers(data: dict[str, Any], key: str, length: int) -> list[float]:
    values = data[key]
    if not isinstance(values, list) or len(values) != length:
        what = f"{len(values)} entries" if isinstance(values, list) else _short(values)
        raise _WrongError(f"{key} must be a list of {length} numbers, not {what}")
    numbers = []
    for k, value in enumerate(values):
        if (
            type(value) not in (int, float)
            or value != value
            or (type(value) is int and abs(value) >= 2**1023)
        ):
            raise _WrongError(f"{key}[{k}]={_short(value)} is no number")
        numbers.append(float(value))
    return numbers


def _finite(key: str, values: list[float], limit: float = _FP16_OVERFLOW) -> list[float]:
    for k, value in enumerate(values):
        if not abs(value) < limit:
            what = "does not fit fp16" if math.isfinite(value) else "is not finite"
            raise _WrongError(f"{key}[{k}]={value} {what}")
    return values


def _ordered(key: str, values: Sequence[float], *, strictly: bool) -> None:
    for k, (a, b) in enumerate(pairwise(values)):
        if b < a or (strictly and b == a):
            raise _WrongError(f"{key} must ascend, but [{k}]={a:g} is followed by {b:g}")
