"""vLLM's view of a recipe: the `lutserve` quantization config, which gives every linear its method."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from lutserve.compat import (
    QUANTIZATION_METHODS,
    LinearBase,
    ParallelLMHead,
    QuantizationConfig,
    QuantizeMethodBase,
    current_recipe,
    init_logger,
    register_quantization_config,
)
from lutserve.errors import UserError
from lutserve.recipe import Recipe, parse

logger = init_logger("vllm.lutserve")


@dataclass
class LayerReport:
    """What one fused linear layer turned out to be, for the start-up lines, metrics and routes."""

    prefix: str
    method: str
    #: the checkpoint's names of what was fused into it
    parts: tuple[str, ...] = ()
    kernel: str = ""
    #: stored bits a weight, scales included
    bits: float = 16.0
    weights: int = 0
    done: bool = False
    #: state that changes while serving (outlier columns now, calls that found new ones)
    live: Any = None

    @property
    def stored_bits(self) -> float:
        """Bits a weight now, the 16-bit copies of outlier columns included."""
        extra = 16 * self.live.weight.numel() / self.weights if self.live and self.weights else 0.0
        return self.bits + extra

    @property
    def group(self) -> str:
        """The last part of the name, which all decoder blocks share, e.g. ``qkv_proj``."""
        return self.prefix.rsplit(".", 1)[-1]


@dataclass
class Reports:
    """All layer reports of the model in this process."""

    layers: dict[str, LayerReport] = field(default_factory=dict)

    def finish(self, report: LayerReport) -> None:
        """Mark one layer as packed; after the last one log a line for each group of like layers."""
        report.done = True
        if all(layer.done for layer in self.layers.values()):
            kinds = Counter((r.group, r.method, r.kernel, round(r.bits, 2)) for r in self.layers.values())
            for (group, method, kernel, bits), count in kinds.items():
                logger.info(
                    "lutserve: %s x%d: method %s, kernel %s, %.2f bits a weight",
                    group,
                    count,
                    method,
                    kernel,
                    bits,
                )


#: one model a process is all that vLLM builds, so its reports are a module-level fact
REPORTS = Reports()


class LutserveConfig(QuantizationConfig):
    """Quantization config named `lutserve`; `recipe` says what every layer uses."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.stored_recipe = recipe

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the checkpoint's own `config.json`; flags may override it (see compat.recipe_of)."""
        return self.stored_recipe

    def get_name(self) -> str:
        """Return the name used by `--quantization` and `quant_method`."""
        return "lutserve"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the model dtypes that all our methods take."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the smallest CUDA capability, times ten (Turing: int8 tensor cores)."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file names: `--quantization lutserve` works on a plain 16-bit checkpoint."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LutserveConfig:
        """Build from the `quantization_config` of a `config.json`."""
        return cls(parse(config, "quantization_config"))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a layer; None (vLLM's default) for all but linears and the head."""
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        recipe = current_recipe()
        if recipe is None:
            raise UserError(
                "--quantization lutserve needs a recipe: use `lutserve serve --method ...`, a folder whose "
                "config.json carries one, or --additional-config '{\"lutserve\": {...}}'"
            )
        if isinstance(layer, ParallelLMHead):
            return self._head_method(prefix)
        stem, _, leaf = prefix.rpartition(".")
        shards = [f"{stem}.{name}" for name in self.packed_modules_mapping.get(leaf, [])]
        group = recipe.group_for(prefix, shards)
        method = group.arithmetic
        report = REPORTS.layers[prefix] = LayerReport(prefix, method.name, tuple(shards))
        family = import_module(f"lutserve.quant_methods.{method.family}")
        linear_method: QuantizeMethodBase = family.linear_method(method, group, report)
        return linear_method

    @staticmethod
    def _head_method(prefix: str) -> QuantizeMethodBase:
        report = REPORTS.layers[prefix] = LayerReport(prefix, "none")
        head_method: QuantizeMethodBase = import_module("lutserve.quant_methods.linear16").head_method(report)
        return head_method


def register() -> None:
    """Make vLLM accept `quant_method: lutserve`; idempotent."""
    if "lutserve" not in QUANTIZATION_METHODS:
        register_quantization_config("lutserve")(LutserveConfig)
