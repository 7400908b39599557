"""lm-eval's `local-completions`, scoring by `lutserve.eval.scores` and with a memory on disk.

Importing this module imports lm-eval (seconds); set the offline variables before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from lutserve.errors import UserError
from lutserve.eval.answers import Answers
from lutserve.eval.scores import Question, score
from lutserve.server.client import Server

#: a context and what follows it, as token ids
Pair = tuple[list[int], list[int]]


class ServedModel(LocalCompletionsAPI):
    """`local-completions` that asks the server all answers to a question at once, and nothing twice.

    Prompts, tokens and generated answers are lm-eval's own. `num_concurrent` must be at least 2: with 1,
    lm-eval takes a different path when it generates, one that does not call `amodel_call`.

    Args:
        server: the server to ask.
        answers: the memory; the caller deletes or closes it.
        arguments: passed to LocalCompletionsAPI.

    """

    def __init__(self, server: Server, answers: Answers, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._server = server
        self._answers = answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood in nats of each continuation, and whether it is the greedy one."""
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        grouped: dict[tuple[int, ...], list[int]] = {}
        for index, (context, _) in enumerate(pairs):
            grouped.setdefault(tuple(context), []).append(index)
        # Long questions first: a step of the server then holds questions of similar length, and the
        # remaining time is never underestimated.
        groups = sorted(grouped.values(), key=lambda group: -max(sum(map(len, pairs[i])) for i in group))
        questions = [Question(pairs[group[0]][0], [pairs[i][1] for i in group]) for group in groups]
        scores = score(self._server, questions, num_concurrent=self._concurrent, answers=self._answers)
        found: dict[int, tuple[float, bool]] = {}
        for group, answers in zip(groups, scores, strict=True):
            for index, one in zip(group, answers, strict=True):
                found[index] = sum(one.logprobs), all(one.greedy)
        return [found[index] for index in range(len(requests))]

    def _cut(self, context: list[int], continuation: list[int]) -> Pair:
        """Drop the oldest tokens that do not fit, as lm-eval does."""
        excess = max(0, len(context) + len(continuation) - self.max_length)
        if excess >= len(context):
            raise UserError(
                f"an answer of {len(continuation)} tokens leaves no room for its question in "
                f"{self.max_length + 1} tokens; serve with a longer --max-model-len"
            )
        return context[excess:], continuation

    async def amodel_call(
        self,
        session: Any,
        sem: Any,
        messages: list[list[int]],
        *,
        generate: bool = True,
        cache_keys: list[Any] | None = None,
        ctxlens: list[int] | None = None,
        gen_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Generate for one batch of requests: from memory, else by the server."""
        request = [messages, gen_kwargs]
        # A sampled answer is no answer to the next equal request.
        repeatable = not (gen_kwargs or {}).get("do_sample", False)
        known: list[Any] | None = self._answers.get(request) if repeatable else None
        if known is not None:
            return known
        fresh: list[Any] = await super().amodel_call(
            session, sem, messages, generate=generate, ctxlens=ctxlens, gen_kwargs=gen_kwargs, **kwargs
        )
        if repeatable:
            self._answers.put(request, fresh)
        return fresh

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each document, in nats.

        The windows are lm-eval's, but of all documents at once: lm-eval goes document by document, which
        leaves the server idle at the end of each and draws a progress bar for each.
        """
        documents = [self._rolling_windows(request.args[0]) for request in requests]
        scores = iter(self._loglikelihood_tokens([window for windows in documents for window in windows]))
        return [sum(next(scores)[0] for _ in windows) for windows in documents]

    def _rolling_windows(self, text: str) -> list[tuple[None, list[int], list[int]]]:
        windows = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length - 1,
            context_len=1,
        )
        return [(None, *utils.make_disjoint_window(window)) for window in windows]
