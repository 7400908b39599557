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
from lutserve.recipe import SITES, Recipe
from lutserve.search import refine
from lutserve.search.allocate import Choice, Space, functions
from lutserve.search.candidates import Candidate, Option, TableCandidate, allowed
from lutserve.search.sensitivity import MEASURES, Scores, Task
from lutserve.search.sensitivity.task import Store
from lutserve.search.simulation import Simulation, units
from lutserve.search.timing import Timing
from lutserve.search.verify import Examiner, Row, agreement, as_json

Watch = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """What `lutserve search` is asked to do, checked.

    candidates: what a linear layer may become. budgets: see `allocate.BUDGETS`. sensitivity: a key of
    MEASURES. granularity: `site` (a fused layer) or `block`. samples, held_out: windows of text for the
    scores and for the verification, of `length` tokens each. randoms: random recipes to compare with.
    tensor_parallel: devices that the result must fit. sweep: further values of the first budget.
    tables: what a nonlinear site of `lut_sites` may read. timing: for budgets in ms. max_patterns: kinds of
    decoder blocks at most. refine: swap, evo or none, in at most `rounds` rounds.
    """

    candidates: Sequence[Candidate]
    budgets: Mapping[str, float]
    sensitivity: str = "fisher"
    granularity: str = "site"
    samples: int = 8
    held_out: int = 4
    length: int = 512
    randoms: int = 8
    tensor_parallel: int = 1
    sweep: Sequence[float] = ()
    tables: Sequence[TableCandidate] = ()
    lut_sites: Sequence[str] = ()
    timing: Timing | None = None
    max_patterns: int | None = None
    refine: str = "none"
    rounds: int = 8

    def __post_init__(self) -> None:
        if self.sensitivity not in MEASURES:
            raise UserError(f"--sensitivity {self.sensitivity}; allowed: {', '.join(MEASURES)}")
        if min(self.samples, self.held_out, self.tensor_parallel) < 1 or self.length < 2 or self.randoms < 0:
            raise UserError(
                "--samples, --held-out and --tp must be 1 or more, --length 2 or more, --random 0"
            )
        if self.refine not in ("none", *refine.METHODS):
            raise UserError(f"--refine {self.refine}; allowed: none, {', '.join(refine.METHODS)}")
        if self.refine != "none" and self.max_patterns is not None:
            raise UserError("--refine changes single units and would undo --max-patterns; give one of them")
        if self.rounds < 1 or (self.max_patterns is not None and self.max_patterns < 1):
            raise UserError("--rounds and --max-patterns must be 1 or more")
        if bool(self.tables) != ("entries" in self.budgets):
            raise UserError(
                "--luts and a budget of entries go together: without a limit every site would stay exact, "
                "and without tables there is nothing to limit"
            )
        for site in self.lut_sites:
            if site not in SITES or site == "softmax_recip":
                able = ", ".join(name for name in SITES if name != "softmax_recip")
                raise UserError(f"--lut-sites {site}; a search can choose tables for {able}")
        if bool(self.tables) != bool(self.lut_sites):
            raise UserError("--luts and --lut-sites go together: which tables, and for which sites")


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
    simulation = Simulation(folder, settings.lut_sites)
    space = space_of(simulation, settings)
    # Budgets that cannot be met are refused before anything is measured.
    space.best({unit: {o.name: 0.0 for o in os} for unit, os in space.candidates.items()}, settings.budgets)
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
    best, _ = space.best(scores, settings.budgets)
    if settings.refine != "none":
        best = _refined(simulation, space, scores, settings, best, seen, watch)
    return _verify(simulation, space, scores, settings, best, unseen, watch)


def space_of(simulation: Simulation, settings: Settings) -> Space:
    """What can be chosen, without what does not fit a layer."""
    groups = units(simulation, settings.granularity)
    fitting = {
        name: allowed(site, settings.candidates, settings.tensor_parallel)
        for name, site in simulation.sites.items()
    }
    choices: dict[str, list[Option]] = {}
    for unit, names in groups.items():
        choices[unit] = [c for c in settings.candidates if all(c in fitting[name] for name in names)]
        if not choices[unit]:
            raise UserError(f"{unit}: no candidate fits all its layers; give more, or --granularity site")
    tabled = functions(simulation.arch, settings.lut_sites)
    choices |= {name: list(settings.tables) for name in tabled}
    return Space(
        simulation.arch,
        simulation.sites,
        groups | {name: [name] for name in tabled},
        choices,
        simulation.decoder,
        tabled,
        settings.timing,
        settings.max_patterns,
    )


def _refined(
    simulation: Simulation,
    space: Space,
    scores: Scores,
    settings: Settings,
    start: Choice,
    windows: Sequence[Tensor],
    watch: Watch,
) -> Choice:
    """The choice after measurements on the text of the scores, half of it to choose, the rest to confirm."""
    half = max(1, len(windows) // 2)
    examiners = [
        Examiner(simulation, space, scores, settings.budgets, part)
        for part in (windows[:half], windows[half:] or windows)
    ]
    measures = [examiner.kl for examiner in examiners]
    return refine.refine(
        settings.refine,
        space,
        scores,
        settings.budgets,
        start,
        measures,
        settings.rounds,
        lambda share: watch(settings.refine, share),
    )


def _verify(
    simulation: Simulation,
    space: Space,
    scores: Scores,
    settings: Settings,
    best: Choice,
    windows: Sequence[Tensor],
    watch: Watch,
) -> Result:
    """Measure the choice, uniform and random ones within the same budgets, and those of the sweep."""
    name, budgets = next(iter(settings.budgets)), settings.budgets
    compared = {"found": best} | space.uniform(budgets)
    drawn = {f"random {i}": space.random(budgets, i) for i in range(settings.randoms)}
    # Filling one budget may break another.
    compared |= {label: choice for label, choice in drawn.items() if space.fits(choice, budgets)}
    swept = {f"{name}={value:g}": space.best(scores, {**budgets, name: value})[0] for value in settings.sweep}
    examiner = Examiner(simulation, space, scores, budgets, windows)
    rows: list[Row] = []
    for label, choice in [*compared.items(), *swept.items()]:
        watch("verifying", len(rows) / (len(compared) + len(swept)))
        rows.append(examiner.row(label, choice))
    watch("verifying", 1.0)
    own = rows[: len(compared)]
    facts = {
        "schema": "lutserve-search-2",
        "sensitivity": settings.sensitivity,
        "refine": settings.refine,
        "granularity": settings.granularity,
        "candidates": [c.key for c in settings.candidates],
        "tables": [t.key for t in settings.tables],
        "budgets": dict(budgets),
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
    # The last number changes with what the same names mean.
    total.update(f"{settings.length} {settings.granularity} {sorted(settings.lut_sites)} 2".encode())
    return env.cache_dir() / "search" / f"{settings.sensitivity}-{total.hexdigest()[:16]}.jsonl"
