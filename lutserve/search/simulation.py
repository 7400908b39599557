"""A transformers model that computes in fp32 on 16-bit weights, and whose operators can be replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lutserve.errors import UserError
from lutserve.recipe import read_json
from lutserve.search import architecture, operators
from lutserve.search.architecture import Architecture, Site
from lutserve.search.operators import ACTIVATIONS, Activation, Function, Linear, Norm, Operator, Softmax

#: made for an operator when it is called, and let go afterwards, so that one weight at a time is in memory
Replace = Callable[[Any], Function]
#: positions whose logits are in memory at once
_POSITIONS = 128
#: tokens that go through the model at once
_TOKENS = 1024
_ATTENTION = "lutserve_search"


class Simulation:
    """The model, with its operators by vLLM's names of the fused layers and by the recipe's of other sites.

    sites: fused layer -> its shape. operators: name -> the operators that it is made of. decoder: number of
    the block of each. UserError for a folder that cannot be loaded.
    """

    def __init__(self, folder: Path, tables: Sequence[str] = ()) -> None:
        """Load a model; `tables` are the nonlinear sites to have operators for beside the linear layers."""
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(_ATTENTION, operators.attention)
        AttentionMaskInterface.register(_ATTENTION, eager_mask)
        self.folder = folder
        self.arch: Architecture = architecture.of(read_json(folder / "config.json"))
        kind = {"attn_implementation": _ATTENTION} if "softmax_exp" in tables else {}
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True, **kind)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load {folder}: {str(error).splitlines()[0]}") from None
        self.model: Any = model.eval().requires_grad_(False)
        self.sites: dict[str, Site] = {}
        self.operators: dict[str, list[Operator]] = {}
        self.decoder: dict[str, int] = {}
        for number in range(self.arch.layers):
            for site in self.arch.sites:
                name = self.arch.prefix(number, site)
                parts = [f"{self.arch.blocks}.{number}.{shard}" for shard in site.shards]
                self.sites[name] = site
                self._place(name, number, [Linear(model.get_submodule(part)) for part in parts])
            for table in tables:
                self._place(f"{self.arch.blocks}.{number}.{table}", number, self._functions(number, table))
        self.head = Linear(model.get_output_embeddings())
        self._widen()

    def _place(self, name: str, number: int, made: Sequence[Operator]) -> None:
        self.operators[name], self.decoder[name] = list(made), number

    def _functions(self, number: int, table: str) -> list[Operator]:
        """Operators of a nonlinear site in a block."""
        found: list[Operator] = []
        for module in self.blocks()[number].modules():
            kind = type(module).__name__
            if table == "softmax_exp" and hasattr(module, "scaling"):
                found.append(Softmax(module))
            elif table == "rsqrt" and kind.endswith(("RMSNorm", "LayerNorm")):
                found.append(Norm(module))
            elif kind in ACTIVATIONS and ACTIVATIONS[kind].startswith(table):
                found.append(Activation(module))
        if not found:
            raise UserError(f"a {self.arch.family} model has no {table} in its decoder blocks")
        return found

    def _widen(self) -> None:
        """Let all but the large weights be fp32, and embeddings become it when they are looked up."""
        embedding = self.model.get_input_embeddings()
        large = {id(op.parameter) for ops in self.operators.values() for op in ops if isinstance(op, Linear)}
        large |= {id(self.head.parameter), id(embedding.weight)}
        for parameter in self.model.parameters():
            if id(parameter) not in large:
                parameter.data = parameter.data.float()
        embedding.register_forward_hook(lambda module, inputs, output: output.float())

    def digest(self) -> str:
        """SHA-256 of the configuration and the weights."""
        total = hashlib.sha256()
        for file in sorted([self.folder / "config.json", *self.folder.glob("*.safetensors")]):
            with file.open("rb") as data:
                while chunk := data.read(1 << 20):
                    total.update(chunk)
        return total.hexdigest()

    def blocks(self) -> Any:
        """The decoder blocks, in order."""
        return self.model.get_submodule(self.arch.blocks)

    def hidden(self, windows: Tensor) -> Tensor:
        """What the output layer reads for each token of `windows` [B, L]: fp32 [B * L, hidden]."""
        states: Tensor = self.model.base_model(windows, use_cache=False).last_hidden_state
        return states.flatten(0, 1)

    @torch.no_grad()
    def hidden_of(self, windows: Sequence[Tensor]) -> Tensor:
        """The same for windows [L] of one length, a few at a time."""
        return torch.cat([self.hidden(batch) for batch in batches(windows)])

    def log_probs(self, hidden: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Log-probabilities of the next token, fp32 [some positions, vocabulary], and which positions."""
        # Made once: it is the largest weight of a small model.
        weight = self.head.weight.float()
        for start in range(0, len(hidden), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            yield torch.nn.functional.linear(hidden[part], weight, self.head.bias).log_softmax(-1), part

    @torch.no_grad()
    def kl(self, windows: Sequence[Tensor], reference: Tensor) -> float:
        """Mean KL(p || p now) in nats, where `reference` is `hidden_of` the windows before the change."""
        now, total = self.hidden_of(windows), 0.0
        for (before, _), (after, _) in zip(self.log_probs(reference), self.log_probs(now), strict=True):
            total += float((before.exp() * (before - after)).sum(dtype=torch.float64))
        return total / len(reference)

    @contextmanager
    def replaced(self, changes: Mapping[str, Replace]) -> Iterator[None]:
        """Let operators be computed by replacements, for as long as the context lasts."""
        changed = [(op, replace) for name, replace in changes.items() for op in self.operators[name]]
        try:
            for operator, replace in changed:
                operator.replacement = partial(_made_and_called, replace, operator)
            yield
        finally:
            for operator, _ in changed:
                operator.replacement = None

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Keep only what enters each block for the backward pass, and compute the rest again."""
        kept = [(block, block.forward) for block in self.blocks()]
        try:
            for block, forward in kept:
                block.forward = partial(checkpoint, forward, use_reentrant=False)
            yield
        finally:
            for block, forward in kept:
                block.forward = forward


def _made_and_called(replace: Replace, operator: Operator, *inputs: Tensor) -> Tensor:
    return replace(operator)(*inputs)


def batches(windows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Windows [L] of one length, stacked to [B, L] of about a thousand tokens."""
    count = max(1, _TOKENS // len(windows[0]))
    for start in range(0, len(windows), count):
        yield torch.stack(list(windows[start : start + count]))


def units(simulation: Simulation, granularity: str) -> dict[str, list[str]]:
    """Linear layers that are chosen as one: every fused layer (`site`), or all of a block (`block`)."""
    if granularity == "site":
        return {name: [name] for name in simulation.sites}
    if granularity != "block":
        raise UserError(f"--granularity {granularity}; allowed: site, block")
    found: dict[str, list[str]] = {}
    for name in simulation.sites:
        found.setdefault(f"{simulation.arch.blocks}.{simulation.decoder[name]}", []).append(name)
    return found
