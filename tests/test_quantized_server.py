"""A folder made by `lutserve quantize` gives the tokens of the same method applied while loading."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from servers import SMALL, client

from lutserve.cli import app
from lutserve.server.client import Server, running_server

pytestmark = pytest.mark.slow


def completions(server: Server) -> list[tuple[list[str], list[float]]]:
    """Tokens and their log-probabilities after some prompts."""
    found = []
    for prompt in ("The river", "def area(", "A mill stood here for three hundred years; its wheel"):
        answer = client(server).completions.create(
            model="m", prompt=prompt, max_tokens=24, temperature=0, logprobs=1
        )
        chances = answer.choices[0].logprobs
        assert chances
        found.append((chances.tokens, chances.token_logprobs))
    return found


def test_plain_vllm_serves_the_folder_as_if_quantised_online(tiny: Path, tmp_path: Path) -> None:
    method = ["--method", "nf4", "--group-size", "32"]
    app(["quantize", str(tiny), *method, "-o", str(tmp_path / "nf4")], standalone_mode=False)
    common = ["--served-model-name", "m", "--dtype", "bfloat16", "--enforce-eager", *SMALL]
    online = ["--model", str(tiny), *method, *common]
    with running_server(online, log=tmp_path / "online.log") as server:
        expected = completions(server)
    program = [sys.executable, "-m", "lutserve.server.vllm_cli", "serve"]
    stored = [str(tmp_path / "nf4"), *common]
    with running_server(stored, log=tmp_path / "stored.log", program=program) as server:
        assert completions(server) == expected
    for log in ("online.log", "stored.log"):
        assert "lutserve: qkv_proj x2: method nf4" in (tmp_path / log).read_text()
