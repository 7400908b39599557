"""From scores and budgets to a recipe, and the recipes that it is compared with."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lutserve.errors import UserError
from lutserve.recipe import Recipe
from lutserve.search import cost
from lutserve.search.architecture import Architecture, Site
from lutserve.search.candidates import Candidate
from lutserve.search.sensitivity import Scores
from lutserve.search.solver import solve

#: what --budget may bound: mean bits of the linear layers' weights, bytes of the model, BOPs of the linear
#: layers a token
BUDGETS = ("bits", "bytes", "bops")

#: unit -> candidate
Choice = dict[str, Candidate]


def parse_budgets(texts: Sequence[str]) -> dict[str, float]:
    """Budgets from `bits=4.25`, `bytes=120e6`, `bops=7e9`; UserError for anything else."""
    found: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in BUDGETS or not equals or not 0 < value < float("inf") or name in found:
            raise UserError(f"--budget {text}; allowed: {'=X, '.join(BUDGETS)}=X, each once, X above 0")
        found[name] = value
    if not found:
        raise UserError("give a --budget, e.g. --budget bits=4.25")
    return found


@dataclass(frozen=True)
class Space:
    """What can be chosen: units with their fused layers and candidates, in a model of known sizes."""

    arch: Architecture
    sites: Mapping[str, Site]
    units: Mapping[str, list[str]]
    candidates: Mapping[str, Sequence[Candidate]]

    def costs(self, unit: str, candidate: Candidate) -> dict[str, int]:
        """Bits of the unit's weights, and its BOPs a token."""
        sites = [self.sites[name] for name in self.units[unit]]
        bits = sum(candidate.precision.bits(site.out, site.columns) for site in sites)
        return {"bits": bits, "bops": sum(candidate.precision.bops(s.out, s.columns) for s in sites)}

    def caps(self, budgets: Mapping[str, float]) -> dict[str, int]:
        """Budgets as bounds on sums of `costs`."""
        caps = {}
        if "bops" in budgets:
            caps["bops"] = int(budgets["bops"])
        bits = []
        if "bits" in budgets:
            bits.append(int(budgets["bits"] * self.arch.linear_weights))
        if "bytes" in budgets:
            rest = (self.arch.parameters - self.arch.linear_weights) * 16
            bits.append(int(budgets["bytes"] * 8) - rest)
        return caps | ({"bits": min(bits)} if bits else {})

    def best(self, scores: Scores, budgets: Mapping[str, float]) -> tuple[Choice, float]:
        """The choice with the least summed score within the budgets, and that sum; UserError if none fits."""
        items: list[dict[str, Any]] = [
            {
                "name": unit,
                "candidates": [
                    {"fmt": c.method, "cost": self.costs(unit, c), "loss": scores[unit][c.method]}
                    for c in self.candidates[unit]
                ],
            }
            for unit in self.units
        ]
        found = solve(items, self.caps(budgets))
        if found.status == "infeasible":
            raise UserError(f"no choice fits {budgets}: {self._least()}; {found.message}")
        choice = {
            unit: next(c for c in self.candidates[unit] if c.method == method)
            for unit, method in zip(self.units, found.choices, strict=True)
        }
        return choice, found.loss

    def _least(self) -> str:
        """The least of every budget that any choice has."""
        cheapest = {
            unit: min(candidates, key=lambda c: c.precision.bits(1 << 20, 1 << 20))
            for unit, candidates in self.candidates.items()
        }
        least = self.size(cheapest)
        bops = sum(min(self.costs(u, c)["bops"] for c in self.candidates[u]) for u in self.units)
        return f"the least possible is bits={least['bits']:.4f}, bytes={least['bytes']}, bops={bops}"

    def fits(self, choice: Choice, budgets: Mapping[str, float]) -> bool:
        """Whether a choice keeps the budgets."""
        total = self._total(choice)
        return all(total[name] <= cap for name, cap in self.caps(budgets).items())

    def size(self, choice: Choice) -> dict[str, float]:
        """Mean bits, bytes of the model, BOPs a token."""
        chosen = {name: candidate.precision for name, candidate in self.layers(choice).items()}
        stored = cost.stored(self.arch, lambda layer, site: chosen[self.arch.prefix(layer, site)])
        return {
            "bits": stored["effective_bits_per_weight"],
            "bytes": stored["model_bytes"],
            "bops": stored["linear_bops_per_token"],
        }

    def uniform(self, budgets: Mapping[str, float]) -> dict[str, Choice]:
        """The same candidate everywhere, for each that all units have and that keeps the budgets."""
        shared = [
            c
            for c in self.candidates[next(iter(self.units))]
            if all(c in v for v in self.candidates.values())
        ]
        choices = {f"uniform {c.method}": dict.fromkeys(self.units, c) for c in shared}
        return {name: choice for name, choice in choices.items() if self.fits(choice, budgets)}

    def random(self, budgets: Mapping[str, float], seed: int) -> Choice:
        """A choice that fills the budgets at random: cheapest everywhere, then better ones while any fits."""
        draw = random.Random(seed)
        bits = {unit: {c: self.costs(unit, c)["bits"] for c in cs} for unit, cs in self.candidates.items()}
        choice = {
            unit: draw.choice([c for c in of if of[c] == min(of.values())]) for unit, of in bits.items()
        }
        steps = [(unit, c) for unit in self.units for c in self.candidates[unit]]
        draw.shuffle(steps)
        for unit, candidate in steps:
            changed = choice | {unit: candidate}
            if bits[unit][candidate] > bits[unit][choice[unit]] and self.fits(changed, budgets):
                choice = changed
        return choice

    def recipe(self, choice: Choice) -> Recipe:
        """The recipe that gives every fused layer its candidate; 16-bit layers are not named."""
        groups: dict[str, Any] = {}
        for name, candidate in self.layers(choice).items():
            if candidate.method != "none":
                group = candidate.group.model_dump() | {"targets": []}
                groups.setdefault(candidate.method, group)["targets"].append(name)
        return Recipe.model_validate({"config_groups": groups})

    def layers(self, choice: Choice) -> dict[str, Candidate]:
        """The candidate of every fused layer."""
        return {name: choice[unit] for unit, names in self.units.items() for name in names}

    def _total(self, choice: Choice) -> dict[str, int]:
        costs = [self.costs(unit, candidate) for unit, candidate in choice.items()]
        return {name: sum(c[name] for c in costs) for name in ("bits", "bops")}
