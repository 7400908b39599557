"""How much the model suffers when one unit alone takes a candidate: predicted mean KL a token, in nats.

Every measure is a function of a `Task` that returns unit -> candidate's method -> score. A new one is one
file, and one line here. Those of `block` and `seed-mpl` are not in nats: only their order and ratios mean
something.
"""

from __future__ import annotations

from collections.abc import Callable

from lutserve.search.sensitivity import block, fisher, kl, linear, seed_mpl
from lutserve.search.sensitivity.task import Scores, Task

MEASURES: dict[str, Callable[[Task], Scores]] = {
    "fisher": fisher.scores,
    "kl": kl.scores,
    "linear": linear.scores,
    "block": block.scores,
    "seed-mpl": seed_mpl.scores,
}

__all__ = ["MEASURES", "Scores", "Task"]
