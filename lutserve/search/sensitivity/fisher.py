"""Second order in the outputs: 1/2 sum of (gradient x change)^2, from one forward and backward pass.

The gradient is that of the log-likelihood of labels drawn from the model itself, so its square is the true
Fisher information and the score is in nats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lutserve.search.candidates import Candidate
from lutserve.search.sensitivity.task import Scores, Task
from lutserve.search.simulation import tokens_of, weight_of


def scores(task: Task) -> Scores:
    """Mean over tokens of 1/2 sum over outputs of g^2 (x dW^T)^2, on the unchanged model's inputs."""
    found: Scores = {unit: {c.method: 0.0 for c in task.candidates[unit]} for unit in task.units}
    for number, window in enumerate(task.windows):
        names = {
            (unit, c.method): f"fisher|{number}|{unit}|{c.key}"
            for unit in task.units
            for c in task.candidates[unit]
        }
        if not all(name in task.store.known for name in names.values()):
            sums = _Pass(task, number).run(window)
            task.store.put({name: sums.get(pair, 0.0) for pair, name in names.items()})
        for (unit, method), name in names.items():
            found[unit][method] += task.store.known[name] / (2 * tokens_of(task.windows))
        task.done((number + 1) / len(task.windows))
    return found


class _Pass:
    """One window: the gradient of each output meets the change of that output as it arrives."""

    def __init__(self, task: Task, number: int) -> None:
        self.task, self.number = task, number
        self.sums: dict[tuple[str, str], float] = {}
        self.left = self.shards = 0

    def run(self, window: Tensor) -> dict[tuple[str, str], float]:
        """Sums over positions and outputs of g^2 dY^2, by unit and method."""
        model = self.task.simulation.model
        # The parameters need no gradient, so the embeddings must ask for one.
        handles = [model.get_input_embeddings().register_forward_hook(_ask)]
        for unit, names in self.task.units.items():
            modules = [module for name in names for module in self.task.simulation.shards[name]]
            handles += [module.register_forward_hook(self._watch(unit)) for module in modules]
            self.shards += len(modules)
        self.left = self.shards
        try:
            with torch.enable_grad():
                logs = model(window[None], use_cache=False).logits[0].float().log_softmax(-1)
                generator = torch.Generator().manual_seed(self.number)
                labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
                logs.gather(-1, labels).sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        return self.sums

    def _watch(self, unit: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda gradient: self._add(unit, module, x, gradient.flatten(0, -2)))

        return hook

    @torch.no_grad()
    def _add(self, unit: str, module: Any, x: Tensor, gradient: Tensor) -> None:
        weight = weight_of(module)
        square = gradient.square()
        for candidate in self.task.candidates[unit]:
            if candidate.method != "none":
                key = unit, candidate.method
                self.sums[key] = self.sums.get(key, 0.0) + _damage(candidate, weight, x, square)
        self.left -= 1
        self.task.done((self.number + 1 - self.left / self.shards) / len(self.task.windows))


def _damage(candidate: Candidate, weight: Tensor, x: Tensor, square: Tensor) -> float:
    change = x @ (candidate.weight(weight) - weight).T
    return float(change.square_().mul_(square).sum(dtype=torch.float64))


def _ask(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(True)
