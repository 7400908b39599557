"""Perplexity as the papers quote it: one long text, non-overlapping windows, no stride.

This is not lm-eval's `wikitext` (a word perplexity, document by document); the two cannot be compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lutserve.errors import UserError
from lutserve.eval.answers import Answers
from lutserve.eval.scores import Question, score
from lutserve.server.client import Server, connect


@dataclass(frozen=True)
class Perplexity:
    """The outcome of `perplexity`."""

    #: exp of the mean negative log-likelihood over all scored tokens
    ppl: float
    #: mean negative log-likelihood of each window, in nats a token, in the order of the text
    nll: tuple[float, ...]
    #: tokens scored: a window of n tokens scores n - 1, the first has no context
    tokens: int


def perplexity(
    server: Server | str,
    text: str,
    *,
    tokenizer: str | None = None,
    window: int = 2048,
    windows: int | None = None,
    num_concurrent: int = 4,
    answers: Answers | None = None,
    first: int = 1,
) -> Perplexity:
    """Return the perplexity of `text` under the model behind a server.

    Args:
        server: a vLLM server, or its URL; its --max-model-len must be at least `window` + 1 (it must
            generate a token).
        text: tokenized once, as a whole, with the tokenizer's own special tokens; the last, incomplete
            window is dropped.
        tokenizer: folder or hub id; default is what the server names as its model.
        window: tokens in a window.
        windows: how many windows to score, from the start; default all.
        num_concurrent: requests in flight.
        answers: memory of an interrupted run; the caller closes it.
        first: position in its window of the first token that counts.

    Raises:
        UserError: no server, a text without one whole window, a model length below `window` + 1, or the
            server fails a request.

    """
    if isinstance(server, str):
        server = connect(server)
    if window >= server.max_model_len:
        raise UserError(
            f"window {window} does not fit a server with --max-model-len {server.max_model_len}; "
            f"serve with --max-model-len {window + 1} or more, or take a smaller window"
        )
    if windows is not None and windows < 1:
        raise UserError(f"windows={windows}; give at least 1, or nothing for the whole text")
    prompts = token_windows(text, tokenizer or server.root, window)[:windows]
    questions = [Question(prompt[:first], [prompt[first:]]) for prompt in prompts]
    scores = score(server, questions, num_concurrent=num_concurrent, answers=answers, label="perplexity")
    nll = tuple(-math.fsum(one.logprobs) / len(one.logprobs) for (one,) in scores)
    return Perplexity(math.exp(math.fsum(nll) / len(nll)), nll, len(nll) * (window - first))


def token_windows(text: str, tokenizer: str, window: int) -> list[list[int]]:
    """Return the token ids of `text` in pieces of `window`, without the last, incomplete one.

    UserError for a text without one whole window; `tokenizer` is a folder or a hub id.
    """
    # Imported here: transformers takes seconds, and bad arguments must be reported before.
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(tokenizer)(text, verbose=False).input_ids
    if len(ids) < window:
        raise UserError(f"the text has {len(ids)} tokens, less than one window of {window}")
    return [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
