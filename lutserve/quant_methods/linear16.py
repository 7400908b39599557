"""Layers that stay 16 bit, the model's head included: `lutserve::linear16` where vLLM's GEMM is slow.

vLLM has fast 16-bit GEMMs for dtypes whose products the CPU computes itself (`isa.slow_16_bit` lists the
others), and falls back to an emulation several times slower than fp32 elsewhere.
"""

from __future__ import annotations

import torch

from lutserve.compat import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
    VocabParallelEmbedding,
    current_recipe,
    get_current_vllm_config,
)
from lutserve.kernels import isa, library, linear16
from lutserve.kernels.pages import in_huge_pages
from lutserve.methods import Method
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.recipe import Group


class Packed:
    """One layer's weight as `linear16` reads it, or nothing where vLLM serves the layer."""

    def __init__(self, report: LayerReport, allowed: bool) -> None:
        self.report, self.allowed = report, allowed
        self.n = 0

    def take(self, layer: torch.nn.Module) -> bool:
        """Pack the layer's weight if vLLM's GEMM for it is slow here; return whether that was done."""
        weight = layer.get_parameter("weight").data
        self.report.weights = weight.numel()
        backend = library.backend_for("linear16") if self.allowed and _is_slow(weight) else "reference"
        if backend in ("reference", "cpu/portable"):
            self.report.kernel = "vllm"
            return False
        self.report.kernel = f"linear16 {backend}"
        self.n = len(weight)
        # As a buffer: torch.compile then takes it for an input, not for a constant to copy.
        layer.register_buffer("weight_panels", in_huge_pages(linear16.pack(weight)), persistent=False)
        return True

    def multiply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return x @ W^T + bias, [..., N], for x [..., K]."""
        out: torch.Tensor = linear16.linear16(x.reshape(-1, x.shape[-1]), layer.weight_panels, self.n, bias)
        return out.view(*x.shape[:-1], self.n)


def _is_slow(weight: torch.Tensor) -> bool:
    dtype = str(weight.dtype).removeprefix("torch.")
    return weight.is_cpu and weight.dim() == 2 and dtype in isa.slow_16_bit()


def _let_go(layer: torch.nn.Module) -> None:
    layer.register_parameter("weight", torch.nn.Parameter(torch.empty(0), requires_grad=False))


class Linear16Method(UnquantizedLinearMethod):
    """vLLM's side of a linear layer that stays 16 bit."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the weight and let the loaded one go, or let vLLM do so."""
        # vLLM reads the weight itself of the layers that it marks so.
        if not getattr(layer, "_cpu_skip_gemm_dispatch", False) and self.packed.take(layer):
            _let_go(layer)
        else:
            super().process_weights_after_loading(layer)
        REPORTS.finish(self.packed.report)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x @ W^T + bias, [..., N], for x [..., K]."""
        if self.packed.n:
            return self.packed.multiply(layer, x, bias)
        out: torch.Tensor = super().apply(layer, x, bias)
        return out


class Head16Method(UnquantizedEmbeddingMethod):
    """vLLM's side of the head. Where it shares its weight with the embedding, both layouts are kept."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed, self.tied = packed, False

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: VocabParallelEmbedding) -> torch.nn.Module:
        """Share the embedding's weight; it then stays as it is for the look-ups."""
        self.tied = True
        tied: torch.nn.Module = super().tie_weights(layer, embed_tokens)
        return tied

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the weight, or let vLLM do so."""
        if not self.packed.take(layer):
            super().process_weights_after_loading(layer)
        elif not self.tied:
            _let_go(layer)
        REPORTS.finish(self.packed.report)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x @ W^T + bias, [..., N], for x [..., K]."""
        if self.packed.n:
            return self.packed.multiply(layer, x, bias)
        out: torch.Tensor = super().apply(layer, x, bias)
        return out


def _allowed() -> bool:
    recipe = current_recipe()
    return recipe is not None and recipe.linear16 == "auto"


def linear_method(method: Method, group: Group, report: LayerReport) -> Linear16Method:
    """Return the vLLM linear method of one layer (called through the registry in `lutserve.methods`)."""
    return Linear16Method(Packed(report, _allowed()))


def head_method(report: LayerReport) -> Head16Method:
    """Return the vLLM method of the language model's head."""
    model = get_current_vllm_config().model_config
    # A head of another precision than the model's is multiplied by vLLM with the weight as it was loaded.
    return Head16Method(Packed(report, _allowed() and model.head_dtype == model.dtype))
