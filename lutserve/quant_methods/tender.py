"""Tender for vLLM (ISCA'24): integers for weights and activations, the baseline of AxCore's paper.

An emulation in plain torch for studies: integers are fp32 numbers and nothing is fast. A chunk is 256 rows of
a call, so a token's result depends on what is in the batch with it.
"""

from __future__ import annotations

from typing import Any

import torch

from lutserve.compat import LinearMethodBase, get_current_vllm_config
from lutserve.methods import Method
from lutserve.quant_methods import online
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.quantizers.tender import quantize_weight, round_activations
from lutserve.recipe import Group

#: groups of channels by bits of activations: OPT's, and those of LLaMA-2 7B for all other models
GROUPS = {"opt": {8: 4, 4: 8}, "": {8: 8, 4: 14}}


class TenderLinearMethod(LinearMethodBase):
    """vLLM's side of a layer."""

    uses_meta_device = True

    def __init__(self, method: Method, report: LayerReport, model_type: str) -> None:
        self.bits, self.report = method.activations, report
        self.groups = GROUPS.get(model_type, GROUPS[""])[self.bits]

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register the 16-bit weight [sum(out), in] that the checkpoint's (fused) shards load into."""
        n = sum(output_partition_sizes)
        online.create_weight(layer, n, input_size_per_partition, params_dtype, extra["weight_loader"])

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Round the weight, and let the 16-bit one go."""
        weight = online.take_weight(layer)
        if weight is None:
            return
        codes, scales = quantize_weight(weight, self.bits)
        layer.register_buffer("tender_weight", codes, persistent=False)
        layer.register_buffer("tender_scales", scales[:, 0], persistent=False)
        self.report.weights, self.report.kernel = weight.numel(), "torch (emulation)"
        self.report.bits = self.bits + 32 * len(scales) / weight.numel()
        REPORTS.finish(self.report)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the layer's output, [..., N], for x [..., K]; sums in fp32, rounded once."""
        rounded = round_activations(x.reshape(-1, x.shape[-1]), self.bits, self.groups)
        out = rounded @ layer.get_buffer("tender_weight").T * layer.get_buffer("tender_scales")
        out = out if bias is None else out + bias
        return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])


def linear_method(method: Method, group: Group, report: LayerReport) -> TenderLinearMethod:
    """Return the vLLM linear method of one layer (called through the registry in `lutserve.methods`)."""
    config = get_current_vllm_config().model_config.hf_config
    return TenderLinearMethod(method, report, getattr(config, "model_type", ""))
