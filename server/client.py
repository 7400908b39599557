"""A server as a child process: start it, wait until it answers, and leave nothing behind.

Evaluation, benchmarks and tests all start servers through `running_server`, and talk to a server
somebody else started through `connect`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from lutserve.errors import UserError

#: where progress is shown; one console for all, because only one live display can own a terminal
CONSOLE = Console(stderr=True)
#: argv prefix of a child process that runs our own server
SERVE: tuple[str, ...] = (sys.executable, "-m", "lutserve.cli", "serve")
#: seconds that a server gets between SIGTERM and SIGKILL; longer than its own --shutdown-timeout
STOP_SECONDS = 60.0
_LOG_LINES = 25
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Server:
    """A server that answers, and what it says about itself."""

    #: e.g. "http://127.0.0.1:8000", without a trailing slash
    base_url: str
    #: the name that requests must give
    model: str
    #: the model's path or hub id, which is also where its tokenizer is
    root: str
    #: the longest prompt plus answer, in tokens
    max_model_len: int
    #: the answer of /lutserve/recipe; None for a server that is not ours
    recipe: dict[str, Any] | None
    #: whether it answers /lutserve/score
    scores: bool = False
    #: process id and log file, for a server that we started
    pid: int | None = None
    log: Path | None = None


def http(base_url: str, timeout: float = 600.0) -> httpx.Client:
    """Return an HTTP client for a server; sends $OPENAI_API_KEY as bearer token, as lm-eval does.

    Proxy settings of the environment are ignored: a server on this machine must never go through one.
    """
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=base_url, headers=headers, timeout=timeout, trust_env=False)


def connect(base_url: str, timeout: float = 30.0) -> Server:
    """Return the server at `base_url` ("http://host:port"; a trailing "/v1" is ignored).

    Raises:
        UserError: nothing answers there within `timeout` seconds, or what answers is no vLLM server.

    """
    base_url = base_url.rstrip("/").removesuffix("/v1")
    try:
        with http(base_url, timeout) as client:
            answer = client.get("/v1/models").raise_for_status().json()
            card = answer["data"][0]
            recipe, scoring = client.get("/lutserve/recipe"), client.get("/lutserve/score")
            return Server(
                base_url=base_url,
                model=card["id"],
                root=card.get("root") or card["id"],
                max_model_len=card["max_model_len"],
                recipe=recipe.json() if recipe.is_success else None,
                scores=scoring.is_success and scoring.json()["available"],
            )
    except httpx.HTTPStatusError as error:
        hint = "; set OPENAI_API_KEY to the server's key" if error.response.status_code == 401 else ""
        raise UserError(f"{base_url}/v1/models answers {error.response.status_code}{hint}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"no server at {base_url} ({error}); start one with `lutserve serve`") from None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{base_url}/v1/models does not answer as a vLLM server does") from None


@contextmanager
def running_server(
    args: Sequence[str],
    *,
    log: Path,
    program: Sequence[str] = SERVE,
    port: int | None = None,
    timeout: float = 600.0,
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run `program args --host 127.0.0.1 --port PORT` for the length of a `with` block.

    The server and all its children live in a process group of their own. At the end of the block,
    however it ends, the server gets SIGTERM and `STOP_SECONDS` to finish; what is left of the group then
    gets SIGKILL. Should this process be killed, the kernel sends the server SIGTERM.

    Args:
        args: options for the program.
        log: file for the output of the server; overwritten, parents are created.
        program: argv prefix, `lutserve serve` by default.
        port: default is a free one.
        timeout: seconds until the server must be healthy.
        env: variables set on top of this process's environment.

    Raises:
        UserError: the server ended or was not healthy in time; carries the last lines of its log.

    """
    port = port or free_port()
    base_url = f"http://127.0.0.1:{port}"
    command = [*program, *args, "--host", "127.0.0.1", "--port", str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    try:
        _wait_healthy(process, base_url, log, timeout)
        yield replace(connect(base_url), pid=process.pid, log=log)
    finally:
        _stop(process)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """Run in the child before exec: SIGTERM for it when the thread that started it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_healthy(process: subprocess.Popen[bytes], base_url: str, log: Path, timeout: float) -> None:
    start = time.monotonic()
    with CONSOLE.status("") as status, http(base_url, timeout=5.0) as client:
        while True:
            waited = time.monotonic() - start
            status.update(f"waiting for {base_url} ({waited:.0f} s, log: {log})")
            if (exit_status := _exit_status(process)) is not None:
                raise UserError(f"the server ended with status {exit_status} at its start; {_tail(log)}")
            if waited > timeout:
                raise UserError(f"the server was not ready after {timeout:.0f} s; {_tail(log)}")
            with suppress(httpx.HTTPError):
                if client.get("/health").is_success:
                    break
            time.sleep(0.5)
    CONSOLE.print(f"server {base_url} is ready after {time.monotonic() - start:.0f} s", highlight=False)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its process group, politely first."""
    try:
        # Not process.terminate(): that would reap a leader that has exited, and free its id.
        os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while _exit_status(process) is None and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        # The leader is not reaped yet, so its id cannot have become somebody else's.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _exit_status(process: subprocess.Popen[bytes]) -> int | None:
    """Exit status (or signal number) of a process that has ended, without reaping it."""
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if ended is None else ended.si_status


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join([f"the end of {log}:", *lines])
