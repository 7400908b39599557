"""16-bit weights that are quantised while the checkpoint loads.

vLLM loads a whole model before it lets methods process their weights. A weight made here is an empty
promise until the checkpoint's last part for its layer has come; then vLLM makes it real and has it processed
at once. So one layer is in memory in 16 bit, not the model. (A layer whose bias comes before its weight waits
for the end of loading, because vLLM counts both and starts to count at the weight.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lutserve.compat import ModelWeightParameter, initialize_online_processing


def create_weight(
    layer: torch.nn.Module, n: int, k: int, dtype: torch.dtype, loader: Callable[..., None]
) -> None:
    """Register `weight` [n, k]; the layer's method must have `uses_meta_device` set."""
    weight = torch.empty(n, k, dtype=dtype, device="meta")
    parameter = ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)
    layer.register_parameter("weight", parameter)
    initialize_online_processing(layer)


def take_weight(layer: torch.nn.Module) -> torch.Tensor | None:
    """Return the loaded weight [n, k] and leave an empty one; None where it is taken already.

    vLLM processes every layer a second time when the whole model is loaded.
    """
    weight = layer.get_parameter("weight").data
    if not weight.numel():
        return None
    empty = torch.empty(0, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(empty, requires_grad=False)
    return weight
