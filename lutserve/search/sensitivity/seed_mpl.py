"""The published rule of llm-mixed-precision: blocks of small distortion get fewer bits. A baseline.

Its distortion is the distance to a block with random weights, in effect the squared norm of the MLP's output.
Its objective is linear in bits; here a budget binds, which in the published program never happens
(`lutserve.search.seed.block_bits` is that one). One forward pass; not in nats.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lutserve.errors import UserError
from lutserve.search.candidates import Candidate
from lutserve.search.operators import Function, Operator
from lutserve.search.sensitivity.task import Scores, Task


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
        distortion = task.store.known[keys[simulation.decoder[names[0]]]]
        found[unit] = {}
        for option in task.candidates[unit]:
            if not isinstance(option, Candidate):
                raise UserError("--sensitivity seed-mpl knows bits only, no tables; give fisher or kl")
            share = sum(simulation.sites[name].weights for name in names) / block
            found[unit][option.name] = distortion * share * (16 - option.precision.weight)
    task.done(1.0)
    return found


def _energies(task: Task, names: list[str]) -> list[float]:
    """Mean over tokens of the squared norm of each layer's output."""
    totals = dict.fromkeys(names, 0.0)

    def add(name: str, operator: Operator) -> Function:
        def watched(x: Tensor) -> Tensor:
            output = operator.exact(x)
            totals[name] += float(output.square().sum(dtype=torch.float64))
            return output

        return watched

    with task.simulation.replaced({name: partial(add, name) for name in names}):
        task.simulation.hidden_of(task.windows)
    return [total / task.tokens for total in totals.values()]
