"""How likely a server finds given continuations: by its scoring route, else by `/v1/completions`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import httpx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lutserve.errors import UserError
from lutserve.eval.answers import Answers
from lutserve.server.client import CONSOLE, Server, http

#: seconds before the second and the third attempt of a request that failed
_PAUSES = (1.0, 2.0)


class Question(NamedTuple):
    """A context of at least one token, and what may follow it, as token ids."""

    context: list[int]
    continuations: list[list[int]]


class Score(NamedTuple):
    """One continuation's natural log-probabilities, and whether each token was the likeliest."""

    logprobs: list[float]
    greedy: list[bool]


def score(
    server: Server,
    questions: Sequence[Question],
    *,
    num_concurrent: int,
    answers: Answers | None = None,
    label: str = "scoring",
) -> list[list[Score]]:
    """Return the scores of every question's continuations, with a progress bar.

    Args:
        server: one that `connect` found; the longest prompt must be shorter than its `max_model_len`.
        questions: each is one HTTP request where the server has our route, else one a continuation.
        num_concurrent: questions in flight.
        answers: memory of an interrupted run; the caller closes it.
        label: what the bar says.

    Raises:
        UserError: the server refuses a request, or has stopped answering.

    """
    ask = _by_route if server.scores else _by_completions
    found: dict[int, list[Score]] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=CONSOLE,
    )
    with bar, http(server.base_url, timeout=1200) as client, ThreadPoolExecutor(num_concurrent) as pool:
        task = bar.add_task(label, total=len(questions))
        jobs = {}
        for index, question in enumerate(questions):
            known = answers.get(list(question)) if answers is not None else None
            if known is None:
                jobs[pool.submit(ask, client, server, question)] = index
            else:
                found[index] = [Score(*one) for one in known]
        bar.update(task, completed=len(found))
        try:
            for job in as_completed(jobs):
                index = jobs[job]
                found[index] = job.result()
                if answers is not None:
                    answers.put(list(questions[index]), found[index])
                bar.update(task, completed=len(found))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[index] for index in range(len(questions))]


def _by_route(client: httpx.Client, server: Server, question: Question) -> list[Score]:
    answer = _post(client, server, "/lutserve/score", {"questions": [question._asdict()]})
    return [Score(one["logprobs"], one["greedy"]) for one in answer["scores"][0]]


def _by_completions(client: httpx.Client, server: Server, question: Question) -> list[Score]:
    scores = []
    first = len(question.context)
    for continuation in question.continuations:
        body: dict[str, Any] = {"model": server.model, "prompt": question.context + continuation}
        # One token is generated: several servers refuse to generate none. It is the last of the lists.
        body |= {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        found = _post(client, server, "/v1/completions", body)["choices"][0]["logprobs"]
        values = found["token_logprobs"][first:-1]
        best = [max(top.values()) for top in found["top_logprobs"][first:-1]]
        scores.append(Score(values, [value == top for value, top in zip(values, best, strict=True)]))
    return scores


def _post(client: httpx.Client, server: Server, path: str, body: dict[str, Any]) -> Any:
    for pause in (*_PAUSES, None):
        try:
            answer = client.post(path, json=body)
        except httpx.HTTPError as error:
            failure = f"the server at {server.base_url} stopped answering ({error!r})"
        else:
            if answer.is_success:
                return answer.json()
            failure = f"{server.base_url} answers {answer.status_code}: {answer.text[:500]}"
            if answer.status_code < 500:
                break
        if pause is not None:
            time.sleep(pause)
    raise UserError(f"{failure}; its answers so far are kept: give the same command again to go on")
