"""What a measure is given: the model, the text, the units with their candidates, and a memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lutserve.search.candidates import Option
from lutserve.search.simulation import Simulation

Scores = dict[str, dict[str, float]]


class Store:
    """Numbers by name in a file of JSON lines, so that an interrupted run goes on where it was."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, float] = {}
        if file.is_file():
            for line in file.read_text().splitlines():
                try:
                    self.known |= json.loads(line)
                except ValueError:
                    break  # the run was stopped while it wrote this line

    def put(self, values: Mapping[str, float]) -> None:
        """Add numbers, all of them or none."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps(dict(values)) + "\n")
        self.known |= values

    def remember(self, name: str, compute: Callable[[], float]) -> float:
        """The number `name`, computed where it is not known yet."""
        if name not in self.known:
            self.put({name: compute()})
        return self.known[name]


@dataclass
class Task:
    """One measurement.

    units: name -> operators that take one option together. candidates: unit -> what it may take.
    windows: token ids int64 [L] each, of one length. done: told the share that is finished.
    """

    simulation: Simulation
    units: Mapping[str, list[str]]
    candidates: Mapping[str, Sequence[Option]]
    windows: Sequence[Tensor]
    store: Store
    done: Callable[[float], None] = lambda share: None

    @property
    def tokens(self) -> int:
        """Positions in all windows."""
        return sum(len(window) for window in self.windows)

    def each(self) -> Iterator[tuple[str, Option]]:
        """Every unit with every candidate; says what is done on the way."""
        pairs = [(unit, c) for unit in self.units for c in self.candidates[unit]]
        for number, pair in enumerate(pairs):
            self.done(number / len(pairs))
            yield pair
        self.done(1.0)
