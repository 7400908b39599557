"""How far the weights of a quantised folder, whoever made it, are from those of the original model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lutserve import mixq_layout
from lutserve.checkpoint import Checkpoint, LayerFacts
from lutserve.errors import UserError
from lutserve.foreign import Foreign
from lutserve.mixq_folder import MixqFolder
from lutserve.quantizers.quality import sqnr
from lutserve.quantizers.source import Source
from lutserve.recipe import from_model, read_json

#: alternations that fit the factors of rows and of columns; three would do
_ROUNDS = 5


def open_folder(folder: Path) -> Checkpoint | Foreign | MixqFolder:
    """Return the reader of a quantised folder; UserError if there is none for it."""
    config = read_json(folder / "config.json")
    stored = config.get("quantization_config") or {}
    recipe = from_model(config) or mixq_layout.recipe_of(folder)
    groups = recipe.config_groups.values() if recipe else ()
    if any(group.stored and group.arithmetic.family == "mixq" for group in groups):
        return MixqFolder(folder)
    return Checkpoint(folder) if stored.get("quant_method") == "lutserve" else Foreign(folder)


def measured(
    stored: Checkpoint | Foreign | MixqFolder, facts: list[LayerFacts], source: Source
) -> list[LayerFacts]:
    """Return facts with `weight_sqnr` measured against the weights of the original model.

    Where scales are folded into the weights the original's rows and columns are scaled to match.

    Raises:
        UserError: the original has no such layer, or one of another shape.

    """
    found = []
    for layer in facts:
        exact = source.tensor(source.find(f"{layer.name}.weight", "model")).float()
        if exact.shape != layer.shape:
            raise UserError(
                f"{layer.name} is {layer.shape[0]} x {layer.shape[1]} in {stored.folder}, "
                f"{' x '.join(map(str, exact.shape))} in {source.folder}; is that the original?"
            )
        weight = stored.weight(layer.name)
        exact = scaled_like(exact, weight) if stored.folded else exact
        found.append(replace(layer, weight_sqnr=sqnr(exact, weight)))
    return found


def scaled_like(exact: Tensor, weight: Tensor) -> Tensor:
    """`exact` [N, K] with its rows and columns multiplied so that it is nearest to `weight`."""
    exact, weight = exact.double(), weight.double()
    for _ in range(_ROUNDS):
        for dim in (0, 1):
            power = exact.square().sum(dim, keepdim=True)
            share = (exact * weight).sum(dim, keepdim=True) / power
            exact = exact * torch.where(power == 0, torch.ones_like(share), share)
    return exact
