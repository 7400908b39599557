"""Saturating damage: published values, and sums that must hold."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutserve.search import coverage


def test_published_values(shared: Path) -> None:
    for case in json.loads((shared / "golden/bit_allocation/knapsack.json").read_text())["coverage"]:
        c, a = case["c"], case["a"]
        assert coverage.total(c, a) == pytest.approx(case["all"], abs=1e-12)
        for subset in case["subsets"]:
            assert coverage.total(c, [a[i] for i in subset["S"]]) == pytest.approx(subset["f"], abs=1e-12)
        assert coverage.attribution(c, a) == pytest.approx(case["aumann_shapley"], abs=1e-6)
        assert coverage.shares(c, case["aumann_shapley"]) == pytest.approx(a, abs=1e-6)


parts = st.lists(st.floats(0, 0.6), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.1, 5), parts)
def test_attribution_by_expanding_the_product(c: float, a: list[float]) -> None:
    """The integral of a product, term by term: the sum over subsets of (-1)^k prod / (k + 1)."""
    got = coverage.attribution(c, a)
    for i, share in enumerate(a):
        others = a[:i] + a[i + 1 :]
        terms = (
            math.prod(-x for x in subset) / (k + 1)
            for k in range(len(others) + 1)
            for subset in itertools.combinations(others, k)
        )
        assert got[i] == pytest.approx(c * share * math.fsum(terms), abs=1e-12)
    assert got.sum() == pytest.approx(coverage.total(c, a), abs=1e-12)
    assert coverage.shares(c, got) == pytest.approx(np.array(a), abs=1e-6)
