"""Hours in small: mixed requests whose outliers drift, and what must not grow or change meanwhile."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from openai import OpenAI
from safetensors.torch import load_file, save_file
from servers import SMALL, client
from tiny import tiny_llama

pytest.importorskip("vllm")

from lutserve.benchmarks.footprint import resident_bytes
from lutserve.quantizers.calibrate import calibrate
from lutserve.quantizers.outliers import capacity
from lutserve.server.client import Server, http, running_server

#: kinds of text, each with outlier columns of its own
KINDS, HIDDEN, VOCABULARY = 24, 512, 512
#: memory may settle for a while, then it must stay where it is
SETTLED, GROWTH = 0.4, 24 << 20


def drifting(folder: Path) -> Path:
    """A model in which the tokens of each kind are large in four columns, others in every kind."""
    tiny_llama(folder, hidden=HIDDEN, intermediate=512, vocab=VOCABULARY)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for token in range(VOCABULARY):
        kind = token % KINDS
        embedding[token, 16 * kind : 16 * kind + 4] *= 80
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ask(to: OpenAI, server: Server, prompt: list[int], tokens: int, seed: int = 7) -> str:
    answer = to.completions.create(
        model=server.model, prompt=prompt, max_tokens=tokens, temperature=1.0, seed=seed
    )
    return answer.choices[0].text


def talk(to: OpenAI, server: Server, seconds: float, seed: int) -> None:
    """Requests of all sizes; which kinds of tokens they hold drifts from the first to the last."""
    numbers, start = random.Random(seed), time.monotonic()
    while (done := (time.monotonic() - start) / seconds) < 1:
        kind = int(done * KINDS)
        prompt = [
            numbers.randrange(VOCABULARY // KINDS) * KINDS + kind for _ in range(numbers.randint(1, 200))
        ]
        ask(to, server, prompt, numbers.choice((1, 4, 16)), seed=numbers.randrange(1000))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seconds", [60, pytest.param(1200, marks=pytest.mark.extended)])
def test_memory_and_slots_are_bounded_and_static_text_stays(tmp_path: Path, seconds: int) -> None:
    folder = drifting(tmp_path / "model")
    args = ["--model", str(folder), "--method", "mix8", *SMALL]
    with running_server(args, log=tmp_path / "online.log") as server, http(server.base_url) as web:
        to, sizes, counts, stretches = client(server), [], set(), 10
        for stretch in range(stretches):
            talk(to, server, 0.6 * seconds / stretches, stretch)
            rows = web.get("/lutserve/layers").raise_for_status().json()
            sizes.append(resident_bytes(server.pid or 0))
            for row in rows:
                if "_proj" in row["layer"]:
                    assert row["outlier_columns"] <= capacity(HIDDEN)
                    counts.add(row["outlier_columns"])
    # The test would prove nothing if no layer ever had an outlier.
    assert max(counts) > 8
    settled = int(SETTLED * stretches)
    assert max(sizes[settled:]) - sizes[settled] < GROWTH, [size >> 20 for size in sizes]

    calibrate(folder, folder, text="pydoc", samples=4, length=64)
    with running_server([*args, "--outliers", "static"], log=tmp_path / "static.log") as server:
        to, prompt = client(server), [3 + 11 * i % 500 for i in range(40)]
        first = ask(to, server, prompt, 24)
        talk(to, server, 0.4 * seconds, 99)
        assert [ask(to, server, prompt, 24) for _ in range(3)] == [first] * 3
