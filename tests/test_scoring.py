"""`/lutserve/score`: the digits of /v1/completions, for less work; common beginnings; bad requests."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs lutserve[cpu]")

from servers import KEY, client

from lutserve.eval.scores import Question, Score, score
from lutserve.server.client import Server, http, running_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Float16, whose GEMMs are ours on nearly every CPU: a row's digits do not depend on the other rows."""
    flags = ["--model", str(tiny), "--method", "none", "--dtype", "float16", "--max-model-len", "512"]
    # So few tokens a step that long prompts are computed in several, and few requests at a time.
    flags += ["--max-num-batched-tokens", "160", "--max-num-seqs", "12", "--kv-cache-memory-bytes", "512M"]
    with running_server(flags, log=tmp_path_factory.mktemp("exact") / "log") as server:
        yield server


def by_completions(server: Server, questions: list[Question]) -> list[list[Score]]:
    """What lm-eval's own client would read, one request a continuation, one after another."""
    api = client(server)
    found = []
    for question in questions:
        first = len(question.context)
        scores = []
        for continuation in question.continuations:
            choice = api.completions.create(
                model=server.model,
                prompt=question.context + continuation,
                max_tokens=1,
                temperature=0,
                logprobs=1,
                echo=True,
            ).choices[0]
            values = choice.logprobs.token_logprobs[first:-1]
            best = [max(top.values()) for top in choice.logprobs.top_logprobs[first:-1]]
            scores.append(Score(values, [a == b for a, b in zip(values, best, strict=True)]))
        found.append(scores)
    return found


def questions() -> list[Question]:
    """Odd shapes: shared and equal answers, one token, long contexts, answers longer than a step."""
    pick = random.Random(7)

    def tokens(count: int) -> list[int]:
        return [pick.randrange(3, 512) for _ in range(count)]

    stem = tokens(9)
    shapes = [Question(tokens(1), [tokens(1)]), Question(tokens(200), [tokens(3), tokens(1)])]
    shapes += [Question(tokens(5), [stem + tokens(4), stem + tokens(2), stem, list(stem)])]
    shapes += [Question(tokens(1), [tokens(400)]), Question(tokens(31), [tokens(2) for _ in range(5)])]
    same = tokens(40)
    shapes += [Question(same, [tokens(7)]), Question(same, [tokens(7)]), Question(same[:20], [same[20:30]])]
    return shapes


def test_equal_to_completions_to_the_last_digit(exact: Server) -> None:
    asked = questions()
    assert exact.scores
    expected = by_completions(exact, asked)
    assert score(exact, asked, num_concurrent=8) == expected
    # All in one request, and in another order, so that other prompts meet in a step.
    with http(exact.base_url) as api:
        body = {"questions": [question._asdict() for question in reversed(asked)]}
        answer = api.post("/lutserve/score", json=body).raise_for_status().json()["scores"]
    assert [
        [Score(one["logprobs"], one["greedy"]) for one in group] for group in reversed(answer)
    ] == expected
    assert any(flag for group in expected for one in group for flag in one.greedy)
    assert not all(flag for group in expected for one in group for flag in one.greedy)


def test_other_requests_in_the_same_steps_keep_their_answers(exact: Server) -> None:
    asked = questions()
    body = {"model": exact.model, "prompt": "The mill", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    with http(exact.base_url) as api, ThreadPoolExecutor(6) as pool:

        def complete() -> Any:
            # Not the log-probabilities: decoding, their last digits depend on what else is decoded.
            return api.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]

        alone = complete()
        busy = [pool.submit(complete) for _ in range(5)]
        scores = score(exact, asked, num_concurrent=8)
        assert all(job.result() == alone for job in busy)
    assert scores == by_completions(exact, asked)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "questions"),
        ({"questions": []}, 400, "questions"),
        ({"questions": [{"context": [], "continuations": [[4]]}]}, 400, "context"),
        ({"questions": [{"context": [4], "continuations": []}]}, 400, "continuations"),
        ({"questions": [{"context": [4], "continuations": [[]]}]}, 400, "continuations"),
        ({"questions": [{"context": [-1], "continuations": [[4]]}]}, 400, "context"),
        ({"questions": [{"context": ["a"], "continuations": [[4]]}]}, 400, "context"),
        ({"questions": [{"context": [4], "continuations": [[4]], "echo": True}]}, 400, "echo"),
        ({"questions": [{"context": [4], "continuations": [[10**7]]}]}, 400, "vocabulary"),
        ({"questions": [{"context": [4], "continuations": [[4] * 512]}]}, 400, "512"),
        # A good question beside a bad one: nothing hangs, and the server goes on.
        ({"questions": [{"context": [4], "continuations": [[5], [10**7]]}]}, 400, "vocabulary"),
    ],
)
def test_bad_requests(exact: Server, body: dict[str, Any], status: int, message: str) -> None:
    with http(exact.base_url) as api:
        answer = api.post("/lutserve/score", json=body)
        assert answer.status_code == status
        assert message in answer.text
        good = {"questions": [{"context": [4], "continuations": [[5]]}]}
        assert api.post("/lutserve/score", json=good).is_success


def test_the_route_asks_for_the_key(guarded: Server) -> None:
    body = {"questions": [{"context": [4], "continuations": [[5, 6]]}]}
    url = f"{guarded.base_url}/lutserve/score"
    assert httpx.get(url).status_code == 401
    assert httpx.post(url, json=body).status_code == 401
    answer = httpx.post(url, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert [len(one["logprobs"]) for one in answer.json()["scores"][0]] == [2]


def test_common_beginnings_are_found() -> None:
    from lutserve.server.scoring_worker import RowSharing

    sharing = RowSharing(())
    pick = random.Random(3)
    for _ in range(200):
        requests, row = [], pick.randrange(3)
        for _ in range(pick.randrange(1, 6)):
            tokens = np.array([pick.randrange(2) for _ in range(pick.randrange(1, 7))])
            requests.append((row, tokens))
            row += len(tokens) + pick.randrange(3)
        sharing.find(row, requests, torch.device("cpu"))
        # The definition: a row is one with that of the request before it as long as all tokens so far agree.
        original = list(range(row))
        for (before, known), (start, tokens) in itertools.pairwise(requests):
            for i in range(min(len(known), len(tokens))):
                if not np.array_equal(known[: i + 1], tokens[: i + 1]):
                    break
                original[start + i] = original[before + i]
        if sharing.place is None:
            assert original == list(range(row))
        else:
            assert [int(sharing.kept[p]) for p in sharing.place] == original
