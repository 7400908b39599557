"""`lutserve eval`: lm-eval's tasks against a server, offline if need be, resumable after `kill -9`."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lutserve import __version__, machine
from lutserve.errors import UserError
from lutserve.eval import answers, tasks
from lutserve.eval.answers import Answers
from lutserve.server.client import CONSOLE, Server, connect, running_server

#: lm-eval's 100,000 take minutes for a perplexity; the standard error needs no third digit
_BOOTSTRAP = 1000
#: seconds for one request; a long prompt on a busy CPU
_TIMEOUT = 1200


@dataclass(frozen=True)
class Outcome:
    """A finished evaluation."""

    #: lm-eval's results dictionary without the samples, plus our "lutserve" block
    results: dict[str, Any]
    #: the file it was written to, beside the samples_*.jsonl files
    path: Path

    def table(self) -> str:
        """Return the metrics as Markdown, in lm-eval's own form."""
        from lm_eval.utils import make_table

        columns = ["results"] + (["groups"] if self.results.get("groups") else [])
        return "\n".join(make_table(self.results, column) for column in columns)


@dataclass(frozen=True)
class Settings:
    """What is evaluated, apart from the model. All of it ends up in the results file."""

    tasks: tuple[str, ...]
    #: documents a task; below 1 a share of them; None for all
    limit: float | None = None
    #: examples before each question; None for the task's own number
    num_fewshot: int | None = None
    seed: int = 1234
    #: window for rolling perplexities, and the longest prompt, in tokens; at most the server's
    max_length: int = 2048
    #: requests in flight, 2 or more
    num_concurrent: int = 16


def run(
    settings: Settings,
    *,
    output: Path,
    model: str | None = None,
    server_args: Sequence[str] = (),
    base_url: str | None = None,
    tokenizer: str | None = None,
    data: Path | None = None,
    resume: bool = True,
) -> Outcome:
    """Evaluate a model on lm-eval tasks through a server and write lm-eval's result files.

    Writes `output/<model>/results_<date>.json` and `samples_<task>_<date>.jsonl`. Until they are
    written every answer of the server is kept in `output/.resume`, so that the same command goes on
    where it was interrupted; a finished run keeps nothing, the next one measures anew.

    Args:
        settings: the tasks and how to run them.
        output: folder, made if need be; also takes the log of a server that is started.
        model: alias, folder or hub id to serve (default: the embedded model); not with `base_url`.
        server_args: more flags for `lutserve serve`; not with `base_url`.
        base_url: a running server to use instead of starting one.
        tokenizer: folder or hub id; default is what the server names as its model.
        data: folder with offline data and `tasks/local_<name>.yaml`, which the task `<name>` then means;
            nothing is fetched from a network.
        resume: False forgets the answers of an interrupted run.

    Raises:
        UserError: bad arguments, a task or folder that is not there, no lm-eval, a server that does not
            start, cannot be reached or stops answering.

    """
    check(settings, output, data)
    if base_url and (model or server_args):
        raise UserError("--base-url names a running server; --model and server flags are for one to start")
    command = [*(["--model", model] if model else []), *server_args]
    with patch.dict(os.environ, offline(data) if data else {}):
        names = tasks.local_names(settings.tasks, data) if data else list(settings.tasks)
        # Before the server: a misspelt task must not cost its start.
        manager = tasks.manager(names, data)
        with (
            _server(base_url, command, output) as server,
            closing(_answers(server, settings, output, resume)) as kept,
        ):
            start = time.monotonic()
            results = evaluate(server, manager, names, settings, tokenizer or server.root, kept)
            results["lutserve"] = {
                "version": __version__,
                "model": server.root,
                "recipe": server.recipe,
                "server": base_url or ["lutserve", "serve", *command],
                "seconds": round(time.monotonic() - start, 1),
                "settings": asdict(settings),
                "machine": machine.collect(),
            }
            path, _ = write(results, output, server.model)
            kept.delete()
    return Outcome(results, path)


def check(settings: Settings, output: Path, data: Path | None) -> None:
    """UserError for settings, folders or an installation that cannot work."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed; install lutserve[eval]")
    if not settings.tasks:
        raise UserError("no task given; use --tasks NAME[,NAME...]")
    if settings.limit is not None and settings.limit <= 0:
        raise UserError(f"--limit {settings.limit:g}; give a number of documents, or a share below 1")
    if settings.num_concurrent < 2:
        raise UserError(f"--num-concurrent {settings.num_concurrent}; give 2 or more")
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data} is no folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}; choose another --output") from None


def offline(data: Path) -> dict[str, str]:
    """Return the environment in which lm-eval asks no network and finds its data in a folder."""
    # Hugging Face's libraries read these when they are imported, which is later than this.
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return {"LUTSERVE_DATA": str(data.resolve()), **dict.fromkeys(offline, "1")}


@contextmanager
def _server(base_url: str | None, command: Sequence[str], output: Path) -> Iterator[Server]:
    if base_url:
        yield connect(base_url)
    else:
        with running_server(command, log=output / "server.log") as server:
            yield server


def _answers(server: Server, settings: Settings, output: Path, resume: bool) -> Answers:
    """Open the answers of an interrupted run of the same model with the same arithmetic."""
    # Tasks, limits and seeds need no place in the key: they decide which requests are made.
    key: list[Any] = [server.model, server.root, model_files(Path(server.root)), server.recipe, __version__]
    if server.recipe is None:
        # Nothing says which arithmetic another vLLM uses; at least tell one server from the next.
        key.append(server.base_url)
    path = output / ".resume" / f"{answers.digest([*key, settings.max_length])}.sqlite"
    if not resume:
        answers.remove(path)
    kept = Answers(path)
    if known := kept.count():
        CONSOLE.print(f"resuming: {known} answers kept from an interrupted run", highlight=False)
    return kept


def model_files(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of a model folder's files; empty for a hub id."""
    if not folder.is_dir():
        return []
    stats = ((path.name, path.stat()) for path in sorted(folder.iterdir()))
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def evaluate(
    server: Server, manager: Any, chosen: list[str], settings: Settings, tokenizer: str, kept: Answers
) -> dict[str, Any]:
    """Return lm-eval's results, samples included."""
    import aiohttp
    from lm_eval import simple_evaluate

    from lutserve.eval.completions import ServedModel

    tasks.quiet_lm_eval()
    arguments = {
        "model": server.model,
        "base_url": f"{server.base_url}/v1/completions",
        "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "num_concurrent": settings.num_concurrent,
        "max_length": min(settings.max_length, server.max_model_len),
        "seed": settings.seed,
        "timeout": _TIMEOUT,
    }
    try:
        model = ServedModel(server, kept, **arguments)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the tokenizer {tokenizer!r} ({error}); name one with --tokenizer"
        ) from None
    try:
        results: dict[str, Any] = simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=chosen,
            task_manager=manager,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            batch_size=1,
            bootstrap_iters=_BOOTSTRAP,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    except (aiohttp.ClientError, TimeoutError) as error:
        raise UserError(
            f"the server at {server.base_url} stopped answering or refused a request ({error!r}); "
            "its answers so far are kept: give the same command again to go on"
        ) from error
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"cannot load the data of {', '.join(chosen)}: {error}; see --data for offline use"
        ) from error
    results["config"]["model"] = "local-completions"
    return results


def write(results: dict[str, Any], output: Path, model: str) -> tuple[Path, dict[str, Path]]:
    """Write the result and sample files in lm-eval's layout and drop the samples from `results`.

    Returns: the result file, and the sample file of every task.

    Raises:
        UserError: they cannot be written whole.

    """
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(output))
    tracker.general_config_tracker.log_experiment_args(
        model_source="local-completions",
        model_args={"model": model},
        system_instruction=None,
        chat_template=None,
        fewshot_as_multiturn=False,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    folder: str = tracker.general_config_tracker.model_name_sanitized
    path = output / folder / f"results_{tracker.date_id}.json"
    for task, entries in samples.items():
        tracker.save_results_samples(task_name=task, samples=entries)
    files = {task: path.with_name(f"samples_{task}_{tracker.date_id}.jsonl") for task in samples}
    # lm-eval only logs what goes wrong here.
    if not _is_json(path) or any(_lines(files[task]) < len(entries) for task, entries in samples.items()):
        raise UserError(f"lm-eval could not write {path.parent}; is there space, and the right to write?")
    return path, files


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def _lines(path: Path) -> int:
    """Count the whole lines of a file; 0 if it is not there."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0
