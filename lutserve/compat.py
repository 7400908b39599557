"""Every name of vLLM that lutserve uses, in one place, so that a new vLLM release is one file to check.

Importing this module imports vLLM (seconds): only code that runs inside a vLLM process may do so.
Measured with vLLM 0.32.0.
"""

from __future__ import annotations

from vllm import _custom_ops as vllm_ops
from vllm.config import (
    CompilationMode,
    VllmConfig,
    get_current_vllm_config,
    get_current_vllm_config_or_none,
    get_layers_from_vllm_config,
    set_current_vllm_config,
)
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.forward_context import get_forward_context, is_forward_context_available, set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import (
    GELU,
    FastGELU,
    GeluAndMul,
    GELUTanh,
    NewGELU,
    QuickGELU,
    SiluAndMul,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheLayout
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from lutserve.recipe import Recipe, parse

__all__ = [
    "GELU",
    "QUANTIZATION_METHODS",
    "Attention",
    "AttentionBackend",
    "AttentionBackendEnum",
    "AttentionCGSupport",
    "AttentionLayerBase",
    "AttentionMetadataBuilder",
    "AttentionType",
    "BasevLLMParameter",
    "CPUAttentionBackend",
    "CPUAttentionBackendImpl",
    "CPUAttentionMetadataBuilder",
    "ChannelQuantScaleParameter",
    "CompilationMode",
    "CustomOp",
    "EngineArgs",
    "FastGELU",
    "GELUTanh",
    "GPUModelRunner",
    "GeluAndMul",
    "GemmaRMSNorm",
    "GroupQuantScaleParameter",
    "KVCacheLayout",
    "LayerNorm",
    "LinearBase",
    "LinearMethodBase",
    "LogprobsTensors",
    "MoEActivation",
    "ModelWeightParameter",
    "MultipleOf",
    "NewGELU",
    "PackedvLLMParameter",
    "ParallelLMHead",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "QuickGELU",
    "RMSNorm",
    "ReplicatedLinear",
    "RoutedExperts",
    "SiluAndMul",
    "StatLoggerBase",
    "UnquantizedEmbeddingMethod",
    "UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "VocabParallelEmbedding",
    "current_model",
    "current_platform",
    "current_recipe",
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "get_current_vllm_config",
    "get_layers_from_vllm_config",
    "get_model",
    "graph_rows",
    "in_dummy_run",
    "init_distributed_environment",
    "init_logger",
    "initialize_model_parallel",
    "initialize_online_processing",
    "is_building",
    "op_registry_oot",
    "recipe_of",
    "register_backend",
    "register_quantization_config",
    "register_weight_loader_v2_supported_method",
    "set_current_vllm_config",
    "set_forward_context",
    "vllm_ops",
    "with_cancellation",
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


def current_model() -> str:
    """Folder or hub id of the model that is being built right now; empty outside of that."""
    config = get_current_vllm_config_or_none()
    return config.model_config.model if config and config.model_config else ""


def is_building() -> bool:
    """Whether vLLM has a configuration in force: it is building or loading a model in this process."""
    return get_current_vllm_config_or_none() is not None


def in_dummy_run() -> bool:
    """Whether vLLM is profiling or warming up with made-up activations, which must teach us nothing."""
    return not is_forward_context_available() or get_forward_context().attn_metadata is None


def graph_rows() -> int:
    """Most tokens of a step that vLLM replays from a CUDA graph; 0 where it captures or builds nothing."""
    config = get_current_vllm_config_or_none()
    on_cuda = config is not None and current_platform.is_cuda()
    captures = on_cuda and config.compilation_config.max_cudagraph_capture_size
    return int(captures or 0)
