"""The worker's side of `/lutserve/score`: log-probabilities of the asked tokens only, equal work done once.

vLLM's prompt log-probabilities take the whole vocabulary through softmax, top-k and ranking for every token
of a prompt, and the model computes the context of a question once for each of its answers. Here the head
sees the rows that are asked for. And where requests of one step begin with the same tokens, every layer but
attention sees those rows once: they are equal, and a layer that works row by row gives equal rows. Attention
still gets all rows, so that the KV cache and its metadata are vLLM's own, and none of this changes a digit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lutserve.compat import (
    Attention,
    AttentionLayerBase,
    AttentionType,
    CompilationMode,
    GPUModelRunner,
    LogprobsTensors,
    get_layers_from_vllm_config,
)

#: in `SamplingParams.extra_args`: position of the first token to score, 1 or more
FIRST = "lutserve_score_from"
#: rows of the head computed together: enough for a fast GEMM, few enough for a CPU's last cache
_ROWS = 64


def prepare(runner: Any) -> bool | None:
    """Let `runner` answer scoring requests.

    Returns: whether it computes common beginnings once; None if it is a runner that we do not know.
    """
    if not isinstance(runner, GPUModelRunner):
        return None
    if not isinstance(runner, ScoringRunner):
        runner.__class__ = type("LutserveRunner", (ScoringRunner, type(runner)), {})
        attention = get_layers_from_vllm_config(runner.vllm_config, Attention).values()
        runner.row_sharing = RowSharing(attention) if _rows_can_be_shared(runner) else None
    return runner.row_sharing is not None


def _rows_can_be_shared(runner: Any) -> bool:
    """Whether attention is all that mixes the rows of a step, and nothing counts them beforehand."""
    config = runner.vllm_config
    parallel = config.parallel_config
    mixers = get_layers_from_vllm_config(config, AttentionLayerBase).values()
    return (
        config.compilation_config.mode == CompilationMode.NONE
        and not (config.lora_config or config.speculative_config or runner.uses_mrope)
        and parallel.pipeline_parallel_size == parallel.data_parallel_size == 1
        and all(isinstance(m, Attention) and m.attn_type == AttentionType.DECODER for m in mixers)
    )


class RowSharing:
    """Which rows of the step at hand stand for which, and the hooks that undo it around attention."""

    def __init__(self, attention: Iterable[torch.nn.Module]) -> None:
        #: [rows of the step] position of every row among the computed ones; None: all are computed
        self.place: torch.Tensor | None = None
        #: [computed rows] rows of the step
        self.kept: torch.Tensor | None = None
        for layer in attention:
            layer.register_forward_pre_hook(self._expand, with_kwargs=True)
            layer.register_forward_hook(self._select)

    def find(self, rows: int, requests: list[tuple[int, NDArray[Any]]], device: torch.device) -> None:
        """Find the common beginnings of neighbours.

        Args:
            rows: of the step.
            requests: first row and tokens of each request that starts in this step and may share.
            device: where the rows are.

        """
        self.place = self.kept = None
        original = np.arange(rows)
        for (before, known), (start, tokens) in pairwise(requests):
            length = min(len(known), len(tokens))
            differs = np.flatnonzero(known[:length] != tokens[:length])
            common = int(differs[0]) if len(differs) else length
            original[start : start + common] = original[before : before + common]
        kept, place = np.unique(original, return_inverse=True)
        if len(kept) < rows:
            self.place, self.kept = torch.from_numpy(place).to(device), torch.from_numpy(kept).to(device)

    def _expand(self, layer: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        place = self.place
        if place is not None:
            args = tuple(a[place] if isinstance(a, torch.Tensor) else a for a in args)
            kwargs = {k: a[place] if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
        return args, kwargs

    def _select(self, layer: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if self.kept is None else output[self.kept]


def first_to_score(request: Any) -> int | None:
    """Position of the first token that a request of the runner wants scored; None if it is none of ours."""
    found: int | None = ((request.sampling_params and request.sampling_params.extra_args) or {}).get(FIRST)
    return found


@dataclass(frozen=True)
class Piece:
    """What one step computes of one request's scores."""

    #: rows of the step's hidden states, and the tokens whose log-probabilities they give
    rows: NDArray[np.int64]
    targets: NDArray[np.int64]
    #: the request's answer, and where in it these belong; a rank is 1 where no token is more likely, else 2
    table: Any
    place: slice


class ScoringRunner:
    """Mixed over vLLM's model runner by `prepare`; requests without our mark are left to vLLM."""

    row_sharing: RowSharing | None
    requests: dict[str, Any]
    num_prompt_logprobs: dict[str, int]
    input_batch: Any
    query_start_loc: Any
    model: Any
    model_config: Any
    sampler: Any

    def _model_forward(self, input_ids: Any = None, positions: Any = None, **others: Any) -> Any:
        """Run the model, on rows of which no two are known to be equal."""
        sharing, forward = self.row_sharing, super()._model_forward  # type: ignore[misc]
        if sharing is None or input_ids is None:
            return forward(input_ids=input_ids, positions=positions, **others)
        sharing.find(len(input_ids), self._beginnings(), input_ids.device)
        if sharing.place is None:
            return forward(input_ids=input_ids, positions=positions, **others)
        try:
            hidden = forward(input_ids=input_ids[sharing.kept], positions=positions[sharing.kept], **others)
            return hidden[sharing.place]
        finally:
            sharing.place = sharing.kept = None

    def _beginnings(self) -> list[tuple[int, NDArray[Any]]]:
        """First row and tokens in this step of every scoring request that starts in it."""
        batch, starts = self.input_batch, self.query_start_loc.np
        return [
            (int(starts[i]), batch.token_ids_cpu[i, : starts[i + 1] - starts[i]])
            for i, name in enumerate(batch.req_ids)
            if not batch.num_computed_tokens_cpu[i] and first_to_score(self.requests[name]) is not None
        ]

    def _get_prompt_logprobs_dict(
        self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        """Return the finished prompts' log-probabilities: ours for our requests, vLLM's for the others."""
        ours = {
            name: first
            for name in self.num_prompt_logprobs
            if (first := first_to_score(self.requests[name])) is not None
        }
        waiting = {name: self.num_prompt_logprobs.pop(name) for name in ours}
        found: dict[str, Any] = super()._get_prompt_logprobs_dict(  # type: ignore[misc]
            hidden_states, num_scheduled_tokens
        )
        pieces: list[Piece] = []
        for name, first in ours.items():
            if name not in num_scheduled_tokens:
                continue
            request, tokens = self.requests[name], num_scheduled_tokens[name]
            pieces.append(self._piece(name, request, first, tokens))
            if request.num_computed_tokens + tokens >= len(request.prompt_token_ids):
                found[name] = request.in_progress_prompt_logprobs_cpu
                request.in_progress_prompt_logprobs_cpu = None
                del waiting[name]
        self.num_prompt_logprobs.update(waiting)
        self._score(hidden_states, [piece for piece in pieces if len(piece.rows)])
        return found

    def _piece(self, name: str, request: Any, first: int, tokens: int) -> Piece:
        """Return what a step of `tokens` tokens computes of a request's scores."""
        ids, computed = request.prompt_token_ids, request.num_computed_tokens
        if request.in_progress_prompt_logprobs_cpu is None:
            request.in_progress_prompt_logprobs_cpu = LogprobsTensors.empty_cpu(len(ids) - first, 1)
        # Row i of a prompt says how likely token i + 1 is.
        begin = max(computed, first - 1)
        end = max(begin, min(computed + tokens, len(ids) - 1))
        start = int(self.query_start_loc.np[self.input_batch.req_id_to_index[name]]) - computed
        return Piece(
            rows=np.arange(start + begin, start + end),
            targets=np.asarray(ids[begin + 1 : end + 1], dtype=np.int64),
            table=request.in_progress_prompt_logprobs_cpu,
            place=slice(begin - first + 1, end - first + 1),
        )

    def _score(self, hidden_states: torch.Tensor, pieces: list[Piece]) -> None:
        """Fill the pieces' places in their tables."""
        if not pieces:
            return
        device = hidden_states.device
        targets = torch.from_numpy(np.concatenate([piece.targets for piece in pieces]))
        # Answers to one question begin after the same row.
        rows, place = np.unique(np.concatenate([piece.rows for piece in pieces]), return_inverse=True)
        order = np.argsort(place, kind="stable")
        limits = np.searchsorted(place[order], np.arange(0, len(rows) + _ROWS, _ROWS))
        logprobs, ranks = torch.empty(len(targets)), torch.empty(len(targets), dtype=torch.int32)
        for index, (low, high) in enumerate(pairwise(limits)):
            chunk = torch.from_numpy(rows[index * _ROWS : (index + 1) * _ROWS]).to(device)
            asked = torch.from_numpy(order[low:high])
            scores = self._scores(self.model.compute_logits(hidden_states[chunk]))
            row = torch.from_numpy(place[order[low:high]] - index * _ROWS).to(device)
            values = scores[row, targets[asked].to(device)]
            logprobs[asked] = values.cpu()
            ranks[asked] = (1 + (values < scores.amax(dim=-1)[row]).int()).cpu()
        at = 0
        for piece in pieces:
            part = slice(at, at := at + len(piece.rows))
            piece.table.logprob_token_ids[piece.place, 0] = targets[part].int()
            piece.table.logprobs[piece.place, 0] = logprobs[part]
            piece.table.selected_token_ranks[piece.place] = ranks[part]

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what `--logprobs-mode` calls the log-probabilities, fp32 [rows, vocabulary]."""
        if self.model_config.logprobs_mode in ("raw_logits", "processed_logits"):
            return logits.float()
        scores: torch.Tensor = self.sampler.compute_logprobs(logits)
        return scores
