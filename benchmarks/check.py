"""Does a server that is about to be timed compute the right thing? A fast wrong answer is no result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lutserve.errors import UserError
from lutserve.server.client import Server, http

#: nats; quantisation moves a token's log-probability by hundredths to tenths, a broken kernel by nats
LIMIT = 1.0
_PROMPT = list(range(5, 69))
_ANSWER = 16


@dataclass(frozen=True)
class Answer:
    """What a server says to a fixed prompt."""

    #: greedy continuation, token ids
    tokens: tuple[int, ...]
    #: log-probability of each prompt token but the first, in nats
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Agreement:
    """How far a server's answer is from the baseline's."""

    #: mean and largest difference of the prompt's log-probabilities, in nats
    mean: float
    largest: float
    #: how many of the greedy tokens are equal, from the start
    equal_tokens: int


def ask(server: Server) -> Answer:
    """Ask the server about the fixed prompt, by token ids; also its warm-up.

    Raises:
        UserError: it fails, or a log-probability is not finite.

    """
    body: dict[str, Any] = {
        "model": server.model,
        "prompt": _PROMPT,
        "max_tokens": _ANSWER,
        "temperature": 0,
        "ignore_eos": True,
        "prompt_logprobs": 0,
        "return_token_ids": True,
    }
    with http(server.base_url) as client:
        response = client.post("/v1/completions", json=body)
    if not response.is_success:
        raise UserError(f"{server.base_url} answers {response.status_code}: {response.text[:500]}")
    choice = response.json()["choices"][0]
    logprobs = tuple(
        entry[str(token)]["logprob"]
        for token, entry in zip(_PROMPT[1:], choice["prompt_logprobs"][1:], strict=True)
    )
    if not all(map(math.isfinite, logprobs)):
        raise UserError(f"{server.base_url} gives log-probabilities that are not finite; see {server.log}")
    return Answer(tuple(choice["token_ids"]), logprobs)


def compare(answer: Answer, baseline: Answer) -> Agreement:
    """Return how far `answer` is from `baseline`."""
    distances = [abs(a - b) for a, b in zip(answer.logprobs, baseline.logprobs, strict=True)]
    equal = 0
    for ours, theirs in zip(answer.tokens, baseline.tokens, strict=True):
        if ours != theirs:
            break
        equal += 1
    return Agreement(math.fsum(distances) / len(distances), max(distances), equal)
