"""What a report consists of: tables and charts of values that know where they come from."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lutserve.report.charts import Chart

T = TypeVar("T")


@dataclass(frozen=True)
class Value:
    """One entry of a table."""

    text: str
    #: what rows are sorted by; None goes last in either direction
    sort: float | str | None = None
    #: id of the record it comes from, see `folder.Origin`
    origin: str = ""
    #: short facts below the value
    notes: tuple[str, ...] = ()
    #: how near it is to its baseline, a name of `matrix.LEVELS`
    level: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first `headers` columns name a row, the others are what is known of it."""

    id: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    headers: int = 1
    #: what the table shows and how to read it
    note: str = ""
    #: whether its values have levels, which then need a legend
    levels: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a report under one heading."""

    id: str
    title: str
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    note: str = ""

    def __bool__(self) -> bool:
        return bool(self.tables or self.charts)


NOTHING = Value("-")


def word(text: Any, origin: str = "") -> Value:
    """A value that is text."""
    return Value(str(text), str(text), origin)


def number(value: float | None, text: str = "", origin: str = "", **more: Any) -> Value:
    """A value that is a number, written in four digits unless `text` says how."""
    if value is None:
        return NOTHING
    sort = None if math.isnan(value) else value
    return Value(text or f"{value:.4g}", sort, origin, **more)


def of(value: Any, origin: str = "") -> Value:
    """A value of a record, whatever it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return word("-" if value is None else value, origin)
    return number(value, f"{value:,}" if isinstance(value, int) else "", origin)


def distinct(flags: Mapping[T, Sequence[str]]) -> tuple[dict[T, str], str]:
    """What every command line has that not all have, and what all of them have.

    An option with its values counts as one.
    """
    options = {name: _options(given) for name, given in flags.items()}
    shared = [o for o in next(iter(options.values()), []) if all(o in given for given in options.values())]
    own = {name: " ".join(o for o in given if o not in shared) for name, given in options.items()}
    return own, " ".join(shared)


def _options(flags: Sequence[str]) -> list[str]:
    found: list[list[str]] = []
    for flag in flags:
        if flag.startswith("--") or not found:
            found.append([])
        found[-1].append(flag)
    return [shlex.join(words) for words in found]


def tidy(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The keys of some records whose values are plain, in the order of their first appearance."""
    return tuple(
        dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
    )
