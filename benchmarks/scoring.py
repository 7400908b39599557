"""Scoring requests a second: lm-eval's own client against ours, on one server, with the same numbers.

    python -m lutserve.benchmarks.scoring --data FOLDER [--questions 12] [--rounds 3] [-o FOLDER] [FLAGS]

FOLDER holds lm-eval task files (`tasks/local_*.yaml`). Both clients get the same requests of each task; in
every round they take turns. A request is a context with one continuation. FLAGS go to `lutserve serve`.
Fails where an answer differs in any digit.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from unittest.mock import patch

import typer
from rich.table import Table

from lutserve import machine, models
from lutserve.console import for_tables
from lutserve.errors import UserError
from lutserve.eval import run, tasks
from lutserve.eval.answers import Answers
from lutserve.server.client import Server, running_server

TASKS = ("arc_easy", "piqa", "lambada_openai")
#: questions in flight, of our client and of lm-eval's second line
CONCURRENT = 16


def requests_of(names: list[str], data: Path, questions: int) -> dict[str, list[Any]]:
    """Return lm-eval's requests for the first questions of each task."""
    found = {}
    for name, task in tasks.manager(names, data).load(names)["tasks"].items():
        task.build_all_requests(limit=questions)
        found[name] = task.instances
    return found


def clients(server: Server, tokenizer: str) -> dict[str, Callable[[list[Any]], list[tuple[float, bool]]]]:
    """Return the clients by name, the baseline first."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from lutserve.eval.completions import ServedModel

    # lm-eval's defaults but for what it cannot guess.
    common = {"model": server.model, "base_url": f"{server.base_url}/v1/completions", "tokenizer": tokenizer}
    common |= {"tokenizer_backend": "huggingface"}
    default = LocalCompletionsAPI(**common)
    concurrent = LocalCompletionsAPI(**common, num_concurrent=CONCURRENT)

    def ours(instances: list[Any]) -> list[tuple[float, bool]]:
        with TemporaryDirectory() as folder, closing(Answers(Path(folder) / "answers")) as answers:
            model = ServedModel(server, answers, **common, num_concurrent=CONCURRENT)
            scores: list[tuple[float, bool]] = model.loglikelihood(instances)
            return scores

    return {
        "lm-eval, defaults": default.loglikelihood,
        f"lm-eval, num_concurrent={CONCURRENT}": concurrent.loglikelihood,
        "lutserve eval": ours,
    }


def main(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help="Folder with tasks/local_*.yaml.")],
    questions: Annotated[int, typer.Option(min=1, help="Questions a task.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Times every client answers them.")] = 3,
    model: Annotated[str, typer.Option(help="Alias, folder or hub id.")] = models.DEFAULT,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for record and log.")] = Path(
        "out/scoring"
    ),
) -> None:
    """Measure, write the record, print the table."""
    tasks.quiet_lm_eval()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    flags = ["--model", model, "--max-model-len", "2049", *context.args]
    seconds: dict[str, dict[str, list[float]]] = {}
    with patch.dict(os.environ, run.offline(data)):
        work = requests_of(tasks.local_names(TASKS, data), data, questions)
        with running_server(flags, log=output / "server.log") as server:
            asking = clients(server, server.root)
            for ask in asking.values():
                ask(next(iter(work.values()))[:2])
            for _ in range(rounds):
                for task, instances in work.items():
                    expected = None
                    for name, ask in asking.items():
                        start = time.monotonic()
                        found = ask(instances)
                        seconds.setdefault(task, {}).setdefault(name, []).append(time.monotonic() - start)
                        if expected is not None and found != expected:
                            raise UserError(f"{task}: {name} differs from {next(iter(asking))}")
                        expected = found
    rows = []
    table = Table("task", "client", "requests/s, median (range)", "ratio to the first, same round", box=None)
    for task, of_clients in seconds.items():
        base = next(iter(of_clients.values()))
        for name, times in of_clients.items():
            rates = sorted(len(work[task]) / t for t in times)
            ratios = sorted(b / t for b, t in zip(base, times, strict=True))
            row = {"task": task, "client": name, "requests": len(work[task]), "seconds": times}
            row |= {"requests_per_second": statistics.median(rates), "ratio": statistics.median(ratios)}
            rows.append(row | {"ratio_range": [ratios[0], ratios[-1]]})
            shown = f"{statistics.median(rates):.1f} ({rates[0]:.1f}-{rates[-1]:.1f})"
            ratio = f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f}-{ratios[-1]:.2f})"
            table.add_row(task, name, shown, ratio)
    record = machine.collect() | {
        "command": ["python", "-m", "lutserve.benchmarks.scoring", *sys.argv[1:]],
        "model": model,
        "server": flags,
        "questions": questions,
        "rounds": rounds,
        "equal": "every answer of every client in every round, all digits",
        "results": rows,
    }
    path = output / f"scoring_{datetime.now():%Y-%m-%dT%H-%M-%S}.json"
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(path)
    for_tables().print(table)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)
    app()
