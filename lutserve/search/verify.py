"""Predicted against measured: recipes on text that the search has not seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lutserve.search.allocate import Choice, Space
from lutserve.search.sensitivity import Scores
from lutserve.search.simulation import Simulation


@dataclass(frozen=True)
class Row:
    """One recipe: its sizes, the summed scores, and the mean KL (nats a token) and perplexity on the text."""

    name: str
    bits: float
    bytes: float
    bops: float
    entries: int
    ms: dict[str, float]
    predicted: float
    kl: float
    perplexity: float


class Examiner:
    """Measures choices on held-out windows [L] of one length, against the unchanged model."""

    def __init__(
        self,
        simulation: Simulation,
        space: Space,
        scores: Scores,
        budgets: Mapping[str, float],
        windows: Sequence[Tensor],
    ) -> None:
        self.simulation, self.space, self.scores, self.windows = simulation, space, scores, windows
        self.budgets = budgets
        self.reference = simulation.hidden_of(windows)
        # The token that follows each; the last one of a window has none.
        self.following = torch.stack([torch.cat([w[1:], w.new_tensor([-1])]) for w in windows]).flatten()

    def kl(self, choice: Choice) -> float:
        """Mean KL of a choice, nats a token."""
        with self.simulation.replaced(self.space.changes(choice)):
            return self.simulation.kl(self.windows, self.reference)

    def row(self, name: str, choice: Choice) -> Row:
        """Measure a choice."""
        with self.simulation.replaced(self.space.changes(choice)):
            now = self.simulation.hidden_of(self.windows)
        difference = surprise = 0.0
        log_probs = self.simulation.log_probs
        with torch.no_grad():
            for (before, part), (after, _) in zip(log_probs(self.reference), log_probs(now), strict=True):
                difference += float((before.exp() * (before - after)).sum(dtype=torch.float64))
                known = self.following[part] >= 0
                chosen = after[known].gather(1, self.following[part][known, None])
                surprise -= float(chosen.sum(dtype=torch.float64))
        return Row(
            name,
            **self.space.size(choice, self.budgets),
            predicted=math.fsum(self.scores[unit][option.name] for unit, option in choice.items()),
            kl=difference / len(self.reference),
            perplexity=math.exp(surprise / int((self.following >= 0).sum())),
        )


def agreement(rows: Sequence[Row]) -> dict[str, float | None]:
    """Kendall's tau between predicted and measured KL of recipes, and their ratio for the first one.

    None where it is not defined: fewer than two different values, or nothing predicted.
    """
    from scipy.stats import kendalltau

    tau = math.nan
    if len(rows) > 1:
        tau = float(kendalltau([row.predicted for row in rows], [row.kl for row in rows]).statistic)
    first = rows[0]
    return {
        "tau": None if math.isnan(tau) else tau,
        "measured_over_predicted": first.kl / first.predicted if first.predicted else None,
    }


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain objects."""
    return [asdict(row) for row in rows]
