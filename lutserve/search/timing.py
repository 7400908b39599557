"""Measured times of linear layers: a table in a file, read for budgets in ms."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from lutserve import methods
from lutserve.errors import UserError
from lutserve.recipe import read_json
from lutserve.search import arithmetic
from lutserve.search.architecture import Site
from lutserve.search.candidates import Candidate

_BUDGET = re.compile(r"ms:(?:decode_b|prefill_)([1-9][0-9]*)")


def tokens_of(budget: str) -> int | None:
    """Tokens at once of a budget `ms:decode_bN` (N sequences) or `ms:prefill_N` (N of a prompt)."""
    found = _BUDGET.fullmatch(budget)
    return int(found[1]) if found else None


class Timing:
    """Microseconds of a layer [N out, K in] for M tokens by a method, from measured M.

    A file holds {"machine": ..., "rows": [{"n": N, "k": K, "method": NAME, "m": M, "us": median}]}; a row of
    a method in groups may name its "group_size". UserError for a file that is not so.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._points: dict[tuple[int, int, str], dict[int, float]] = {}
        rows = read_json(file).get("rows")
        try:
            if not isinstance(rows, list):
                raise TypeError("no list of rows")
            for row in rows:
                self._add(row)
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(
                f'{file} is no table of times ({type(error).__name__}: {error}); "rows" must hold objects '
                "with n, k, method, m and us; see docs/search.md"
            ) from None

    def _add(self, row: Mapping[str, Any]) -> None:
        n, k, m, us = int(row["n"]), int(row["k"]), int(row["m"]), float(row["us"])
        if min(n, k, m) < 1 or not 0 < us < math.inf:
            raise ValueError(f"n, k, m and us must be above 0, not {n}, {k}, {m}, {us}")
        name = str(row["method"])
        # Without a group size a row is for any.
        sized = "group_size" in row and arithmetic.grouped(methods.get(name))
        key = f"{name}@{row['group_size']}" if sized else name
        self._points.setdefault((n, k, key), {})[m] = us

    def microseconds(self, site: Site, candidate: Candidate, tokens: int) -> float:
        """Time of a layer, between measured numbers of tokens by a power law.

        UserError where the layer was not measured, or not on both sides of `tokens`.
        """
        names = candidate.method, f"{candidate.method}@{candidate.group_size}"
        of_any, own = (self._points.get((site.out, site.columns, name), {}) for name in names)
        points = of_any | own
        if tokens in points:
            return points[tokens]
        for (low, a), (high, b) in pairwise(sorted(points.items())):
            if low < tokens < high:
                share = math.log(tokens / low) / math.log(high / low)
                return float(a * (b / a) ** share)
        measured = ", ".join(map(str, sorted(points))) or "none"
        raise UserError(
            f"{self.file} cannot say how long {candidate.name} takes for {site.out} x {site.columns} with "
            f"{tokens} tokens (measured: {measured}); see docs/search.md"
        )
