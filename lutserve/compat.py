"""Every name of vLLM that lutserve uses, in one place, so that a new vLLM release is one file to check.

Importing this module imports vLLM (seconds): only code that runs inside a vLLM process may do so.
Measured with vLLM 0.32.0.
"""

from __future__ import annotations

from vllm import _custom_ops as vllm_ops
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.v1.metrics.loggers import StatLoggerBase

from lutserve.recipe import Recipe, parse

__all__ = [
    "QUANTIZATION_METHODS",
    "CustomOp",
    "GeluAndMul",
    "LinearBase",
    "LinearMethodBase",
    "ModelWeightParameter",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "SiluAndMul",
    "StatLoggerBase",
    "UnquantizedLinearMethod",
    "current_recipe",
    "get_current_vllm_config",
    "in_dummy_run",
    "init_logger",
    "op_registry_oot",
    "recipe_of",
    "register_quantization_config",
    "vllm_ops",
]


def recipe_of(vllm_config: object) -> Recipe | None:
    """Return the recipe that a VllmConfig carries, or None where lutserve is installed but not asked for.

    `--additional-config '{"lutserve": {...}}'` comes first (it is what `lutserve serve` passes, and it
    enters vLLM's compile-cache key), then the `quantization_config` of the model's own `config.json`.
    """
    extra = getattr(vllm_config, "additional_config", None)
    if isinstance(extra, dict) and "lutserve" in extra:
        return parse(extra["lutserve"], "--additional-config lutserve")
    return getattr(getattr(vllm_config, "quant_config", None), "recipe", None)


def current_recipe() -> Recipe | None:
    """`recipe_of` the model that is being built right now."""
    return recipe_of(get_current_vllm_config())


def in_dummy_run() -> bool:
    """Whether vLLM is profiling or warming up with made-up activations, which must teach us nothing."""
    return not is_forward_context_available() or get_forward_context().attn_metadata is None
