"""A choice made better by measuring whole recipes, where sums of isolated scores are not the whole truth.

`swap` tries the exchanges that the scores call cheapest (CASA); `evo` is a (1 + lambda) evolution whose
offspring are culled on more and more text (EvoPress, arXiv 2410.14649). Neither returns anything that
measures worse than the start on the text that it is given, and both keep the budgets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from lutserve.errors import UserError
from lutserve.search.allocate import Choice, Space
from lutserve.search.candidates import Option
from lutserve.search.sensitivity import Scores

METHODS = ("swap", "evo")
#: exchanges that a round of `swap` measures
EXCHANGES = 32
#: offspring of a round of `evo`, and how many of them survive each measurement
OFFSPRING, SURVIVORS = 16, (4, 1)
#: most units that an offspring exchanges
_MUTATIONS = 3

#: choice -> measured damage
Measure = Callable[[Choice], float]


def refine(
    method: str,
    space: Space,
    scores: Scores,
    budgets: Mapping[str, float],
    start: Choice,
    measures: Sequence[Measure],
    rounds: int,
    watch: Callable[[float], None] = lambda share: None,
) -> Choice:
    """Improve a choice.

    Args:
        method: one of METHODS.
        space: what can be chosen.
        scores: of every unit and option, to propose with.
        budgets: to keep.
        start: where to begin; must keep the budgets.
        measures: damage on little text to choose with, and on other or all text to confirm with.
        rounds: at most.
        watch: told the share that is finished.

    Raises:
        UserError: another method.

    """
    if method not in METHODS:
        raise UserError(f"--refine {method}; allowed: {', '.join(METHODS)}")
    step = _swap if method == "swap" else _evolve
    best, confirmed = start, measures[-1](start)
    draw = random.Random(0)
    refused: list[Choice] = []
    for number in range(rounds):
        watch(number / rounds)
        proposed = step(space, scores, budgets, best, measures, draw, refused)
        if proposed is None:
            break
        damage = measures[-1](proposed)
        if damage < confirmed:
            best, confirmed = proposed, damage
        else:
            refused.append(proposed)
    watch(1.0)
    return best


def _swap(
    space: Space,
    scores: Scores,
    budgets: Mapping[str, float],
    best: Choice,
    measures: Sequence[Measure],
    draw: random.Random,
    refused: Sequence[Choice],
) -> Choice | None:
    """The best of the exchanges that the scores call cheapest; None where none is better."""
    single = [
        (scores[unit][option.name] - scores[unit][best[unit].name], unit, option)
        for unit in space.units
        for option in space.candidates[unit]
        if option != best[unit]
    ]
    worse = sorted(single, key=lambda move: move[0])[: 4 * EXCHANGES]
    exchanges: dict[tuple[tuple[str, str], ...], tuple[float, Choice]] = {}
    for first in single:
        # One unit up alone, or with another one that makes room for it.
        for moves in ([first], *([first, second] for second in worse if second[1] != first[1])):
            if sum(move[0] for move in moves) > _allowance(scores, best):
                continue
            key = tuple(sorted((unit, option.name) for _, unit, option in moves))
            changed: dict[str, Option] = {unit: option for _, unit, option in moves}
            exchanges.setdefault(key, (sum(move[0] for move in moves), best | changed))
    ranked = sorted(exchanges.items(), key=lambda item: (item[1][0], item[0]))
    fitting = (choice for _, (_, choice) in ranked if choice not in refused and space.fits(choice, budgets))
    tried = [choice for choice, _ in zip(fitting, range(EXCHANGES), strict=False)]
    here, found = measures[0](best), [(measures[0](choice), i) for i, choice in enumerate(tried)]
    damage, place = min(found, default=(here, 0))
    return tried[place] if damage < here else None


def _allowance(scores: Scores, best: Choice) -> float:
    """How much worse an exchange may be by the scores to be measured at all: a tenth of the whole."""
    return 0.1 * sum(scores[unit][option.name] for unit, option in best.items())


def _evolve(
    space: Space,
    scores: Scores,
    budgets: Mapping[str, float],
    best: Choice,
    measures: Sequence[Measure],
    draw: random.Random,
    refused: Sequence[Choice],
) -> Choice | None:
    """The offspring that survives all measurements; None where there is no other choice."""
    offspring: list[Choice] = []
    for child in _mutations(space, budgets, best, draw):
        if child not in offspring and child not in refused:
            offspring.append(child)
        if len(offspring) == OFFSPRING:
            break
    for measure, survivors in zip(measures, SURVIVORS, strict=False):
        damages = [(measure(child), i) for i, child in enumerate(offspring)]
        offspring = [offspring[i] for _, i in sorted(damages)[:survivors]]
    return offspring[0] if offspring else None


def _mutations(
    space: Space, budgets: Mapping[str, float], best: Choice, draw: random.Random
) -> Iterator[Choice]:
    """Choices within the budgets that differ in a few units, up and down."""
    units = [unit for unit in space.units if len(space.candidates[unit]) > 1]
    for _ in range(100 * OFFSPRING if units else 0):
        # Few changes are likelier than many.
        count = min(draw.randint(1, _MUTATIONS), draw.randint(1, _MUTATIONS)) + 1
        child = dict(best)
        for unit in draw.sample(units, min(count, len(units))):
            child[unit] = draw.choice([o for o in space.candidates[unit] if o != best[unit]])
        if space.fits(child, budgets):
            yield child
