"""KL is linear in the relative squared error of a weight, by a factor that noise reveals (HIGGS).

Source: arXiv 2411.17525. Costs three passes a unit, however many candidates there are. A method whose
activations or products are approximate as well counts as the noise that changes the output as much.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lutserve.errors import UserError
from lutserve.search.candidates import Candidate, Option
from lutserve.search.operators import Function, Linear
from lutserve.search.sensitivity.kl import Meter
from lutserve.search.sensitivity.task import Scores, Task
from lutserve.search.simulation import Replace

#: relative squared errors at which the slope is taken
NOISE = (0.01, 0.02, 0.04)
#: the one that other errors of the output are compared with
_MIDDLE = NOISE[1]


def scores(task: Task) -> Scores:
    """Slope of KL against relative squared error, times that of the candidate; UserError for tables."""
    methods = {unit: [_checked(option) for option in options] for unit, options in task.candidates.items()}
    meter = Meter(task)
    found: Scores = {}
    for number, (unit, names) in enumerate(task.units.items()):
        task.done(number / len(task.units))
        damage = {}
        for level in NOISE:
            measure = partial(meter.kl, names, partial(_by_noise, unit, level))
            damage[level] = task.store.remember(f"linear|{unit}|{level}", measure)
        slope = sum(t * kl for t, kl in damage.items()) / sum(t * t for t in NOISE)
        found[unit] = {}
        for method in methods[unit]:
            error = partial(_error, task, unit, method)
            key = f"linear|{unit}|{method.key}"
            found[unit][method.name] = 0.0 if method.exact else slope * task.store.remember(key, error)
    task.done(1.0)
    return found


def _checked(option: Option) -> Candidate:
    if isinstance(option, Candidate):
        return option
    raise UserError(f"--sensitivity linear is for weights, {option.name} is a table; give fisher or kl")


def _error(task: Task, unit: str, method: Candidate) -> float:
    """Relative squared error of a unit's weights, or the noise on them that does as much to its outputs."""
    names = task.units[unit]
    if method.rounds_weights_only:
        operators = [op for name in names for op in task.simulation.operators[name]]
        return relative_error([op.weight.float() for op in operators if isinstance(op, Linear)], method)
    pair: list[Replace] = [method.replacement, partial(_by_noise, unit, _MIDDLE)]
    own, noise = _output_errors(task, names, pair)
    return _MIDDLE * own / noise


def relative_error(weights: list[Tensor], candidate: Candidate) -> float:
    """Squared error of weights over their squared norm."""
    error = sum(float((candidate.weight(w) - w).square().sum(dtype=torch.float64)) for w in weights)
    return error / sum(float(w.square().sum(dtype=torch.float64)) for w in weights)


def _output_errors(task: Task, names: Sequence[str], ways: Sequence[Replace]) -> list[float]:
    """Summed squared errors of the outputs of some layers, each way of computing them by itself."""
    errors = [0.0] * len(ways)

    def compare(operator: Linear) -> Function:
        def exact(x: Tensor) -> Tensor:
            output = operator.exact(x)
            for i, way in enumerate(ways):
                errors[i] += float((way(operator)(x) - output).square().sum(dtype=torch.float64))
            return output

        return exact

    with task.simulation.replaced(dict.fromkeys(names, compare)):
        task.simulation.hidden_of(task.windows[:1])
    return errors


def _by_noise(unit: str, level: float, operator: Linear) -> Function:
    weight = _noisy(unit, level, operator.weight.float())
    return operator.by(lambda x: x @ weight.T)


def _noisy(unit: str, level: float, weight: Tensor) -> Tensor:
    """The weight with Gaussian noise of a given relative squared error, the same on every run."""
    name = f"{unit}|{level}|{tuple(weight.shape)}"
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight.add(noise, alpha=float(level**0.5 * weight.norm() / noise.norm()))
