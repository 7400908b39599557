"""Where the division of a layer's input by a scale can be hidden: in the norm or linear layer before it.

Which module that is differs between architectures, so it is found by trying: divide the module's output
channels, multiply the weights that read them, and see whether the block still computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lutserve.quantizers.skeleton import run_block
from lutserve.quantizers.statistics import Inputs

#: share of a token's own contribution by which a wrong fold, and not rounding, changes it
_WRONG = 1e-3


@dataclass(frozen=True, eq=False)
class Fold:
    """A module that can take over a division of an input's channels.

    module: name within the block. kind: `scale` for weight / s, `offset` for norms that compute with
    1 + weight, `rows` for a linear layer, whose rows (and bias) are divided.
    channels: int64 [K], the module's channel that each input channel comes from; heads that share a value
        projection share its channels, and so must share a scale.
    """

    module: str
    kind: Literal["scale", "offset", "rows"]
    channels: Tensor

    def tie(self, scale: Tensor) -> Tensor:
        """The nearest scale [K] that can be folded: channels of one origin get their geometric mean."""
        if len(self.channels.unique()) == len(self.channels):
            return scale
        origins = int(self.channels.max()) + 1
        total = torch.zeros(origins).index_add_(0, self.channels, scale.log())
        count = torch.zeros(origins).index_add_(0, self.channels, torch.ones_like(scale))
        return (total / count).exp_()[self.channels]

    def apply(self, block: nn.Module, scale: Tensor, dtypes: dict[str, torch.dtype]) -> Tensor:
        """Divide by `scale` [K] inside the module; return by what it really divides.

        Norm weights are stored in 16 bit. They are rounded here and now, so that the weights which are
        multiplied by the returned scale make up for the rounding exactly.

        Args:
            block: the decoder block.
            scale: a scale that `tie` leaves as it is.
            dtypes: how each parameter of the block is stored.

        """
        module = block.get_submodule(self.module)
        rows = torch.ones(int(self.channels.max()) + 1).index_copy_(0, self.channels, scale)
        for key, parameter in module.named_parameters(recurse=False):
            assert isinstance(parameter, nn.Parameter)
            if self.kind == "rows":
                parameter.div_(rows[:, None] if parameter.ndim == 2 else rows)
                continue
            shift = 1.0 if self.kind == "offset" and key == "weight" else 0.0
            old = parameter + shift
            new = (old / rows - shift).to(dtypes[f"{self.module}.{key}"]).float()
            if key == "weight":
                moved = old / (new + shift)
                usable = moved.isfinite() & (moved > 0)
                new = torch.where(usable, new, parameter)
                rows = torch.where(usable, moved, torch.ones_like(moved))
            parameter.copy_(new)
        return rows[self.channels]


@torch.no_grad()
def find(
    block: nn.Module,
    linears: dict[str, nn.Linear],
    entry: Inputs,
    hidden: Tensor,
    arguments: dict[str, Any],
    head_size: int | None,
    hint: Fold | None = None,
) -> Fold | None:
    """Return the module that can take over a division of `entry`'s channels, or None.

    Args:
        block: filled with weights; left as it was.
        linears: its linear layers.
        entry: the input.
        hidden: one sample [1, L, H] to try on.
        arguments: what else the block is called with.
        head_size: channels of an attention head, for heads that share a value projection.
        hint: what was found in another block, tried first.

    """
    k = len(entry.absmax)
    before = run_block(block, hidden, arguments)
    test = 0.5 + torch.arange(k).remainder(7) / 4
    found = _candidates(block, linears, entry.layers, k, head_size)
    for fold in [hint, *found] if hint else found:
        touched = [block.get_submodule(name) for name in (fold.module, *entry.layers)]
        saved = [(p, p.clone()) for module in touched for p in module.parameters()]
        dtypes = {name: torch.float32 for name, _ in block.named_parameters()}
        scale = fold.apply(block, fold.tie(test), dtypes)
        for name in entry.layers:
            linears[name].weight.mul_(scale)
        after = run_block(block, hidden, arguments)
        for parameter, value in saved:
            parameter.copy_(value)
        # Token by token, because one token's values can be a thousand times another's.
        change = (after - before).norm(dim=-1) / (before - hidden).norm(dim=-1)
        if change.median() < _WRONG and bool((scale != 1).any()):
            return fold
    return None


def _candidates(
    block: nn.Module, linears: dict[str, nn.Linear], readers: list[str], k: int, head_size: int | None
) -> Iterator[Fold]:
    """Modules that run before the readers and have fitting channels, the likely ones first."""
    straight = torch.arange(k)
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.shape == (k,):
            yield Fold(name, "scale", straight)
            yield Fold(name, "offset", straight)
    order = list(linears)
    # Modules are listed in the order of the architecture's source, which is that of their use.
    for name in reversed(order[: min(order.index(reader) for reader in readers)]):
        rows = linears[name].out_features
        if rows == k:
            yield Fold(name, "rows", straight)
        elif head_size and rows < k and k % rows == 0 and rows % head_size == 0:
            heads = straight.view(-1, k // rows, head_size)
            shared = torch.arange(rows).view(-1, 1, head_size).expand_as(heads)
            yield Fold(name, "rows", shared.reshape(-1))
