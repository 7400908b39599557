"""`lutserve search`: measure, choose, verify."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lutserve import env
from lutserve.errors import UserError
from lutserve.quantizers import calibration
from lutserve.recipe import Recipe
from lutserve.search.allocate import Space
from lutserve.search.candidates import Candidate, allowed
from lutserve.search.sensitivity import MEASURES, Scores, Task
from lutserve.search.sensitivity.task import Store
from lutserve.search.simulation import Simulation, units
from lutserve.search.verify import Examiner, Row, agreement, as_json

Watch = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """What `lutserve search` is asked to do, checked.

    candidates: what a layer may become. budgets: see `allocate.BUDGETS`. sensitivity: a key of MEASURES.
    granularity: `site` (a fused layer) or `block`. samples, held_out: windows of text for the scores and for
    the verification, of `length` tokens each. randoms: random recipes to compare with.
    tensor_parallel: devices that the result must fit. sweep: further values of the first budget.
    """

    candidates: Sequence[Candidate]
    budgets: Mapping[str, float]
    sensitivity: str = "fisher"
    granularity: str = "site"
    samples: int = 16
    held_out: int = 4
    length: int = 512
    randoms: int = 8
    tensor_parallel: int = 1
    sweep: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.sensitivity not in MEASURES:
            raise UserError(f"--sensitivity {self.sensitivity}; allowed: {', '.join(MEASURES)}")
        if min(self.samples, self.held_out, self.tensor_parallel) < 1 or self.length < 2 or self.randoms < 0:
            raise UserError(
                "--samples, --held-out and --tp must be 1 or more, --length 2 or more, --random 0"
            )


@dataclass
class Result:
    """A recipe, and how it compares: the first of `rows` is its own; `sweep` has a row for each budget."""

    recipe: Recipe
    rows: list[Row]
    sweep: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """Everything but the recipe, as JSON."""
        return self.facts | {"rows": as_json(self.rows), "sweep": as_json(self.sweep)}


def search(
    folder: Path,
    settings: Settings,
    text: str = calibration.DEFAULT,
    watch: Watch = lambda what, share: None,
) -> Result:
    """Find the recipe with the least predicted damage within the budgets, and measure it.

    Args:
        folder: Hugging Face folder with safetensors.
        settings: what to do.
        text: where the text comes from, see `quantizers.calibration.windows`.
        watch: told what is being done and which share of it is finished.

    Scores are kept in the cache folder under the content of model, text and measure, so a run that was
    interrupted goes on, and another budget costs no new measurement.

    Raises:
        UserError: a model, text or budget that cannot be.

    """
    texts = calibration.windows(text, folder, settings.samples + settings.held_out, settings.length)
    watch("loading", 0.0)
    simulation = Simulation(folder)
    space = _space(simulation, settings)
    # Budgets that cannot be met are refused before anything is measured.
    space.best({unit: {c.method: 0.0 for c in cs} for unit, cs in space.candidates.items()}, settings.budgets)
    seen, unseen = texts[: settings.samples], texts[settings.samples :]
    task = Task(
        simulation,
        space.units,
        space.candidates,
        seen,
        Store(_cache_file(simulation, settings, seen)),
        lambda share: watch(settings.sensitivity, share),
    )
    scores = MEASURES[settings.sensitivity](task)
    return _verify(simulation, space, scores, settings, unseen, watch)


def _space(simulation: Simulation, settings: Settings) -> Space:
    """What can be chosen, without what does not fit a layer."""
    groups = units(simulation, settings.granularity)
    fitting = {
        name: allowed(site, settings.candidates, settings.tensor_parallel)
        for name, site in simulation.sites.items()
    }
    choices = {
        unit: [c for c in settings.candidates if all(c in fitting[name] for name in names)]
        for unit, names in groups.items()
    }
    return Space(simulation.arch, simulation.sites, groups, choices)


def _verify(
    simulation: Simulation,
    space: Space,
    scores: Scores,
    settings: Settings,
    windows: Sequence[Tensor],
    watch: Watch,
) -> Result:
    """Measure the best choice, uniform and random ones within the same budgets, and those of the sweep."""
    best, _ = space.best(scores, settings.budgets)
    name = next(iter(settings.budgets))
    compared = {"found": best} | space.uniform(settings.budgets)
    compared |= {f"random {i}": space.random(settings.budgets, i) for i in range(settings.randoms)}
    swept = {
        f"{name}={value:g}": space.best(scores, {**settings.budgets, name: value})[0]
        for value in settings.sweep
    }
    examiner = Examiner(simulation, space, scores, windows)
    rows: list[Row] = []
    for label, choice in [*compared.items(), *swept.items()]:
        watch("verifying", len(rows) / (len(compared) + len(swept)))
        rows.append(examiner.row(label, choice))
    watch("verifying", 1.0)
    own = rows[: len(compared)]
    facts = {
        "schema": "lutserve-search-1",
        "sensitivity": settings.sensitivity,
        "granularity": settings.granularity,
        "candidates": [c.key for c in settings.candidates],
        "budgets": dict(settings.budgets),
        "windows": {"samples": settings.samples, "held_out": settings.held_out, "length": settings.length},
        "agreement": agreement(own),
        "scores": scores,
    }
    return Result(space.recipe(best), own, rows[len(compared) :], facts)


def _cache_file(simulation: Simulation, settings: Settings, windows: Sequence[Tensor]) -> Path:
    """Where the scores of this model, text and measure are kept."""
    total = hashlib.sha256(simulation.digest().encode())
    for window in windows:
        total.update(window.numpy().tobytes())
    total.update(f"{settings.length} {settings.granularity} 1".encode())
    return env.cache_dir() / "search" / f"{settings.sensitivity}-{total.hexdigest()[:16]}.jsonl"
