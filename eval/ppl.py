"""Perplexity as the papers quote it: one long text, non-overlapping windows, no stride.

This is not lm-eval's `wikitext` (a word perplexity, document by document); the two cannot be compared.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lutserve.errors import UserError
from lutserve.eval.answers import Answers
from lutserve.server.client import CONSOLE, Server, connect, http


@dataclass(frozen=True)
class Perplexity:
    """The outcome of `perplexity`."""

    #: exp of the mean negative log-likelihood over all scored tokens
    ppl: float
    #: mean negative log-likelihood of each window, in nats a token, in the order of the text
    nll: tuple[float, ...]
    #: tokens scored: a window of n tokens scores n - 1, the first has no context
    tokens: int


def wikitext2(folder: Path) -> str:
    """Return the WikiText-2 test text in the papers' form, from `wikitext2_test.raw.gz` in `folder`.

    The rows of the data set ("" for a blank line, else the line with its line end) joined by two line
    ends: 1,294,336 characters.

    Raises:
        UserError: the file is not there.

    """
    path = folder / "wikitext2_test.raw.gz"
    try:
        lines = gzip.decompress(path.read_bytes()).decode().removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the folder with the evaluation data") from None
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def perplexity(
    base_url: str,
    text: str,
    *,
    tokenizer: str | None = None,
    window: int = 2048,
    windows: int | None = None,
    num_concurrent: int = 4,
    cache: Path | None = None,
    first: int = 1,
) -> Perplexity:
    """Return the perplexity of `text` under the model behind `base_url`.

    Args:
        base_url: a vLLM server whose --max-model-len is at least `window` + 1 (it must generate a token).
        text: tokenized once, as a whole, with the tokenizer's own special tokens; the last, incomplete
            window is dropped.
        tokenizer: folder or hub id; default is what the server names as its model.
        window: tokens in a window.
        windows: how many windows to score, from the start; default all.
        num_concurrent: requests in flight.
        cache: file that keeps the answers, so that an interrupted run goes on where it was; the caller
            removes it.
        first: position in its window of the first token that counts.

    Raises:
        UserError: no server, a text without one whole window, a model length below `window` + 1, or the
            server fails a request.

    """
    server = connect(base_url)
    if window >= server.max_model_len:
        raise UserError(
            f"window {window} does not fit a server with --max-model-len {server.max_model_len}; "
            f"serve with --max-model-len {window + 1} or more, or take a smaller window"
        )
    if windows is not None and windows < 1:
        raise UserError(f"windows={windows}; give at least 1, or nothing for the whole text")
    prompts = token_windows(text, tokenizer or server.root, window)[:windows]
    scores = _score_all(server, prompts, num_concurrent, Answers(cache) if cache else None, first)
    return Perplexity(_ppl(scores), tuple(scores), len(scores) * (window - first))


def _score_all(
    server: Server, prompts: list[list[int]], num_concurrent: int, answers: Answers | None, first: int
) -> list[float]:
    """Mean negative log-likelihood of every prompt, with a progress bar."""
    done: dict[int, float] = {}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=CONSOLE,
    )
    with progress, http(server.base_url) as client, ThreadPoolExecutor(num_concurrent) as pool:
        bar = progress.add_task("perplexity", total=len(prompts))
        jobs = {}
        for index, prompt in enumerate(prompts):
            known = answers.get(prompt) if answers is not None else None
            if known is None:
                jobs[pool.submit(_mean_nll, client, server, prompt, first)] = index
            else:
                done[index] = known
        progress.update(bar, completed=len(done))
        try:
            for job in as_completed(jobs):
                index = jobs[job]
                done[index] = job.result()
                if answers is not None:
                    answers.put(prompts[index], done[index])
                shown = f"perplexity {_ppl(done.values()):.3f}"
                progress.update(bar, completed=len(done), description=shown)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if answers is not None:
        answers.close()
    return [done[index] for index in range(len(prompts))]


def _ppl(nll: Collection[float]) -> float:
    return math.exp(math.fsum(nll) / len(nll))


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


def _mean_nll(client: httpx.Client, server: Server, prompt: Sequence[int], first: int) -> float:
    """Mean negative log-likelihood of the tokens of `prompt` from position `first` on."""
    # `prompt_logprobs: 0` is the lightest request: the prompt's own tokens and nothing else. The usual
    # `echo` + `logprobs` sends every number twice, with the best token beside it (2.6 times the bytes).
    body: dict[str, Any] = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
    }
    try:
        answer = client.post("/v1/completions", json=body)
    except httpx.HTTPError as error:
        raise UserError(f"the server at {server.base_url} stopped answering ({error!r})") from None
    if not answer.is_success:
        raise UserError(f"{server.base_url} answers {answer.status_code}: {answer.text[:500]}")
    scores = answer.json()["choices"][0]["prompt_logprobs"][first:]
    return -math.fsum(
        score[str(token)]["logprob"] for token, score in zip(prompt[first:], scores, strict=True)
    ) / len(scores)
