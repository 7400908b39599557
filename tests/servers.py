"""Servers that several test files share, each started once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tiny import tiny_llama

from lutserve.server.client import Server, running_server

KEY = "secret"
#: small enough for a machine that runs other things as well
SMALL = ("--kv-cache-memory-bytes", "512M", "--max-model-len", "512", "--max-num-seqs", "16")


def client(server: Server, key: str = KEY) -> openai.OpenAI:
    """The real client, without retries that would hide a failure."""
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=key, max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama folder."""
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def guarded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A mix8 + nli-4 server with an API key."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        args = ["--model", str(tiny), "--method", "mix8", "--lut", "nli-4", "--api-key", KEY, *SMALL]
        with running_server(args, log=log) as server:
            yield server
