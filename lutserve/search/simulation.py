"""A transformers model in fp32 whose fused layers can be given the weights of any candidate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutserve.errors import UserError
from lutserve.recipe import read_json
from lutserve.search import architecture
from lutserve.search.architecture import Architecture, Site
from lutserve.search.candidates import Candidate

Choice = Mapping[str, Candidate]
Change = Callable[[Tensor], Tensor]


class Simulation:
    """The model and its fused layers by vLLM's names; UserError for a folder that cannot be loaded.

    sites: name -> its shape. shards: name -> the modules that it is made of.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.folder = folder
        self.arch: Architecture = architecture.of(read_json(folder / "config.json"))
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load {folder}: {str(error).splitlines()[0]}") from None
        self.model: Any = model.eval().requires_grad_(False)
        self.sites: dict[str, Site] = {}
        self.shards: dict[str, list[Any]] = {}
        for layer in range(self.arch.layers):
            for site in self.arch.sites:
                name = self.arch.prefix(layer, site)
                self.sites[name] = site
                self.shards[name] = [
                    self.model.get_submodule(f"{self.arch.blocks}.{layer}.{shard}") for shard in site.shards
                ]

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

    def block_of(self, name: str) -> int:
        """The number of the block that holds a fused layer."""
        return int(name.removeprefix(f"{self.arch.blocks}.").partition(".")[0])

    @torch.no_grad()
    def log_probs(self, window: Tensor) -> Tensor:
        """Log-probabilities of the token after each of `window` [L]: fp32 [L, vocabulary]."""
        logits: Tensor = self.model(window[None], use_cache=False).logits[0]
        return logits.float().log_softmax(-1)

    def kl(self, window: Tensor, reference: Tensor) -> float:
        """KL(reference || now) in nats, summed over the positions of a window."""
        difference = reference - self.log_probs(window)
        return float(difference.mul_(reference.exp()).sum(dtype=torch.float64))

    @contextmanager
    def applied(self, choice: Choice) -> Iterator[None]:
        """Give fused layers the weights of candidates, for as long as the context lasts."""
        with self.changed({name: candidate.weight for name, candidate in choice.items()}):
            yield

    @contextmanager
    def changed(self, changes: Mapping[str, Change]) -> Iterator[None]:
        """Give the weights [N, K] of fused layers' shards what a function makes of them, for a while."""
        kept: list[tuple[Any, Tensor]] = []
        try:
            for name, change in changes.items():
                for module in self.shards[name]:
                    kept.append((module, module.weight.data))
                    module.weight.data = oriented(module, change(weight_of(module)))
            yield
        finally:
            for module, weight in kept:
                module.weight.data = weight


def weight_of(module: Any) -> Tensor:
    """The weight of a shard as [N out, K in]; GPT-2 keeps it the other way round."""
    return oriented(module, module.weight.data)


def oriented(module: Any, weight: Tensor) -> Tensor:
    """Turn a weight [N, K] into the module's own orientation, or back."""
    return weight.T.contiguous() if type(module).__name__ == "Conv1D" else weight


def units(simulation: Simulation, granularity: str) -> dict[str, list[str]]:
    """What is chosen as one: every fused layer (`site`), or all of a block (`block`)."""
    if granularity == "site":
        return {name: [name] for name in simulation.sites}
    if granularity != "block":
        raise UserError(f"--granularity {granularity}; allowed: site, block")
    found: dict[str, list[str]] = {}
    for name in simulation.sites:
        found.setdefault(f"{simulation.arch.blocks}.{simulation.block_of(name)}", []).append(name)
    return found


def tokens_of(windows: Sequence[Tensor]) -> int:
    """Positions in all windows."""
    return sum(len(window) for window in windows)
