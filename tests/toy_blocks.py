"""The two-block model behind the golden GPTQ and AWQ runs, its architecture recovered from their results."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class ToyModel:
    """x + tanh(q) * sigmoid(k) for attention, then fc2(relu(fc1)); `parameters` by name."""

    def __init__(self, parameters: dict[str, Tensor]):
        self.parameters = parameters

    def embed(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.parameters["emb.weight"])

    def run(self, x: Tensor, block: int, changed: dict[str, Tensor] | None = None):
        """What leaves a block for x [T, 32], and what its linear layers read; some weights changed."""
        p = {
            key.removeprefix(f"layers.{block}."): value
            for key, value in self.parameters.items()
            if key.startswith(f"layers.{block}.")
        } | (changed or {})

        def norm(name: str, y: Tensor) -> Tensor:
            return functional.layer_norm(y, y.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

        first = norm("ln1", x)
        x = x + torch.tanh(first @ p["q.weight"].T) * torch.sigmoid(first @ p["k.weight"].T)
        second = norm("ln2", x)
        third = functional.relu(functional.linear(second, p["fc1.weight"], p["fc1.bias"]))
        out = x + functional.linear(third, p["fc2.weight"], p["fc2.bias"])
        return out, {"q": first, "k": first, "fc1": second, "fc2": third}
