"""Isolated output KL: the model with one unit changed, for every unit and candidate.

Source: ZeroQ, arXiv 2001.00281, section 3.2.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from lutserve.search.sensitivity.task import Scores, Task
from lutserve.search.simulation import Change, Simulation, tokens_of


def scores(task: Task) -> Scores:
    """Mean over tokens of KL(p || p with the unit changed), measured."""
    meter = Meter(task)
    found: Scores = {unit: {} for unit in task.units}
    for unit, candidate in task.each():
        measure = partial(meter.kl, task.units[unit], candidate.weight)
        name = f"kl|{unit}|{candidate.key}"
        found[unit][candidate.method] = (
            0.0 if candidate.method == "none" else task.store.remember(name, measure)
        )
    return found


class Meter:
    """Mean KL of a changed model, against the unchanged one that it is made with."""

    def __init__(self, task: Task) -> None:
        self.simulation: Simulation = task.simulation
        self.windows = task.windows
        self.reference: list[Tensor] = [self.simulation.log_probs(window) for window in self.windows]

    def kl(self, names: list[str], change: Change) -> float:
        """Nats a token, with the change made to the weights of fused layers."""
        with self.simulation.changed(dict.fromkeys(names, change)):
            pairs = zip(self.windows, self.reference, strict=True)
            return sum(self.simulation.kl(*pair) for pair in pairs) / tokens_of(self.windows)
