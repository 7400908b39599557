"""`/lutserve/score`: the log-probabilities of `/v1/completions` with `echo`, for less work."""

from __future__ import annotations

import asyncio
import math
import uuid
from typing import Annotated, Any

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field

from lutserve.server.scoring_worker import FIRST

#: /v1/completions gives no smaller log-probability either; JSON has no infinity
_FLOOR = -9999.0
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Strict(BaseModel):
    """A part of a request: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class Question(Strict):
    """One context and what may follow it, as token ids; the context is not scored."""

    context: Tokens
    continuations: Annotated[list[Tokens], Field(min_length=1)]


class ScoreRequest(Strict):
    """Questions are answered together, in one batch as far as the server's limits allow."""

    questions: Annotated[list[Question], Field(min_length=1)]


class Score(BaseModel):
    """What one continuation got, token by token."""

    #: natural logarithm, float32
    logprobs: list[float]
    #: whether no token was more likely
    greedy: list[bool]


class ScoreResponse(BaseModel):
    """Scores of every question's continuations, in the order of the request."""

    scores: list[list[Score]]


async def score(engine_client: Any, request: ScoreRequest) -> ScoreResponse:
    """Answer a request.

    Raises:
        HTTPException: 400 for a prompt that the model cannot take, 500 if it computes NaN.

    """
    jobs = [
        [
            asyncio.create_task(_score(engine_client, question.context, tokens))
            for tokens in question.continuations
        ]
        for question in request.questions
    ]
    every = [job for group in jobs for job in group]
    try:
        await asyncio.gather(*every)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    finally:
        for job in every:
            job.cancel()
    return ScoreResponse(scores=[[job.result() for job in group] for group in jobs])


async def _score(engine_client: Any, context: list[int], continuation: list[int]) -> Score:
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        extra_args={FIRST: len(context)},
    )
    prompt = {"prompt_token_ids": context + continuation}
    async for output in engine_client.generate(prompt, params, request_id=f"score-{uuid.uuid4().hex}"):
        found = output.prompt_logprobs
    if any(map(math.isnan, found.logprobs)):
        raise HTTPException(500, "the model computes NaN for this prompt")
    return Score(
        logprobs=[max(value, _FLOOR) for value in found.logprobs], greedy=[rank == 1 for rank in found.ranks]
    )
