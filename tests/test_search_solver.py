"""`lutserve.search.solve` against the published cases and against trying everything."""

from __future__ import annotations

import itertools
import json
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutserve.errors import UserError
from lutserve.search import solve


def everything(items: list[Any], budgets: dict[str, Any]) -> tuple[Decimal, list[tuple[str, ...]]] | None:
    """The least loss within the budgets and all choices that have it, by trying every choice."""
    exact = lambda value: Decimal(str(value))  # noqa: E731
    found: dict[Decimal, list[tuple[str, ...]]] = {}
    for choice in itertools.product(*(item["candidates"] for item in items)):
        if all(sum(exact(c["cost"][name]) for c in choice) <= exact(cap) for name, cap in budgets.items()):
            found.setdefault(sum((exact(c["loss"]) for c in choice), Decimal()), []).append(
                tuple(c["fmt"] for c in choice)
            )
    return min(found.items(), default=None)


def test_published_cases(shared: Path) -> None:
    cases = json.loads((shared / "golden/bit_allocation/knapsack.json").read_text())["knapsack"]
    assert len(cases) >= 15
    for case in cases:
        got, want = solve(case["items"], case["budgets"], case["objective"]), case["optimum"]
        assert (got.status == "optimal") is want["feasible"], case["name"]
        if not want["feasible"]:
            continue
        assert got.loss == pytest.approx(want["loss"], abs=1e-9), case["name"]
        if "choice" in want:
            assert got.choices == want["choice"], case["name"]
            assert {name: got.cost[name] for name in want["cost"]} == want["cost"], case["name"]


# Few distinct values, so that ties, exact fits and equal candidates come up all the time.
whole = st.integers(0, 6)
measured = st.floats(-1, 1).map(lambda x: round(x, 6))
tenths = st.integers(0, 30).map(lambda n: n / 10)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    names = draw(st.sampled_from([["bits"], ["bits", "ms"], ["ms"]]))
    numbers = {"bits": whole, "ms": tenths}
    losses = draw(st.sampled_from([whole, measured, whole.map(lambda n: n * 1e-12), tenths]))
    items = [
        {
            "name": f"item{i}",
            "candidates": [
                {"fmt": f"f{j}", "cost": {n: draw(numbers[n]) for n in names}, "loss": draw(losses)}
                for j in range(draw(st.integers(1, 4)))
            ],
        }
        for i in range(draw(st.integers(1, 4)))
    ]
    return items, {n: draw(st.integers(0, 20) if n == "bits" else tenths) for n in names}


@settings(deadline=None, max_examples=80)
@given(problems())
def test_like_trying_everything(problem: tuple[list[Any], dict[str, Any]]) -> None:
    items, budgets = problem
    got, want = solve(items, budgets), everything(items, budgets)
    if want is None:
        assert got.status == "infeasible" and not got.choices and got.message
        return
    assert got.loss == pytest.approx(float(want[0]), abs=1e-12, rel=1e-9)
    best = [c for c, f in zip(items, got.choices, strict=True) if f in [d["fmt"] for d in c["candidates"]]]
    assert len(best) == len(items)
    for name, cap in budgets.items():
        chosen = [
            Decimal(str(next(c for c in item["candidates"] if c["fmt"] == fmt)["cost"][name]))
            for item, fmt in zip(items, got.choices, strict=True)
        ]
        assert sum(chosen) <= Decimal(str(cap)) and got.cost[name] == float(sum(chosen))
    if len(budgets) == 1 and tuple(got.choices) in want[1]:
        (name,) = budgets
        costs = {
            choice: sum(
                Decimal(str(next(c for c in item["candidates"] if c["fmt"] == fmt)["cost"][name]))
                for item, fmt in zip(items, choice, strict=True)
            )
            for choice in want[1]
        }
        assert costs[tuple(got.choices)] == min(costs.values())


@settings(deadline=None, max_examples=30)
@given(problems(), st.randoms(use_true_random=False))
def test_what_must_not_matter(problem: tuple[list[Any], dict[str, Any]], random: Any) -> None:
    """More budget is never worse; the order of things and a dominated candidate change nothing."""
    items, budgets = problem
    first = solve(items, budgets)
    assert solve(items, budgets) == first
    shuffled = [dict(i, candidates=random.sample(i["candidates"], len(i["candidates"]))) for i in items]
    random.shuffle(shuffled)
    other = solve(shuffled, budgets)
    assert other.status == first.status and other.loss == pytest.approx(first.loss, abs=1e-12)
    wider = solve(items, {name: cap + 3 for name, cap in budgets.items()})
    assert wider.loss <= first.loss + 1e-12
    worse = dict(items[0]["candidates"][0])
    worse |= {"fmt": "worse", "loss": worse["loss"] + 1, "cost": {n: c + 1 for n, c in worse["cost"].items()}}
    padded = [dict(items[0], candidates=[worse, *items[0]["candidates"]]), *items[1:]]
    assert solve(padded, budgets) == first


def item(name: str, *candidates: tuple[str, float, float]) -> dict[str, Any]:
    return {
        "name": name,
        "candidates": [{"fmt": f, "cost": {"bits": b}, "loss": x} for f, b, x in candidates],
    }


def test_ties_take_less_then_what_comes_first() -> None:
    twins = [item(n, ("int4", 4, 1.0), ("nf4", 4, 1.0), ("int8", 8, 0.0)) for n in "ab"]
    assert solve(twins, {"bits": 12}).choices == ["int8", "int4"]
    assert solve([item("a", ("big", 9, 1.0), ("small", 3, 1.0))], {"bits": 9}).choices == ["small"]


def test_bytes_decide_ties_though_no_budget_names_them() -> None:
    candidates = [{"fmt": f, "cost": {"bits": 4, "bytes": b}, "loss": 1.0} for f, b in (("x", 7), ("y", 5))]
    assert solve([{"name": "a", "candidates": candidates}], {"bits": 4}).choices == ["y"]


def test_numbers_are_the_decimals_they_print_as() -> None:
    parts = [item("a", ("x", 0.1, 0.0)), item("b", ("x", 0.2, 0.0))]
    assert solve(parts, {"bits": 0.3}).status == "optimal"
    assert solve(parts, {"bits": 0.29999999}).status == "infeasible"


def test_large_numbers_are_exact() -> None:
    """A solver's tolerance is absolute: a byte over a budget of terabytes must not slip through."""
    size = 10**12
    pair = [item(n, ("small", size, 1.0), ("large", 2 * size + 1, 0.0)) for n in "ab"]
    assert solve(pair, {"bits": 3 * size}).choices == ["small", "small"]
    assert solve(pair, {"bits": 3 * size + 1}).choices == ["large", "small"]


def test_many_items_are_fast_and_silent(capfd: pytest.CaptureFixture[str]) -> None:
    random = Random(0)
    sizes = [random.choice([552960, 331776, 1769472, 884736]) for _ in range(120)]
    formats = [("int4", 4.25), ("int8", 8.02), ("mix8", 8.11), ("none", 16)]
    items = [
        item(f"i{i}", *((f, int(b * size), random.expovariate(1) * 4.0**-b) for f, b in formats))
        for i, size in enumerate(sizes)
    ]
    budget = 6 * sum(sizes)
    got = solve(items, {"bits": budget})
    assert got.status == "optimal" and 0.99 * budget < got.cost["bits"] <= budget
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"bits": 7}, "bits cannot be below 8, the budget is 7"),
        (
            {"bits": 8, "ms": 2},
            "not all together: within the others bits cannot be below 16, the budget is 8",
        ),
    ],
)
def test_infeasible_says_what_is_possible(budgets: dict[str, float], message: str) -> None:
    candidates = [
        {"fmt": f, "cost": {"bits": b, "ms": m}, "loss": 0.0} for f, b, m in (("s", 4, 3), ("l", 8, 1))
    ]
    got = solve([{"name": n, "candidates": candidates} for n in "ab"], budgets)
    assert got.status == "infeasible" and message in got.message


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([item("a")], "item 'a' has candidates"),
        ([item("a", ("x", 1, 0.0), ("x", 2, 0.0))], "each once"),
        ([item("a", ("x", 1, float("nan")))], "no finite number"),
        ([{"name": "a", "candidates": [{"fmt": "x", "cost": {}, "loss": 0}]}], "no cost 'bits'"),
    ],
)
def test_bad_input_is_one_line(items: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        solve(items, {"bits": 8})


def test_unknown_objective() -> None:
    with pytest.raises(UserError, match="min_loss"):
        solve([item("a", ("x", 1, 0.0))], {"bits": 8}, "fastest")
