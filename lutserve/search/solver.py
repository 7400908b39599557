"""Exact choice of one candidate for every item under upper bounds on summed costs.

A multiple-choice knapsack: minimise the summed loss, one candidate for each item, every budget kept. HiGHS
solves it (scipy.optimize.milp), and whatever it returns is checked in exact arithmetic.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from lutserve.errors import UserError

#: HiGHS stops at an absolute gap of 1e-6, which scipy does not expose: coefficients are scaled up to this
_LARGEST = Fraction(10**6)
#: rejected assignments after which the search gives up
_MOST_CUTS = 1000
#: quantities of every candidate beside its costs: its loss, and its place in the list
LOSS, ORDER = "loss", "order"


@dataclass(frozen=True)
class Solution:
    """What `solve` found.

    status: "optimal" or "infeasible". choices: the `fmt` of each item, in order; empty if infeasible. loss:
    their summed loss. cost: their summed costs. message: if infeasible, which budget cannot be met, and the
    least that can be reached.
    """

    status: Literal["optimal", "infeasible"]
    choices: list[str] = field(default_factory=list)
    loss: float = math.inf
    cost: dict[str, float] = field(default_factory=dict)
    message: str = ""


def solve(
    items: Sequence[Mapping[str, Any]],
    budgets: Mapping[str, float],
    objective: str | Mapping[str, Any] = "min_loss",
) -> Solution:
    """Choose a candidate for every item.

    Args:
        items: each with `name` and `candidates`, a list of {"fmt": str, "cost": {budget: number}, "loss":
            number}. Losses may be negative. Numbers count as the decimals they print as: 0.1 + 0.2 fits into
            0.3.
        budgets: upper bounds on summed costs; any number of them.
        objective: "min_loss", or {"min_cost": NAME, "loss_cap": number} for the cheapest choice whose loss is
            not above the cap.

    Returns:
        The optimum. Of several, the one with the smallest costs, bytes before the budgets, then the one that
        takes candidates early in their lists: the same on every run.

    Raises:
        UserError: an item without candidates, twice the same fmt, a cost that is missing, or no number.

    """
    caps = {name: _exact(value, f"budget {name}") for name, value in budgets.items()}
    first = LOSS
    if isinstance(objective, Mapping):
        first, caps[LOSS] = str(objective["min_cost"]), _exact(objective["loss_cap"], "loss_cap")
    elif objective != "min_loss":
        raise UserError(f"objective {objective!r}; allowed: 'min_loss', {{'min_cost': ..., 'loss_cap': ...}}")
    problem = _Problem(items, [name for name in (*budgets, first) if name != LOSS])
    best = problem.minimise(first, caps)
    if best is None:
        return Solution("infeasible", message=_explain(problem, caps))
    # Of several optima one is singled out: every quantity found least bounds the search for the next.
    for settled, following in pairwise(dict.fromkeys([first, LOSS, *problem.costs, ORDER])):
        caps[settled] = problem.total(best, settled)
        best = problem.minimise(following, caps) or best
    return Solution(
        "optimal",
        choices=[problem.formats[v] for v in best],
        loss=float(problem.total(best, LOSS)),
        cost={name: _plain(problem.total(best, name)) for name in problem.costs},
    )


class _Problem:
    """The items as variables: one for each candidate that no other of its item dominates.

    formats: the name of each variable. owner: the item of each. rows: quantity -> its value for each
    variable; `costs` are those that are neither the loss nor the order.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]], budgeted: Sequence[str]) -> None:
        common = [set(c["cost"]) for item in items for c in item["candidates"]]
        extra = sorted(set.intersection(*common) - set(budgeted)) if common else []
        # Ties are decided by bytes where there are any.
        self.costs = sorted(dict.fromkeys([*budgeted, *extra]), key=lambda name: name != "bytes")
        self.count = len(items)
        self.formats: list[str] = []
        self.owner: list[int] = []
        self.rows: dict[str, list[Fraction]] = {name: [] for name in (LOSS, *self.costs, ORDER)}
        for place, item in enumerate(items):
            self._add(place, item)

    def _add(self, place: int, item: Mapping[str, Any]) -> None:
        name, candidates = item["name"], item["candidates"]
        formats = [c["fmt"] for c in candidates]
        if not formats or len(set(formats)) < len(formats):
            raise UserError(f"item {name!r} has candidates {formats}; give one or more, each once")
        points = []
        for c in candidates:
            missing = [cost for cost in self.costs if cost not in c["cost"]]
            if missing:
                raise UserError(f"item {name!r}, candidate {c['fmt']!r}: no cost {missing[0]!r}")
            where = f"item {name!r}, candidate {c['fmt']!r}"
            points.append((_exact(c["loss"], where), *(_exact(c["cost"][n], where) for n in self.costs)))
        kept = [
            i
            for i, point in enumerate(points)
            if not any(
                all(a <= b for a, b in zip(other, point, strict=True)) and (other != point or j < i)
                for j, other in enumerate(points)
                if j != i
            )
        ]
        for rank, i in enumerate(kept):
            self.formats.append(formats[i])
            self.owner.append(place)
            # Weighted, so that equal items do not tie again: the first ones take their later candidates.
            order = Fraction(rank * (self.count + place + 1))
            for row, value in zip(self.rows.values(), (*points[i], order), strict=True):
                row.append(value)

    def total(self, picked: Sequence[int], name: str) -> Fraction:
        """The exact sum of a quantity over the picked variables."""
        return sum((self.rows[name][v] for v in picked), Fraction())

    def least(self, name: str) -> Fraction:
        """The smallest sum of a quantity that any choice has."""
        return sum(self._relative(name)[1].values(), Fraction())

    def _relative(self, name: str) -> tuple[list[Fraction], dict[int, Fraction]]:
        """A quantity above its item's smallest, for each variable; and the smallest of each item."""
        low: dict[int, Fraction] = {}
        for owner, value in zip(self.owner, self.rows[name], strict=True):
            low[owner] = min(value, low.get(owner, value))
        return [v - low[o] for o, v in zip(self.owner, self.rows[name], strict=True)], low

    def minimise(self, name: str, caps: Mapping[str, Fraction]) -> list[int] | None:
        """The variables, one an item, with the least sum of `name` within the caps; None if none fits."""
        size = len(self.owner)
        if not size:
            return []
        one_each = np.zeros((self.count, size))
        one_each[self.owner, range(size)] = 1
        constraints, open_to = [LinearConstraint(one_each, 1, 1)], np.ones(size)
        for bounded, cap in caps.items():
            values, low = self._relative(bounded)
            left = cap - sum(low.values(), Fraction())
            if left < 0:
                return None
            # What no other item could make up for is out, so it cannot swamp the rest either.
            open_to[[v > left for v in values]] = 0
            values = [v if v <= left else Fraction() for v in values]
            # Whole multiples of the smallest step, so that rounding cannot matter where they are few.
            step = _step(values)
            limit = min(left // step * step, self.count * max(values))
            scale = min(1 / step, _LARGEST / (max(values) or 1))
            row = np.array([float(v * scale) for v in values])
            constraints.append(LinearConstraint(row, -np.inf, float(limit * scale)))
        values, _ = self._relative(name)
        scale = _LARGEST / (max(values) or 1)
        goal = np.array([float(v * scale) for v in values])
        for _ in range(_MOST_CUTS):
            with _quiet():
                result = milp(
                    goal,
                    integrality=np.ones(size),
                    bounds=Bounds(0, open_to),
                    constraints=constraints,
                    options={"mip_rel_gap": 0.0},
                )
            if result.x is None:
                return None
            picked = [int(v) for v in np.flatnonzero(result.x > 0.5)]
            if all(self.total(picked, bounded) <= cap for bounded, cap in caps.items()):
                return picked
            # Within the solver's tolerance but not within the cap: this one assignment is ruled out.
            cut = np.zeros(size)
            cut[picked] = 1
            constraints.append(LinearConstraint(cut, -np.inf, self.count - 1))
        return None


def _explain(problem: _Problem, caps: Mapping[str, Fraction]) -> str:
    """Why nothing fits: the budgets below what is possible, or those that exclude each other."""
    least = {name: problem.least(name) for name in caps}
    short = [
        f"{name} cannot be below {_plain(least[name])}, the budget is {_plain(cap)}"
        for name, cap in caps.items()
        if least[name] > cap
    ]
    if short:
        return "; ".join(short)
    parts = []
    for name in caps:
        best = problem.minimise(name, {n: cap for n, cap in caps.items() if n != name})
        if best is not None:
            reached = _plain(problem.total(best, name))
            parts.append(
                f"within the others {name} cannot be below {reached}, the budget is {_plain(caps[name])}"
            )
    return "each budget can be met, but not all together: " + "; ".join(parts)


def _exact(value: Any, where: str) -> Fraction:
    """A number as the decimal it prints as."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise UserError(f"{where}: {value!r} is no finite number")
    return Fraction(str(value))


def _plain(value: Fraction) -> float:
    return int(value) if value.denominator == 1 else float(value)


def _step(values: Sequence[Fraction]) -> Fraction:
    """The largest number that all are whole multiples of; 1 for zeros."""
    multiple = math.lcm(*(v.denominator for v in values))
    return Fraction(math.gcd(*(int(v * multiple) for v in values)), multiple) or Fraction(1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep standard output clean: the HiGHS in scipy 1.17 prints debugging lines straight to descriptor 1."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
