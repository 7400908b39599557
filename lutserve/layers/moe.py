"""Experts of a mixture (the Qwen3-30B-A3B layout) whose gate activation is a table.

vLLM's fused CPU kernel applies silu or gelu inside, on fp32 sums that nothing can reach. With a table the
experts run one after another instead, each as a dense MLP does: gate_up GEMM, `act_and_mul`, down GEMM.
So gate and up are rounded to the model's dtype before the activation, as in a dense layer.
"""

from __future__ import annotations

from typing import Any

import torch

from lutserve.compat import MoEActivation, RoutedExperts, UnquantizedFusedMoEMethod, init_logger
from lutserve.errors import UserError
from lutserve.kernels import activation
from lutserve.layers.sites import TableSite, wanted
from lutserve.recipe import Site

logger = init_logger("vllm.lutserve")

_SITES: dict[MoEActivation, tuple[Site, str]] = {
    MoEActivation.SILU: ("silu", "silu"),
    MoEActivation.GELU: ("gelu", "gelu"),
    MoEActivation.GELU_TANH: ("gelu", "gelu_tanh"),
}


class LutFusedMoEMethod(UnquantizedFusedMoEMethod):
    """vLLM's 16-bit experts; with a table for their activation, a loop over the experts in use."""

    def __init__(self, moe: Any) -> None:
        super().__init__(moe)
        site, function = _SITES.get(moe.activation, (None, ""))
        if site and wanted(site):
            self.table_site = TableSite(site, function, self._use_table)
        elif not site and (wanted("silu") or wanted("gelu")):
            logger.warning_once("lutserve has no table for experts with %s, which stay exact", moe.activation)
        self.uses_table = False

    def _use_table(self) -> None:
        self.uses_table = True

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the weights as they are loaded where a table is used; else pack them for vLLM's kernel."""
        if hasattr(self, "table_site") and self.table_site.resolve(layer.layer_name):
            if not layer.w13_weight.is_cpu:
                raise UserError(
                    f"{layer.layer_name}: tables in experts need a CPU; use --lut exact for silu and gelu"
                )
            if layer.expert_map is not None:
                raise UserError(f"{layer.layer_name}: expert parallelism works only with --lut exact")
            return
        super().process_weights_after_loading(layer)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts.

        x: [tokens, hidden]. topk_weights, topk_ids: [tokens, k]. Returns [tokens, hidden], summed in fp32.
        """
        if not self.uses_table:
            out: torch.Tensor = super().apply(layer, x, topk_weights, topk_ids, *args, **kwargs)
            return out
        weights = topk_weights.float()
        if layer.apply_router_weight_on_input:
            x, weights = (x * weights).to(x.dtype), torch.ones_like(weights)
        total = x.new_zeros(x.shape, dtype=torch.float32)
        order = topk_ids.flatten().argsort(stable=True)
        loads = topk_ids.flatten().bincount(minlength=layer.global_num_experts).tolist()
        for expert, pairs in enumerate(order.split(loads)):
            if len(pairs):
                rows = pairs // topk_ids.shape[1]
                y = self._expert(layer, expert, x[rows]).float()
                total.index_add_(0, rows, y * weights.flatten()[pairs, None])
        return total.to(x.dtype)

    def _expert(self, layer: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert on the rows that chose it."""
        biases = [getattr(layer, name, None) for name in ("w13_bias", "w2_bias")]
        first, second = (None if bias is None else bias[expert] for bias in biases)
        gate_up = torch.nn.functional.linear(x, layer.w13_weight[expert], first)
        if self.table_site.counter is not None:
            self.table_site.counter(gate_up[..., : gate_up.shape[-1] // 2])
        inner = activation.act_and_mul(gate_up, self.table_site.table)
        return torch.nn.functional.linear(inner, layer.w2_weight[expert], second)


def check(experts: RoutedExperts) -> None:
    """UserError for experts whose kernel has the activation inside while the recipe wants a table there."""
    method = type(experts.quant_method)
    if method is LutFusedMoEMethod or not (wanted("silu") or wanted("gelu")):
        return
    raise UserError(
        f"{experts.layer_name}: {method.__name__} computes its activation inside a fused kernel, so --lut "
        "works only with 16-bit experts; use them, or --lut exact for the sites silu and gelu"
    )
