"""`lutserve bench`: `vllm bench serve` against several server configurations, interleaved in one run.

On a shared machine the same server is twice as fast in one minute as in the next. So all configurations
are measured in every round, in rotating order, and compared only with the baseline of the same round.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.progress import Progress, TextColumn

from lutserve import machine
from lutserve.benchmarks import check
from lutserve.benchmarks.fleet import commands, fit_together, fleet, model_paths, schedule
from lutserve.benchmarks.footprint import peak_bytes
from lutserve.benchmarks.report import Report
from lutserve.benchmarks.workloads import WORKLOADS, Provider, Workload, choose, choose_providers
from lutserve.errors import UserError
from lutserve.server.client import CONSOLE, Server
from lutserve.server.vllm_cli import COMMAND

#: seed of the first round; every round has another, which all providers share
_SEED = 1000


def run(
    *,
    output: Path,
    model: str | None = None,
    providers: Sequence[str] | None = None,
    workloads: Sequence[str] | None = None,
    rounds: int = 3,
    server_args: Sequence[str] = (),
    together: bool | None = None,
) -> Report:
    """Measure providers under workloads; `output/bench_<date>.json` is written anew after every run.

    Args:
        output: folder, made if need be; also takes the servers' logs.
        model: alias, folder or hub id; default is a random Llama of 1.1 billion parameters, made once.
        providers: names of `PROVIDERS` or of methods, the first is the baseline; default all of `PROVIDERS`
            (with `model`: all that can serve it).
        workloads: names of `WORKLOADS`; default all.
        rounds: how often everything is measured, 1 or more.
        server_args: more flags of `lutserve serve` for all servers.
        together: start all servers first and keep them, or start each anew in each round; default:
            together if the memory suffices.

    Raises:
        UserError: unknown names, a server that does not start or answers wrongly, a failed measurement.
    """
    chosen = _providers(providers, model)
    traffic: list[Workload] = choose(workloads, WORKLOADS, "workload")
    return interleave(output, model, chosen, traffic, rounds, server_args, together)


def interleave(
    output: Path,
    model: str | None,
    chosen: Sequence[Provider],
    traffic: Sequence[Workload],
    rounds: int,
    server_args: Sequence[str],
    together: bool | None,
    look: Callable[[str, Server], None] = lambda name, server: None,
) -> Report:
    """Measure these providers under this traffic, see `run`.

    `look` is called with each provider's name and server after the first round's work.
    """
    if rounds < 1:
        raise UserError(f"--rounds {rounds}; give 1 or more")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}; choose another --output") from None
    paths = model_paths(model, chosen)
    if together is None:
        together = fit_together(paths)
    serve = commands(chosen, paths, server_args)
    setting = machine.collect() | {"baseline": chosen[0].name, "serve": serve, "together": together}
    setting["workloads"] = [asdict(workload) for workload in traffic]
    report = Report(output / f"bench_{datetime.now():%Y-%m-%dT%H-%M-%S}.json", chosen[0].name, setting)

    answers: dict[str, check.Answer] = {}
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[now]}"))
    with fleet(serve, output, together) as lend, Progress(*columns, console=CONSOLE) as progress:
        bar = progress.add_task("runs", total=rounds * len(chosen) * len(traffic), now="")
        for number in range(rounds):
            for provider, todo in schedule(chosen, traffic, number, together):
                with lend(provider) as server:
                    if provider.name not in answers:
                        answers[provider.name] = check.ask(server)
                        agree(report, provider.name, answers)
                    for workload in todo:
                        progress.update(bar, now=f"{workload.name} {provider.name}")
                        result, command = measure(server, workload, _SEED + number)
                        facts = {"recipe": server.recipe, "command": command}
                        if server.pid is not None:
                            facts["peak_bytes"] = peak_bytes(server.pid)
                        report.add(result, provider.name, workload, number, **facts)
                        progress.advance(bar)
                    if number == 0 and todo[-1] is traffic[-1]:
                        look(provider.name, server)
    return report


def measure(server: Server, workload: Workload, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Run `vllm bench serve` against a server; return the JSON that it saves, and the command.

    Raises:
        UserError: it fails, or not every request is answered.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("vllm", "bench", "serve", "--backend", "openai", "--base-url", server.base_url),
            *("--model", server.model, "--tokenizer", server.root, "--temperature", "0"),
            *workload.arguments(seed),
            *("--disable-tqdm", "--save-result", "--result-dir", folder, "--result-filename", "result.json"),
        ]
        done = subprocess.run(
            [*COMMAND, *command[1:]],
            # The client needs none of vLLM's plugins, ours included.
            env={**os.environ, "VLLM_PLUGINS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        saved = Path(folder) / "result.json"
        if done.returncode or not saved.is_file():
            raise UserError(
                f"`vllm bench serve` failed with status {done.returncode}:\n{done.stdout[-3000:]}"
            )
        result: dict[str, Any] = json.loads(saved.read_text())
    if result["completed"] != workload.prompts:
        count = f"{result['completed']} of {workload.prompts}"
        raise UserError(f"{workload.name}: only {count} requests were answered; see {server.log}")
    return result, command


def agree(report: Report, provider: str, answers: dict[str, check.Answer]) -> None:
    """Put into the report how far a provider's answer is from the baseline's.

    Raises:
        UserError: too far; its speed would mean nothing.
    """
    if provider == report.baseline:
        return
    found = check.compare(answers[provider], answers[report.baseline])
    report.agreement[provider] = found
    if found.mean > check.LIMIT:
        raise UserError(
            f"{provider} computes something else than {report.baseline}: on a fixed prompt their "
            f"log-probabilities are {found.mean:.2f} nats apart on average ({check.LIMIT} is allowed); "
            "its speed would mean nothing"
        )


def _providers(names: Sequence[str] | None, model: str | None) -> list[Provider]:
    chosen: list[Provider] = choose_providers(names)
    if model is None:
        return chosen
    if names and any(provider.w8a8 for provider in chosen):
        raise UserError("vllm-w8a8 serves a form of the default model; leave out it or --model")
    return [provider for provider in chosen if not provider.w8a8]
