"""A part of a benchmark in a process of its own, for so many seconds: what it printed is never lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stage:
    """What a command printed, and why it did not end well."""

    lines: list[str]
    #: None where it did
    failed: str | None

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines that are JSON objects; vLLM logs between them."""
        return [json.loads(line) for line in self.lines if line.startswith("{") and line.endswith("}")]


def lines_of(command: Sequence[str], seconds: float, log: Path) -> Stage:
    """Run a command that prints lines, `seconds` long at most; leaves nothing behind that it started.

    log: file for its standard error and, after that, its output.
    """
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
    ):
        try:
            output, late = process.communicate(timeout=seconds)[0], False
        except subprocess.TimeoutExpired:
            _end(process)
            output, late = process.communicate()[0], True
        finally:
            _end(process)
    lines, complaints = output.splitlines(), log.read_text().splitlines()
    with log.open("a") as file:
        file.write(output)
    failed = None
    if late:
        failed = f"not finished after {seconds:.0f} s; see {log}"
    elif process.returncode:
        reason = next((line for line in reversed(lines[-1:] + complaints) if line.strip()), "no output")
        failed = f"status {process.returncode}: {reason[:300]}; see {log}"
    return Stage(lines, failed)


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and what it started, a session of their own that Ctrl-C does not reach."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
