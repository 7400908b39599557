"""What is to be evaluated: models x recipes x tasks, from one YAML file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from lutserve.errors import UserError

_HERE = Path(__file__).parent


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LmEval(_Strict):
    """One of lm-eval's tasks; `limit` and `num_fewshot` as there."""

    task: str
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[float, Field(gt=0)] | None = None

    @property
    def name(self) -> str:
        """The task's name in the store."""
        return self.task


class Ppl(_Strict):
    """Perplexity of a text (`lutserve.eval.texts`) in windows that do not overlap."""

    ppl: str
    #: tokens in a window
    window: Annotated[int, Field(ge=2)] = 2048
    #: windows to score, from the start; None: all
    windows: Annotated[int, Field(ge=1)] | None = None

    @property
    def name(self) -> str:
        """The task's name in the store."""
        return f"ppl:{self.ppl}"


def _task(value: Any) -> Any:
    """A bare name is an lm-eval task, or `ppl:TEXT`."""
    if not isinstance(value, str):
        return value
    return {"ppl": value.removeprefix("ppl:")} if value.startswith("ppl:") else {"task": value}


def _kind(value: Any) -> str:
    return "ppl" if isinstance(value, Ppl) or (isinstance(value, dict) and "ppl" in value) else "lm-eval"


Task = Annotated[
    Annotated[LmEval, Tag("lm-eval")] | Annotated[Ppl, Tag("ppl")],
    Discriminator(_kind),
    BeforeValidator(_task),
]
#: file names are made of it
Name = Annotated[str, Field(pattern=r"^[\w.+:-]+$")]


class Published(_Strict):
    """A paper's number for a cell."""

    model: str
    recipe: str
    task: str
    metric: str
    value: float


class Claim(_Strict):
    """What a cell must show; at least one of the two checks.

    `expected` holds within the relative `tolerance`. `recovery` is the least share of the quality of the
    same run's baseline: value / baseline, or baseline / value where lower is better.
    """

    model: str
    recipe: str
    task: str
    metric: str
    expected: float | None = None
    tolerance: Annotated[float, Field(gt=0)] = 0.01
    recovery: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _checks_something(self) -> Claim:
        if self.expected is None and self.recovery is None:
            raise ValueError("give expected, recovery or both")
        return self


class Matrix(_Strict):
    """A file's content. `recipes` are flags of `lutserve serve`; the first is the baseline by default."""

    name: Name
    source: str | None = None
    models: Annotated[list[str], Field(min_length=1)]
    recipes: Annotated[dict[Name, str], Field(min_length=1)]
    baseline: str | None = None
    tasks: Annotated[list[Task], Field(min_length=1)]
    #: documents of every lm-eval task that sets none; below 1 a share of them
    limit: Annotated[float, Field(gt=0)] | None = None
    published: list[Published] = []
    claims: list[Claim] = []

    @model_validator(mode="after")
    def _is_consistent(self) -> Matrix:
        for flags in self.recipes.values():
            if "--model" in shlex.split(flags):
                raise ValueError(f"recipe {flags!r}: models are given under `models`")
        if self.baseline is not None and self.baseline not in self.recipes:
            raise ValueError(f"baseline {self.baseline!r} is no recipe; there are {', '.join(self.recipes)}")
        names = [task.name for task in self.tasks]
        for what, known in (("tasks", names), ("models", self.models)):
            if len(set(known)) < len(known):
                raise ValueError(f"{what}: one is there twice")
        places = [(p.recipe, p.task) for p in self.published] + [(c.recipe, c.task) for c in self.claims]
        for recipe, task in places:
            if recipe not in self.recipes or task not in names:
                raise ValueError(f"no cell has recipe {recipe!r} and task {task!r}")
        return self

    @property
    def base(self) -> str:
        """The recipe that the others are compared with."""
        return self.baseline or next(iter(self.recipes))

    def with_changes(self, models: list[str], limit: float | None) -> Matrix:
        """Return the matrix for other models, if any are given, and another limit."""
        changes: dict[str, Any] = {"models": models} if models else {}
        changes |= {"limit": limit} if limit is not None else {}
        return self.model_copy(update=changes)


def load(path: Path) -> Matrix:
    """Return the matrix in a YAML file.

    Raises:
        UserError: no such file, no YAML, or a key or value that is not allowed.

    """
    try:
        content = yaml.safe_load(path.read_text())
        return Matrix.model_validate(content)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place + ': ' if place else ''}{first['msg']}") from None


def preset(name: str) -> Matrix:
    """Return a matrix that comes with lutserve.

    Raises:
        UserError: there is none of that name.

    """
    files = {path.stem: path for path in (_HERE / "presets").glob("*.yaml")}
    if name not in files:
        raise UserError(f"--preset {name}: there are {', '.join(sorted(files)) or 'none'}")
    return load(files[name])


def claims() -> Iterator[Matrix]:
    """Yield the matrices with the claims that lutserve makes."""
    for path in sorted((_HERE / "claims").glob("*.yaml")):
        yield load(path)
