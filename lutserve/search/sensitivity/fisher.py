"""Second order in the outputs: 1/2 sum of (gradient x change)^2, from one forward and backward pass.

The gradient is that of the log-likelihood of labels drawn from the model itself, so its square is the true
Fisher information and the score is in nats.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lutserve.search.operators import Operator
from lutserve.search.sensitivity.task import Scores, Task
from lutserve.search.simulation import batches


def scores(task: Task) -> Scores:
    """Mean over tokens of 1/2 sum over outputs of g^2 dY^2, on the unchanged model's inputs."""
    found: Scores = {unit: {c.name: 0.0 for c in task.candidates[unit]} for unit in task.units}
    work = list(batches(task.windows))
    for number, batch in enumerate(work):
        names = {
            (unit, c.name): f"fisher|{number}|{unit}|{c.key}"
            for unit in task.units
            for c in task.candidates[unit]
        }
        if not all(name in task.store.known for name in names.values()):
            sums = _Pass(task, number, len(work)).run(batch)
            task.store.put({name: sums.get(pair, 0.0) for pair, name in names.items()})
        for (unit, option), name in names.items():
            found[unit][option] += task.store.known[name] / (2 * task.tokens)
        task.done((number + 1) / len(work))
    return found


class _Pass:
    """A few windows: the gradient of each output meets the change of that output as it arrives."""

    def __init__(self, task: Task, number: int, count: int) -> None:
        self.task, self.number, self.count = task, number, count
        self.sums: dict[tuple[str, str], float] = {}
        self.operators = [
            (unit, operator)
            for unit, names in task.units.items()
            for name in names
            for operator in task.simulation.operators[name]
        ]
        self.seen = 0

    def run(self, batch: Tensor) -> dict[tuple[str, str], float]:
        """Sums over positions and outputs of g^2 dY^2, by unit and option."""
        simulation = self.task.simulation
        # The parameters need no gradient, so the embeddings must ask for one.
        handle = simulation.model.get_input_embeddings().register_forward_hook(_ask)
        for unit, operator in self.operators:
            operator.observe = partial(self._add, unit, operator)
        try:
            with torch.enable_grad(), simulation.checkpointed():
                hidden = simulation.hidden(batch)
                leaf = hidden.detach().requires_grad_()
                generator = torch.Generator().manual_seed(self.number)
                for logs, _ in simulation.log_probs(leaf):
                    labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
                    logs.gather(-1, labels).sum().backward()
                hidden.backward(leaf.grad)
        finally:
            handle.remove()
            for _, operator in self.operators:
                operator.observe = None
        return self.sums

    def _add(self, unit: str, operator: Operator, gradient: Tensor, inputs: tuple[Tensor, ...]) -> None:
        before = operator.exact(*inputs)
        for option in self.task.candidates[unit]:
            if not option.exact:
                change = option.replacement(operator)(*inputs).sub_(before)  # type: ignore[arg-type]
                key = unit, option.name
                damage = float(change.mul_(gradient).square_().sum(dtype=torch.float64))
                self.sums[key] = self.sums.get(key, 0.0) + damage
        self.seen += 1
        self.task.done((self.number + self.seen / len(self.operators)) / self.count)


def _ask(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(True)
