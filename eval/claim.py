"""Whether finished cells show what a matrix claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lutserve.eval import store
from lutserve.eval.matrix import Claim, Matrix

#: metrics of which less is better; all others are shares of right answers
_LOWER = ("ppl", "nll", "perplexity", "bits_per_byte", "brier_score", "kl", "flip_rate")


@dataclass(frozen=True)
class Verdict:
    """What became of a claim."""

    claim: Claim
    holds: bool
    #: the number found beside the number claimed
    reason: str


def check(matrix: Matrix, rows: list[store.Row]) -> list[Verdict]:
    """Return a verdict on every claim about the matrix's models; without its cells none holds."""
    cells = {(row["model"], row["recipe"], row["task"]): row for row in rows}
    return [_verdict(claim, matrix.base, cells) for claim in matrix.claims if claim.model in matrix.models]


def _verdict(claim: Claim, base: str, cells: dict[Any, store.Row]) -> Verdict:
    values = [
        cells.get((claim.model, recipe, claim.task), {}).get("metrics", {}).get(claim.metric, {}).get("value")
        for recipe in (claim.recipe, base)
    ]
    value, baseline = values
    if value is None or (claim.recovery is not None and baseline is None):
        return Verdict(
            claim, False, f"no {claim.metric} of {claim.recipe if value is None else base} was found"
        )
    holds, reasons = True, []
    if claim.expected is not None:
        holds &= abs(value - claim.expected) <= claim.tolerance * abs(claim.expected)
        reasons.append(f"{value:.4g}, expected {claim.expected:.4g} ± {claim.tolerance:.2%}")
    if claim.recovery is not None:
        found = recovery(claim.metric, value, baseline)
        holds &= found >= claim.recovery
        reasons.append(f"{found:.2%} of {base}, at least {claim.recovery:.2%}")
    return Verdict(claim, holds, "; ".join(reasons))


def lower_is_better(metric: str) -> bool:
    """Whether less of `metric` is better."""
    return metric.endswith(_LOWER)


def recovery(metric: str, value: float, baseline: float) -> float:
    """Share of the baseline's quality: value / baseline, or baseline / value where less is better."""
    above, below = (baseline, value) if lower_is_better(metric) else (value, baseline)
    return above / below if below else float("inf") if above else 1.0
