"""The servers of a benchmark: what they serve, when they run, and in which order they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from lutserve import models
from lutserve.benchmarks.models import default_folder, random_llama, to_w8a8
from lutserve.benchmarks.workloads import Provider, Workload
from lutserve.server.client import CONSOLE, Server, running_server
from lutserve.server.defaults import available_memory

#: flags of every server: small, and no answers from a prefix cache
SHARED = ("--no-enable-prefix-caching", "--kv-cache-memory-bytes", "256M", "--max-model-len", "2048")
#: bytes that a server needs beside its weights, KV cache included
_OVERHEAD = 7 * 2**28

Open = Callable[[Provider], AbstractContextManager[Server]]


def model_paths(model: str | None, providers: Sequence[Provider]) -> dict[str, str]:
    """Return what each provider serves: `model`, or the benchmark models, made now if need be."""
    own = {provider.name: models.resolve(provider.folder) for provider in providers if provider.folder}
    if model is not None:
        return {provider.name: models.resolve(model) for provider in providers} | own
    with CONSOLE.status("writing the random 1.1B model: once, about a minute"):
        plain = random_llama(default_folder("llama-1b"))
        w8a8 = to_w8a8(plain, default_folder("llama-1b-w8a8")) if any(p.w8a8 for p in providers) else plain
    return {provider.name: str(w8a8 if provider.w8a8 else plain) for provider in providers} | own


def commands(
    providers: Sequence[Provider], paths: dict[str, str], server_args: Sequence[str]
) -> dict[str, list[str]]:
    """Return the flags of `lutserve serve` for each provider."""
    return {p.name: ["--model", paths[p.name], *SHARED, *p.arguments, *server_args] for p in providers}


def fit_together(paths: dict[str, str]) -> bool:
    """Whether the memory holds all servers at once, as if none made its weights smaller."""
    weights = (
        sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) for path in paths.values()
    )
    free: int = available_memory()
    return sum(weights) + len(paths) * _OVERHEAD < free


@contextmanager
def fleet(commands: dict[str, list[str]], logs: Path, together: bool) -> Iterator[Open]:
    """Give a function that lends a provider's server for the length of a `with` block.

    Args:
        commands: flags of `lutserve serve` for each provider.
        logs: folder for the servers' logs.
        together: start all servers now and end them at the end; otherwise start and end one each time.
    """

    def start(name: str) -> AbstractContextManager[Server]:
        server: AbstractContextManager[Server] = running_server(
            commands[name], log=logs / f"server_{name}.log"
        )
        return server

    with ExitStack() as stack:
        running = {name: stack.enter_context(start(name)) for name in commands} if together else {}
        yield lambda provider: nullcontext(running[provider.name]) if together else start(provider.name)


def schedule(
    providers: Sequence[Provider], workloads: Sequence[Workload], number: int, together: bool
) -> Iterator[tuple[Provider, Sequence[Workload]]]:
    """Yield what to measure in round `number`, in order.

    Each round begins with another provider. Where all servers run, the providers of one workload follow
    each other directly; otherwise each server is started once a round and does all workloads.
    """
    first = number % len(providers)
    order = [*providers[first:], *providers[:first]]
    for todo in [[workload] for workload in workloads] if together else [workloads]:
        for provider in order:
            yield provider, todo
