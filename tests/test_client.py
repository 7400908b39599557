"""Starting a server as a child process: it is ready when it says so, and nothing is left of it."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lutserve.errors import UserError
from lutserve.server import client
from lutserve.server.client import connect, free_port, running_server
from lutserve.server.vllm_cli import COMMAND

TESTS = Path(__file__).parent

# A server with a child of its own, both of which can be told to ignore SIGTERM.
SERVER = f"""
import signal, subprocess, sys, time
sys.path.insert(0, {str(TESTS)!r})
from fake_openai import fake_server
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--stubborn" in options:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print("child", child.pid, flush=True)
with fake_server("some/model", int(options["--port"])):
    signal.pause() if "--stubborn" not in options else time.sleep(600)
"""
PROGRAM = (sys.executable, "-c", SERVER)


def child_of(log: Path) -> int:
    return int(log.read_text().split("child ")[1].split()[0])


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(*pids: int, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_a_server_and_all_its_children_end_with_the_block(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "server.log"
    with running_server([], log=log, program=PROGRAM, env={"SOME": "1"}) as server:
        assert server.model == "fake"
        assert server.root == "some/model"
        assert server.max_model_len == 4096
        assert server.recipe == {"quant_method": "lutserve"}
        assert server.pid is not None
        assert alive(server.pid)
        assert alive(child_of(log))
    assert gone(server.pid, child_of(log))


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_block_ends_the_server(tmp_path: Path, exception: type[BaseException]) -> None:
    log = tmp_path / "log"
    with pytest.raises(exception), running_server([], log=log, program=PROGRAM) as server:
        raise exception
    assert server.pid is not None
    assert gone(server.pid, child_of(log))


def test_a_server_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "STOP_SECONDS", 0.3)
    log = tmp_path / "log"
    with running_server(["--stubborn", "1"], log=log, program=PROGRAM) as server:
        pass
    assert server.pid is not None
    assert gone(server.pid, child_of(log))


def test_the_server_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (
        "import sys, time; from pathlib import Path; from lutserve.server.client import running_server\n"
        "log, program = Path(sys.argv[1]), (sys.executable, '-c', sys.argv[2])\n"
        "with running_server([], log=log, program=program) as server:\n"
        "    print(server.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(log), SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    try:
        assert gone(server)
    finally:
        # The kernel tells the server only; this one's child is stubborn on purpose.
        os.kill(child_of(log), signal.SIGKILL)


def test_a_server_that_ends_early_shows_its_last_words(tmp_path: Path) -> None:
    program = (sys.executable, "-c", "print('no such model'); raise SystemExit(3)")
    with (
        pytest.raises(UserError, match=r"status 3(.|\n)*no such model"),
        running_server([], log=tmp_path / "log", program=program),
    ):
        pass


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    program = (sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    log = tmp_path / "log"
    with (
        pytest.raises(UserError, match="not ready after 2 s"),
        running_server([], log=log, program=program, timeout=2),
    ):
        pass
    assert gone(int(log.read_text()))


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}", "http://127.0.0.1:{port}/v1/", "nonsense", "http://["]
)
def test_connect_to_nothing(url: str) -> None:
    with pytest.raises(UserError, match="no server at"):
        connect(url.format(port=free_port()))


def test_connect_to_something_else(tmp_path: Path) -> None:
    program = (sys.executable, "-m", "http.server", "--directory", str(tmp_path))
    port = free_port()
    with subprocess.Popen([*program, str(port)], stderr=subprocess.DEVNULL) as other:
        for _ in range(200):
            try:
                connect(f"http://127.0.0.1:{port}")
            except UserError as error:
                message = str(error)
                if "no server" not in message:
                    break
            time.sleep(0.05)
        other.terminate()
    assert "answers 404" in message


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")


@needs_vllm
@pytest.mark.slow
def test_vllms_command_line_runs_whatever_its_distribution_is_called() -> None:
    # Without plugins: this is about vLLM's own command.
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    run = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip().splitlines()[-1].startswith("0.")
    run = subprocess.run(
        [*COMMAND, "bench", "serve", "--help=max-concurrency"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0
    assert "--max-concurrency" in run.stdout
