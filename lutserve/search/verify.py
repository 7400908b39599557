"""Predicted against measured: recipes on text that the search has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lutserve.search.allocate import Choice, Space
from lutserve.search.sensitivity import Scores
from lutserve.search.simulation import Simulation, tokens_of


@dataclass(frozen=True)
class Row:
    """One recipe: its sizes, the summed scores, and the mean KL (nats a token) and perplexity on the text."""

    name: str
    bits: float
    bytes: float
    bops: float
    predicted: float
    kl: float
    perplexity: float


class Examiner:
    """Measures choices on held-out windows [L], against the unchanged model."""

    def __init__(
        self, simulation: Simulation, space: Space, scores: Scores, windows: Sequence[Tensor]
    ) -> None:
        self.simulation, self.space, self.scores, self.windows = simulation, space, scores, windows
        self.reference = [simulation.log_probs(window) for window in windows]

    def row(self, name: str, choice: Choice) -> Row:
        """Measure a choice."""
        difference = surprise = 0.0
        with self.simulation.applied(self.space.layers(choice)):
            for window, before in zip(self.windows, self.reference, strict=True):
                now = self.simulation.log_probs(window)
                difference += float((before.exp() * (before - now)).sum(dtype=torch.float64))
                surprise -= float(now[:-1].gather(1, window[1:, None]).sum(dtype=torch.float64))
        tokens = tokens_of(self.windows)
        return Row(
            name,
            **self.space.size(choice),
            predicted=math.fsum(self.scores[unit][c.method] for unit, c in choice.items()),
            kl=difference / tokens,
            perplexity=math.exp(surprise / (tokens - len(self.windows))),
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
