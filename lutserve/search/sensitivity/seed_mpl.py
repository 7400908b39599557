"""The published rule of llm-mixed-precision: blocks of small distortion get fewer bits. A baseline.

Its distortion is the distance to a block with random weights, in effect the squared norm of the MLP's output.
Its objective is linear in bits; here a budget binds, which in the published program never happens
(`lutserve.search.seed.block_bits` is that one). One forward pass; not in nats.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lutserve.search.sensitivity.task import Scores, Task
from lutserve.search.simulation import tokens_of


def scores(task: Task) -> Scores:
    """Mean squared norm of the MLP's output, times missing bits, times the unit's share of the block."""
    simulation = task.simulation
    last = [
        simulation.arch.prefix(layer, simulation.arch.sites[-1]) for layer in range(simulation.arch.layers)
    ]
    keys = [f"seed-mpl|{name}" for name in last]
    if not all(key in task.store.known for key in keys):
        task.store.put(dict(zip(keys, _energies(task, last), strict=True)))
    block = sum(site.weights for site in simulation.arch.sites)
    found: Scores = {}
    for unit, names in task.units.items():
        distortion = task.store.known[keys[simulation.block_of(names[0])]]
        share = sum(simulation.sites[name].weights for name in names) / block
        found[unit] = {
            c.method: distortion * share * (16 - c.precision.weight) for c in task.candidates[unit]
        }
    task.done(1.0)
    return found


def _energies(task: Task, names: list[str]) -> list[float]:
    """Mean over tokens of the squared norm of each layer's output."""
    totals = [0.0] * len(names)

    def add(index: int, module: object, inputs: object, output: Tensor) -> None:
        totals[index] += float(output.square().sum(dtype=torch.float64))

    modules = [task.simulation.shards[name][0] for name in names]
    handles = [module.register_forward_hook(partial(add, i)) for i, module in enumerate(modules)]
    try:
        for number, window in enumerate(task.windows):
            task.done(number / len(task.windows))
            task.simulation.log_probs(window)
    finally:
        for handle in handles:
            handle.remove()
    return [total / tokens_of(task.windows) for total in totals]
