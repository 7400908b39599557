"""From scores and budgets to a recipe, and the recipes that it is compared with."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lutserve.errors import UserError
from lutserve.recipe import FUNCTIONS, Recipe
from lutserve.search import cost, patterns
from lutserve.search.architecture import Architecture, Site
from lutserve.search.candidates import Candidate, Option, TableCandidate
from lutserve.search.sensitivity import Scores
from lutserve.search.solver import solve
from lutserve.search.timing import Timing, tokens_of

#: what --budget may bound: mean bits of the linear layers' weights, bytes of the model, BOPs of the linear
#: layers a token, numbers in all tables, and milliseconds of all linear layers
BUDGETS = ("bits", "bytes", "bops", "entries", "ms:decode_bN", "ms:prefill_N")

#: unit -> option
Choice = dict[str, Option]


def parse_budgets(texts: Sequence[str]) -> dict[str, float]:
    """Budgets from `bits=4.25`, `bytes=120e6`, `ms:decode_b8=3`; UserError for anything else."""
    found: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        known = name in BUDGETS[:4] or tokens_of(name)
        if not known or not equals or not 0 < value < float("inf") or name in found:
            raise UserError(f"--budget {text}; allowed: {'=X, '.join(BUDGETS)}=X, each once, X and N above 0")
        found[name] = value
    if not found:
        raise UserError("give a --budget, e.g. --budget bits=4.25")
    return found


@dataclass(frozen=True)
class Space:
    """What can be chosen: units with their operators and options, in a model of known sizes.

    units: name -> operators; candidates: unit -> options. Units of linear layers hold names of `sites`,
    units of tables one name of a nonlinear site. decoder: block of each operator. function: what the table
    of each nonlinear site approximates. timing: for budgets in ms. max_patterns: kinds of decoder blocks at
    most.
    """

    arch: Architecture
    sites: Mapping[str, Site]
    units: Mapping[str, list[str]]
    candidates: Mapping[str, Sequence[Option]]
    decoder: Mapping[str, int]
    function: Mapping[str, str]
    timing: Timing | None = None
    max_patterns: int | None = None

    def costs(self, unit: str, option: Option, budgets: Mapping[str, float]) -> dict[str, float]:
        """Bits of the unit's weights, its BOPs a token, numbers in its table, microseconds by budget."""
        names = self.units[unit]
        if isinstance(option, TableCandidate):
            entries = sum(option.entries(self.function[name]) for name in names)
            return {"bits": 0, "bops": 0, "entries": entries, **dict.fromkeys(_times(budgets), 0.0)}
        sites = [self.sites[name] for name in names]
        bits = sum(option.precision.bits(site.out, site.columns) for site in sites)
        bops = sum(option.precision.bops(site.out, site.columns) for site in sites)
        times = {name: self._microseconds(sites, option, tokens) for name, tokens in _times(budgets).items()}
        return {"bits": bits, "bops": bops, "entries": 0, **times}

    def _microseconds(self, sites: Sequence[Site], option: Candidate, tokens: int) -> float:
        if self.timing is None:
            raise UserError("a budget in ms needs --timing FILE, measured times; see docs/search.md")
        # To a nanosecond, so that sums stay short decimals.
        return sum(round(self.timing.microseconds(site, option, tokens), 3) for site in sites)

    def caps(self, budgets: Mapping[str, float]) -> dict[str, float]:
        """Budgets as bounds on sums of `costs`."""
        caps: dict[str, float] = {name: budgets[name] * 1000 for name in _times(budgets)}
        caps |= {name: int(budgets[name]) for name in ("bops", "entries") if name in budgets}
        bits = []
        if "bits" in budgets:
            bits.append(int(budgets["bits"] * self.arch.linear_weights))
        if "bytes" in budgets:
            rest = (self.arch.parameters - self.arch.linear_weights) * 16
            bits.append(int(budgets["bytes"] * 8) - rest)
        return caps | ({"bits": min(bits)} if bits else {})

    def best(self, scores: Scores, budgets: Mapping[str, float]) -> tuple[Choice, float]:
        """The choice with the least summed score within the budgets, and that sum; UserError if none fits."""
        tied = {unit: [unit] for unit in self.units}
        choice, loss = self._best(scores, budgets, tied)
        if self.max_patterns is not None:
            groups = patterns.merged(self._blocks(choice), self.max_patterns)
            for units in self._alike(groups):
                for unit in units[1:]:
                    tied[units[0]] += tied.pop(unit)
            choice, loss = self._best(scores, budgets, tied)
        return choice, loss

    def _best(
        self, scores: Scores, budgets: Mapping[str, float], tied: Mapping[str, list[str]]
    ) -> tuple[Choice, float]:
        """The same, where the units that each entry of `tied` lists take the same option."""
        items: list[dict[str, Any]] = []
        for name, units in tied.items():
            options = [o for o in self.candidates[name] if all(o in self.candidates[u] for u in units)]
            candidates = []
            for option in options:
                parts = [self.costs(unit, option, budgets) for unit in units]
                total = {key: sum(part[key] for part in parts) for key in parts[0]}
                loss = sum(scores[unit][option.name] for unit in units)
                candidates.append({"fmt": option.name, "cost": total, "loss": loss})
            items.append({"name": name, "candidates": candidates})
        found = solve(items, self.caps(budgets))
        if found.status == "infeasible":
            raise UserError(f"no choice fits {budgets}: {self._least()}; {found.message}")
        choice = {
            unit: next(o for o in self.candidates[unit] if o.name == chosen)
            for units, chosen in zip(tied.values(), found.choices, strict=True)
            for unit in units
        }
        return {unit: choice[unit] for unit in self.units}, found.loss

    def _blocks(self, choice: Choice) -> dict[int, tuple[str, ...]]:
        """The pattern of every decoder block: the options of its units, in order."""
        found: dict[int, tuple[str, ...]] = {}
        for unit, option in choice.items():
            block = self.decoder[self.units[unit][0]]
            found[block] = (*found.get(block, ()), option.name)
        return found

    def _alike(self, groups: Sequence[Sequence[int]]) -> list[list[str]]:
        """Units at the same place of blocks that are to be alike."""
        at: dict[int, list[str]] = {}
        for unit, names in self.units.items():
            at.setdefault(self.decoder[names[0]], []).append(unit)
        return [
            list(units) for group in groups for units in zip(*(at[block] for block in group), strict=True)
        ]

    def _least(self) -> str:
        """The least of every budget that any choice has."""
        least = {
            name: sum(min(self.costs(u, o, {})[name] for o in of) for u, of in self.candidates.items())
            for name in ("bits", "bops", "entries")
        }
        rest = (self.arch.parameters - self.arch.linear_weights) * 16
        bits = least["bits"] / self.arch.linear_weights
        parts = f"bits={bits:.4f}, bytes={-(-(int(least['bits']) + rest) // 8)}, bops={least['bops']}"
        return f"the least possible is {parts}" + (f", entries={least['entries']}" if self.function else "")

    def fits(self, choice: Choice, budgets: Mapping[str, float]) -> bool:
        """Whether a choice keeps the budgets."""
        costs = [self.costs(unit, option, budgets) for unit, option in choice.items()]
        return all(sum(c[name] for c in costs) <= cap for name, cap in self.caps(budgets).items())

    def size(self, choice: Choice, budgets: Mapping[str, float]) -> dict[str, Any]:
        """Mean bits, bytes of the model, BOPs a token, numbers in tables, and milliseconds by budget."""
        chosen = {name: option.precision for name, option in self.linears(choice).items()}
        stored = cost.stored(self.arch, lambda layer, site: chosen[self.arch.prefix(layer, site)])
        costs = [self.costs(unit, option, budgets) for unit, option in choice.items()]
        return {
            "bits": stored["effective_bits_per_weight"],
            "bytes": stored["model_bytes"],
            "bops": stored["linear_bops_per_token"],
            "entries": sum(int(c["entries"]) for c in costs),
            "ms": {name: sum(c[name] for c in costs) / 1000 for name in _times(budgets)},
        }

    def uniform(self, budgets: Mapping[str, float]) -> dict[str, Choice]:
        """The same method everywhere, for each that keeps the budgets; with each table that does."""
        linear = [unit for unit in self.units if unit not in self.function]
        found = {}
        for option in self._shared(linear):
            for choice, name in self._with_tables(dict.fromkeys(linear, option), f"uniform {option.name}"):
                if self.fits(choice, budgets):
                    found[name] = choice
        return found

    def _with_tables(self, choice: Choice, name: str) -> list[tuple[Choice, str]]:
        """A choice of methods with each table everywhere, where there are nonlinear sites."""
        if not self.function:
            return [(choice, name)]
        tables = self._shared(list(self.function))
        return [(choice | dict.fromkeys(self.function, t), f"{name}, {t.name}") for t in tables]

    def _shared(self, units: Sequence[str]) -> list[Option]:
        """Options that all of some units have."""
        first = self.candidates[units[0]] if units else []
        return [o for o in first if all(o in self.candidates[unit] for unit in units)]

    def random(self, budgets: Mapping[str, float], seed: int) -> Choice:
        """A choice that fills the budgets at random: cheapest everywhere, then dearer ones while any fits."""
        draw, caps = random.Random(seed), self.caps(budgets)
        costs = {
            unit: {o: self.costs(unit, o, budgets) for o in options}
            for unit, options in self.candidates.items()
        }
        # The share of the budgets that an option takes.
        price = {
            unit: {o: sum(c[n] / cap for n, cap in caps.items() if cap > 0) for o, c in of.items()}
            for unit, of in costs.items()
        }
        choice = {
            unit: draw.choice([o for o in of if of[o] == min(of.values())]) for unit, of in price.items()
        }
        total = {n: sum(costs[unit][option][n] for unit, option in choice.items()) for n in caps}
        steps = [(unit, option) for unit in self.units for option in self.candidates[unit]]
        draw.shuffle(steps)
        for unit, option in steps:
            old, new = costs[unit][choice[unit]], costs[unit][option]
            after = {n: total[n] + new[n] - old[n] for n in caps}
            dearer = price[unit][option] > price[unit][choice[unit]]
            if dearer and all(after[n] <= cap for n, cap in caps.items()):
                choice[unit], total = option, after
        return choice

    def recipe(self, choice: Choice) -> Recipe:
        """The recipe that gives every fused layer its method and every nonlinear site its table.

        16-bit layers are not named.
        """
        groups: dict[str, Any] = {}
        for name, candidate in self.linears(choice).items():
            if not candidate.exact:
                group = candidate.group.model_dump() | {"targets": []}
                groups.setdefault(candidate.name, group)["targets"].append(name)
        tables = {unit: choice[unit].name for unit in self.function}
        return Recipe.model_validate({"config_groups": groups, "luts": tables})

    def linears(self, choice: Choice) -> dict[str, Candidate]:
        """The method of every fused layer."""
        options = {name: choice[unit] for unit, names in self.units.items() for name in names}
        return {name: option for name, option in options.items() if isinstance(option, Candidate)}

    def changes(self, choice: Choice) -> dict[str, Any]:
        """What a simulation replaces for a choice."""
        pairs = [(name, choice[unit]) for unit, names in self.units.items() for name in names]
        return {name: option.replacement for name, option in pairs if not option.exact}


def functions(arch: Architecture, sites: Sequence[str]) -> dict[str, str]:
    """Function of the table of each nonlinear site of a model, by the site's full name."""
    return {
        f"{arch.blocks}.{block}.{site}": FUNCTIONS[site] for block in range(arch.layers) for site in sites
    }


def _times(budgets: Mapping[str, float]) -> dict[str, int]:
    """Budgets in ms, and the tokens of each."""
    found = {name: tokens_of(name) for name in budgets}
    return {name: tokens for name, tokens in found.items() if tokens is not None}
