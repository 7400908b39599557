"""Linearity: KL grows with the relative squared error of a weight, by a factor that noise reveals (HIGGS).

Source: arXiv 2411.17525. Costs three passes a unit, however many candidates there are.
"""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from torch import Tensor

from lutserve.search.candidates import Candidate
from lutserve.search.sensitivity.kl import Meter
from lutserve.search.sensitivity.task import Scores, Task
from lutserve.search.simulation import weight_of

#: relative squared errors at which the slope is taken
NOISE = (0.01, 0.02, 0.04)


def scores(task: Task) -> Scores:
    """Slope of KL against relative squared error, times that of the candidate."""
    meter = Meter(task)
    found: Scores = {}
    for number, (unit, names) in enumerate(task.units.items()):
        task.done(number / len(task.units))
        damage = {}
        for level in NOISE:
            measure = partial(meter.kl, names, partial(_noisy, unit, level))
            damage[level] = task.store.remember(f"linear|{unit}|{level}", measure)
        slope = sum(t * kl for t, kl in damage.items()) / sum(t * t for t in NOISE)
        weights = [weight_of(module) for name in names for module in task.simulation.shards[name]]
        found[unit] = {c.method: slope * relative_error(weights, c) for c in task.candidates[unit]}
    task.done(1.0)
    return found


def relative_error(weights: list[Tensor], candidate: Candidate) -> float:
    """Squared error of weights over their squared norm."""
    error = sum(float((candidate.weight(w) - w).square().sum(dtype=torch.float64)) for w in weights)
    return error / sum(float(w.square().sum(dtype=torch.float64)) for w in weights)


def _noisy(unit: str, level: float, weight: Tensor) -> Tensor:
    """The weight with Gaussian noise of a given relative squared error, the same on every run."""
    name = f"{unit}|{level}|{tuple(weight.shape)}"
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight.add(noise, alpha=float(level**0.5 * weight.norm() / noise.norm()))
