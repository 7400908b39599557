"""The formats side by side: shapes, errors on random data, SF4 by degrees of freedom, and all of APoT."""

from __future__ import annotations

from itertools import combinations, combinations_with_replacement
from statistics import fmean
from typing import Any

from lutserve import formats
from lutserve.formats import Codebook
from lutserve.quantizers.quality import DISTRIBUTIONS, sqnr_on

GROUPS = (32, 128, 256)
#: degrees of freedom of the sweep; the paper's are 3 to 7
NUS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 10, 15, 20, 50, 100)
#: what an APoT set may hold besides zero
_POWERS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)


def shape(codebook: Codebook) -> list[float]:
    """The values over the largest magnitude."""
    largest = max(-codebook.values[0], codebook.values[-1])
    return [value / largest for value in codebook.values]


def errors(codebook: Codebook) -> dict[str, dict[str, float]]:
    """SQNR in dB, rounding to nearest: by distribution, then by group size."""
    return {
        data: {f"g{group}": round(sqnr_on(data, codebook, group), 4) for group in GROUPS}
        for data in DISTRIBUTIONS
    }


def sweep() -> list[dict[str, Any]]:
    """SF4 by degrees of freedom, and NF4 as the last row (nu None)."""
    named = [(nu, formats.get(f"sf4_{nu:g}")) for nu in NUS]
    rows = [*named, (None, formats.get("nf4"))]
    return [{"nu": nu, "name": book.name, "sqnr_db": errors(book)} for nu, book in rows]


def apot() -> list[dict[str, Any]]:
    """Every 4-bit sum of powers of two, by its mean error, the best first.

    A magnitude has three bits: they choose one item from a set of four and one from a set of two, or one from
    each of three sets of two. All sets have a zero; the others are 1/2 to 1/16. Of families whose magnitudes
    are multiples of each other's one is kept, with all the sets that make it.
    """
    families: dict[tuple[float, ...], list[tuple[tuple[float, ...], ...]]] = {}
    two = [(wide, (narrow,)) for wide in combinations(_POWERS, 3) for narrow in _POWERS]
    three = [tuple((item,) for item in items) for items in combinations_with_replacement(_POWERS, 3)]
    for sets in [*two, *three]:
        sums = {0.0}
        for items in sets:
            sums = {known + item for known in sums for item in (0.0, *items)}
        largest = max(sums)
        families.setdefault(tuple(sorted(size / largest for size in sums)), []).append(sets)
    rows = []
    for magnitudes, made_of in families.items():
        name = " + ".join("{0, " + ", ".join(f"1/{1 / item:g}" for item in s) + "}" for s in made_of[0])
        book = Codebook(name, (*(-m for m in reversed(magnitudes[1:])), *magnitudes))
        rows.append(
            {
                "sets": [[list(items) for items in sets] for sets in made_of],
                "name": name,
                "known_as": "apot4" if book.values == formats.get("apot4").values else None,
                "values": list(book.values),
                "sqnr_db": errors(book),
            }
        )
    return sorted(rows, key=_mean, reverse=True)


def _mean(row: dict[str, Any]) -> float:
    """Over the distributions with both signs, in groups of 128."""
    return fmean(row["sqnr_db"][data]["g128"] for data in DISTRIBUTIONS[:3])
