"""Error of the block's output on the unchanged model's input: the published idea, against the real block.

Not in nats: only the order and the ratios of the scores mean something.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lutserve.search.sensitivity.task import Scores, Task
from lutserve.search.simulation import Replace


def scores(task: Task) -> Scores:
    """Mean over tokens of the squared error of the output of the block that holds the unit."""
    found: Scores = {unit: {c.name: 0.0 for c in task.candidates[unit]} for unit in task.units}
    calls = _Calls(task)
    for unit, option in task.each():
        if not option.exact:
            measure = partial(calls.error, task.units[unit], option.replacement)
            found[unit][option.name] = task.store.remember(f"block|{unit}|{option.key}", measure)
    return found


class _Calls:
    """What every block was given on every window, and what it returned."""

    def __init__(self, task: Task) -> None:
        self.simulation, self.tokens = task.simulation, task.tokens
        self.blocks = task.simulation.blocks()
        self.seen: list[list[tuple[Any, dict[str, Any], Tensor]]] = [[] for _ in self.blocks]
        handles = [
            block.register_forward_hook(self._record(index), with_kwargs=True)
            for index, block in enumerate(self.blocks)
        ]
        try:
            task.simulation.hidden_of(task.windows)
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, index: int) -> Any:
        def hook(block: Any, inputs: Any, given: dict[str, Any], output: Any) -> None:
            self.seen[index].append((inputs, given, _hidden(output)))

        return hook

    @torch.no_grad()
    def error(self, names: list[str], replace: Replace) -> float:
        """Mean over tokens of the squared error of the block of some operators, when they are replaced."""
        index, total = self.simulation.decoder[names[0]], 0.0
        with self.simulation.replaced(dict.fromkeys(names, replace)):
            for inputs, given, before in self.seen[index]:
                after = _hidden(self.blocks[index](*inputs, **given))
                total += float((after - before).square().sum(dtype=torch.float64))
        return total / self.tokens


def _hidden(output: Any) -> Tensor:
    leaving: Tensor = output[0] if isinstance(output, tuple) else output
    return leaving
