"""Isolated output KL: the model with one unit changed, for every unit and candidate.

Source: ZeroQ, arXiv 2001.00281, section 3.2.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from lutserve.search.sensitivity.task import Scores, Task
from lutserve.search.simulation import Replace, Simulation


def scores(task: Task) -> Scores:
    """Mean over tokens of KL(p || p with the unit changed), measured."""
    meter = Meter(task)
    found: Scores = {unit: {} for unit in task.units}
    for unit, option in task.each():
        measure = partial(meter.kl, task.units[unit], option.replacement)
        name = f"kl|{unit}|{option.key}"
        found[unit][option.name] = 0.0 if option.exact else task.store.remember(name, measure)
    return found


class Meter:
    """Mean KL of a changed model, against the unchanged one that it is made with."""

    def __init__(self, task: Task) -> None:
        self.simulation: Simulation = task.simulation
        self.windows = task.windows
        self.reference: Tensor = self.simulation.hidden_of(self.windows)

    def kl(self, names: list[str], replace: Replace) -> float:
        """Nats a token, with the operators of some sites replaced."""
        with self.simulation.replaced(dict.fromkeys(names, replace)):
            return self.simulation.kl(self.windows, self.reference)
