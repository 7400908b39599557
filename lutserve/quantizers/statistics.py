"""What the linear layers of a block see on the calibration data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lutserve.quantizers.skeleton import run_block

E = TypeVar("E", bound="Entry")


@dataclass
class Inputs:
    """One input of one or several linear layers, summed up over all calibration tokens.

    layers: names of the layers that read it, in the order in which they run.
    hessian: fp32 [K, K], sum of x x^T.
    absmax, absmean: fp32 [K], largest and mean |x| (absmean is a sum until `collect` returns).
    tokens: how many.
    kept: fp32 [some, K] of each sample, `rows` of its tokens and evenly spread (fewer if it has fewer).
    """

    layers: list[str]
    hessian: Tensor
    absmax: Tensor
    absmean: Tensor
    tokens: int = 0
    rows: int = 0
    kept: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, k: int, rows: int = 0) -> Inputs:
        """An entry of width k that has seen nothing, and keeps so many rows of each sample."""
        return cls([], torch.zeros(k, k), torch.zeros(k), torch.zeros(k), rows=rows)

    def add(self, x: Tensor) -> None:
        """Take in x [..., K]."""
        x = x.reshape(-1, x.shape[-1])
        self.hessian.addmm_(x.t(), x)
        size = x.abs()
        torch.maximum(self.absmax, size.amax(0), out=self.absmax)
        self.absmean += size.sum(0)
        self.tokens += len(x)
        if self.rows:
            self.kept.append(x[:: -(-len(x) // self.rows)].clone())

    def rescale(self, scale: Tensor) -> None:
        """Follow a division of the input by `scale` [K]."""
        self.hessian.div_(scale).div_(scale[:, None])
        self.absmax /= scale
        self.absmean /= scale


class Entry(Protocol):
    """What sums up one input: the layers that read it, and a way to take in more of it."""

    layers: list[str]

    def add(self, x: Tensor) -> None:
        """Take in x [..., K]."""


@dataclass
class _Recorder(Generic[E]):
    make: Callable[[int], E]
    inputs: list[E] = field(default_factory=list)
    #: tensors of the running sample and their place in `inputs`; held, so that no address is used twice
    seen: list[tuple[Tensor, int]] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def __call__(self, name: str, x: Tensor) -> None:
        known = next((i for tensor, i in self.seen if _same(tensor, x)), None)
        place = self.places.setdefault(name, len(self.inputs) if known is None else known)
        if place == len(self.inputs):
            self.inputs.append(self.make(x.shape[-1]))
        if name not in self.inputs[place].layers:
            self.inputs[place].layers.append(name)
        if known is None:
            self.inputs[place].add(x)
            self.seen.append((x, place))


def collect(
    block: nn.Module,
    linears: dict[str, nn.Linear],
    hidden: list[Tensor],
    arguments: dict[str, Any],
    advance: bool = False,
    progress: Callable[[], None] = lambda: None,
    rows: int = 0,
) -> list[Inputs]:
    """Run a block over the samples and sum up the inputs of its linear layers; see `record` and `Inputs`."""
    inputs = record(partial(Inputs.empty, rows=rows), block, linears, hidden, arguments, advance, progress)
    for entry in inputs:
        entry.absmean /= entry.tokens
    return inputs


@torch.no_grad()
def record(
    make: Callable[[int], E],
    block: nn.Module,
    linears: dict[str, nn.Linear],
    hidden: list[Tensor],
    arguments: dict[str, Any],
    advance: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> list[E]:
    """Run a block over the samples and let entries take in the inputs of its linear layers.

    Layers that are handed the same tensor (q, k and v) share one entry.

    Args:
        make: makes an empty entry for an input of the given width.
        block: filled with weights.
        linears: its linear layers by name.
        hidden: samples, fp32 [1, L, H].
        arguments: what else the block is called with.
        advance: replace each sample by what the block makes of it.
        progress: called after each sample.

    """
    recorder = _Recorder(make)

    def hook(name: str) -> Any:
        return lambda module, given: recorder(name, given[0])

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        for i, sample in enumerate(hidden):
            recorder.seen.clear()
            out = run_block(block, sample, arguments)
            if advance:
                hidden[i] = out
            progress()
    finally:
        for handle in hooks:
            handle.remove()
    return recorder.inputs


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
