"""lm-eval's `local-completions` with two things added: a memory on disk and rolling requests in parallel.

Importing this module imports lm-eval (seconds); set the offline variables before.
"""

from __future__ import annotations

from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from lutserve.eval.answers import Answers


class ResumableCompletions(LocalCompletionsAPI):
    """`local-completions` that asks the server only what it was not asked in an interrupted run.

    Requests, prompts and the reading of the answers are lm-eval's own. `num_concurrent` must be at least
    2: with 1, lm-eval takes a different path, one that does not call `amodel_call`.

    Args:
        answers: the memory; the caller deletes or closes it.
        arguments: passed to LocalCompletionsAPI.

    """

    def __init__(self, answers: Answers, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._answers = answers

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
        """Answer one batch of requests: from memory, else by the server."""
        request = [generate, messages, ctxlens, gen_kwargs]
        # A sampled answer is no answer to the next equal request.
        repeatable = not (gen_kwargs or {}).get("do_sample", False)
        known = self._answers.get(request) if repeatable else None
        if known is not None:
            return [tuple(answer) if isinstance(answer, list) else answer for answer in known]
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
