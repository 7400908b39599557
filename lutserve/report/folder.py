"""Reading a folder of results: finished cells of `lutserve eval`, and records of other commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from lutserve.errors import UserError

CELLS = "cells.jsonl"
#: MixQ's threshold: an input column with any |x| beyond it is an outlier
_OUTLIER = 6.0
#: facts of `machine.collect` that are told once for all records that share them
_ENVIRONMENT = ("lutserve", "git", "python", "system", "machine", "versions", "compiler", "environment")


class Metric(BaseModel):
    """A measured number; accuracies are between 0 and 1."""

    value: float
    stderr: float | None = None


class Cell(BaseModel):
    """One model under one recipe on one task, as a line of cells.jsonl has it."""

    cell: str
    preset: str = ""
    model: str
    recipe: str
    flags: list[str] = Field(default_factory=list)
    task: str
    metrics: dict[str, Metric]
    n: int | None = None
    #: stored bits a weight of the linear layers
    bits: float | None = None
    published: dict[str, float] = Field(default_factory=dict)
    #: path of lm-eval's own file; in cells.jsonl relative to its folder, here absolute
    results: str | None = None
    #: name of the recipe that this one is compared with
    baseline: str | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)
    #: id of its Origin
    origin: str = Field(default="", exclude=True)


@dataclass(frozen=True)
class Origin:
    """Where numbers come from: one record, what made it, when and where."""

    id: str
    #: path relative to the report's folder, with the line for a cell
    place: str
    command: str
    time: str
    #: position in `Folder.environments`
    environment: int | None


@dataclass(frozen=True)
class Record:
    """A JSON file."""

    path: Path
    #: relative to the report's folder
    name: str
    data: Any
    #: id of its Origin
    origin: str


@contextmanager
def intact(record: Record) -> Iterator[None]:
    """Say of which file it is that lacks something or has something else; UserError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{record.path} is not as lutserve writes it ({what}); move it away") from error


@dataclass
class Folder:
    """What a folder holds. `Folder.read` makes one."""

    path: Path
    cells: list[Cell] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    #: machines with their software, each once
    environments: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Folder:
        """Read cells.jsonl and every JSON file in a folder and the folders in it.

        Of cells that agree in preset, model, recipe and task the last one counts. The last line of a
        cells.jsonl that is being written may be unfinished; it is left out.

        Raises:
            UserError: no such folder, nothing in it, a file that cannot be read or is damaged.

        """
        if not path.is_dir():
            raise UserError(f"{path} is no folder; give the one that `lutserve eval` or `bench` wrote to")
        found = cls(path)
        try:
            for file in sorted(path.rglob(CELLS)):
                found._add_cells(file)
            for file in sorted(path.rglob("*.json")):
                found._add_record(file)
            for file in sorted(path.rglob("*.safetensors")):
                found._add_calibration(file)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
        if not found.cells and not found.records:
            raise UserError(
                f"{path} holds neither {CELLS} nor a JSON record; give the folder that `lutserve eval` or "
                "`lutserve bench` wrote to"
            )
        return found

    def _add_cells(self, file: Path) -> None:
        last: dict[tuple[str, str, str, str], Cell] = {}
        for line, data in _lines(file):
            where = f"{self._name(file)}:{line}"
            try:
                cell = Cell.model_validate(data)
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(map(str, first["loc"]))
                raise UserError(
                    f"{file}:{line} is no cell of `lutserve eval`: {key}: {first['msg']}"
                ) from None
            cell.origin = self._origin(where, cell.provenance)
            if cell.results:
                cell.results = str((file.parent / cell.results).resolve())
            last[cell.preset, cell.model, cell.recipe, cell.task] = cell
        self.cells += last.values()

    def _add_record(self, file: Path) -> None:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is not JSON: {error}; repair it or move it away") from None
        facts = data if isinstance(data, dict) else {}
        # The records of `lutserve bench` and lm-eval keep what is ours in a block of that name.
        if isinstance(facts.get("lutserve"), dict):
            facts = facts["lutserve"]
            facts = facts | facts["machine"] if "lutserve" in facts.get("machine", {}) else facts
        self.records.append(Record(file, self._name(file), data, self._origin(self._name(file), facts)))

    def _add_calibration(self, file: Path) -> None:
        """Take in a file of `lutserve calibrate` as a list of layers; other safetensors are none of ours."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="numpy") as handle:
                if "lutserve" not in (handle.metadata() or {}):
                    return
        except SafetensorError as error:
            raise UserError(f"{file} cannot be read ({error}); make it again or move it away") from None
        # Behind the check, because it brings torch.
        from lutserve.quantizers.columns import Calibration

        found = Calibration(file)
        rows = [
            {
                "layer": name,
                "largest_input": entry.absmax.max().item(),
                "outlier_inputs": int((entry.absmax > _OUTLIER).sum()),
            }
            for name, entry in found.inputs.items()
        ]
        self.records.append(Record(file, self._name(file), rows, self._origin(self._name(file), found.facts)))

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()

    def _origin(self, place: str, facts: dict[str, Any]) -> str:
        environment = {key: facts[key] for key in _ENVIRONMENT if facts.get(key)}
        index = None
        if environment:
            if environment not in self.environments:
                self.environments.append(environment)
            index = self.environments.index(environment)
        command = facts.get("command") or ""
        text = command if isinstance(command, str) else shlex.join(map(str, command))
        origin = Origin(f"r{len(self.origins) + 1}", place, text, str(facts.get("time", "")), index)
        self.origins.append(origin)
        return origin.id


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of every line of a JSON Lines file."""
    text = file.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.strip() or not line.endswith("\n"):
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number} is not JSON: {error}; remove that line") from None
