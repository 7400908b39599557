"""Write a model whose layers are int4, int8 or 16 bit as compressed-tensors, which vLLM serves by itself.

int4 is its `pack-quantized` W4A16: weight_packed int32 [N, K / 8] with column 8j + i in bits 4i to 4i + 3,
as the integer plus 8, weight_scale [N, G], weight_shape. int8 is its `int-quantized` W8A8: weight int8
[N, K], weight_scale [N, 1], activations rounded by token while serving.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutserve.errors import UserError
from lutserve.kernels.reference import quantize_rows
from lutserve.quantizers.partial import Partial
from lutserve.quantizers.rtn import rtn
from lutserve.quantizers.source import Source
from lutserve.recipe import Group, Recipe
from lutserve.search import architecture

#: method -> how compressed-tensors calls its layout
_FORMATS = {"int4": "pack-quantized", "int8": "int-quantized"}


def export(model: Path, output: Path, recipe: Recipe) -> None:
    """Round the layers of a model folder to nearest, as a recipe says, into a new folder.

    Args:
        model: Hugging Face folder with 16-bit weights.
        output: folder to make.
        recipe: none, int8 and int4 for linear layers, and nothing else.

    Raises:
        UserError: the recipe has anything else, the model cannot be read, or the output is in the way.

    """
    if output.exists():
        raise UserError(f"{output} exists; give another folder or remove it")
    if recipe.luts or recipe.attends:
        raise UserError("compressed-tensors holds weights only; leave tables and 4-bit caches out")
    source = Source(model)
    if source.config.get("model_type") == "gpt2":
        raise UserError("GPT-2 keeps its linear layers transposed (Conv1D), which is not supported")
    layers = _layers(source, recipe)
    chosen = {name: group for name, group in layers.items() if group.method != "none"}
    if not chosen:
        raise UserError("every layer is left in 16 bit, so there is nothing to export")
    for name, group in chosen.items():
        _check(name, group, source)
    exact = [name for name in layers if name not in chosen]
    config = source.config | {"quantization_config": _config(chosen, exact)}
    with Partial(output, {"compressed-tensors": recipe.to_config()}) as partial:
        extras = {"config.json": json.dumps(config, indent=2) + "\n"}
        partial.finish(_tensors(source, chosen), extras, source.companions())


def _layers(source: Source, recipe: Recipe) -> dict[str, Group]:
    """The checkpoint's linear layers, and what the recipe makes of the fused layer that each is in."""
    found = architecture.fused(source.config)
    return {name: recipe.group_for(prefix, parts) for name, (prefix, parts) in found.items()}


def _check(name: str, group: Group, source: Source) -> None:
    if f"{name}.weight" not in source.names:
        raise UserError(f"{source.folder} has no {name}.weight")
    if group.method not in _FORMATS:
        raise UserError(
            f"{name} is {group.method}, which compressed-tensors does not know; allowed: none, int8, int4"
        )
    k = source.tensor(f"{name}.weight").shape[1]
    if group.method == "int4" and (k % 8 or (group.group_size != -1 and k % group.group_size)):
        raise UserError(f"{name}: groups of {group.group_size} do not divide {k} columns, as vLLM wants them")


def _tensors(source: Source, chosen: dict[str, Group]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the folder."""
    for name in sorted(source.names):
        layer = name.removesuffix(".weight")
        if layer not in chosen or layer == name:
            yield name, source.tensor(name)
        else:
            yield from _quantized(layer, source.tensor(name), chosen[layer])


def _quantized(layer: str, weight: Tensor, group: Group) -> Iterator[tuple[str, Tensor]]:
    if group.method == "int8":
        codes, scales = quantize_rows(weight)
        yield f"{layer}.weight", codes
        yield f"{layer}.weight_scale", scales[:, None].to(weight.dtype)
        return
    rounded = rtn(weight, "int4", group.group_size)
    nibbles = rounded.codes.view(len(weight), -1, 8).long() << torch.arange(0, 32, 4)
    words = nibbles.sum(-1)
    yield f"{layer}.weight_packed", torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    yield f"{layer}.weight_scale", rounded.scales.to(weight.dtype)
    yield f"{layer}.weight_shape", torch.tensor(weight.shape)


def _config(chosen: dict[str, Group], exact: list[str]) -> dict[str, Any]:
    """The `quantization_config` of the folder."""
    by_scheme: dict[tuple[str, int], list[str]] = {}
    for name, group in chosen.items():
        by_scheme.setdefault((group.method, -1 if group.method == "int8" else group.group_size), []).append(
            name
        )
    groups = {}
    for number, ((method, size), targets) in enumerate(by_scheme.items()):
        weights: dict[str, Any] = {"num_bits": int(method[3:]), "type": "int", "symmetric": True}
        weights |= {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": weights | {"dynamic": False},
            "input_activations": activations if method == "int8" else None,
            "format": _FORMATS[method],
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *exact],
    }
