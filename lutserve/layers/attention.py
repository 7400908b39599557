"""vLLM's attention on CPUs with tables in its softmax (`kernels.attention`).

vLLM's platform for CPUs always takes the backend CPU_ATTN, so ours takes that name and decides from the
recipe while the model is built: vLLM's own classes where every softmax is exact, ours for all layers where
one is not. All layers, because those that share a cache must write it in one layout, and builder and
implementation must fit; a layer whose sites are exact then computes the exact rule of our kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lutserve import luts
from lutserve.compat import (
    AttentionBackendEnum,
    AttentionMetadataBuilder,
    AttentionType,
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
    current_recipe,
    get_current_vllm_config,
    init_logger,
    is_building,
    register_backend,
)
from lutserve.errors import UserError
from lutserve.kernels import attention, library
from lutserve.layers import names, saturation
from lutserve.layers.sites import REPORTS, SiteReport
from lutserve.recipe import Recipe, Site

logger = init_logger("vllm.lutserve")


def wanted() -> bool:
    """Whether the model being built needs our softmax in some layer."""
    recipe = current_recipe() if is_building() else None
    return recipe is not None and (
        recipe.may_use("softmax_exp") or recipe.may_use("softmax_recip") or recipe.softmax_sum == "float16"
    )


class LutAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU_ATTN, or ours under its name."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Return the class that computes."""
        return LutAttentionImpl if wanted() else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        """Return the class that prepares a step for the class above."""
        return LutMetadataBuilder if wanted() else CPUAttentionMetadataBuilder


@dataclass
class LutMetadata:
    """One step's requests, shared by the layers of a KV cache group."""

    #: int32 [requests, blocks]
    block_table: torch.Tensor
    #: int32 [requests + 1]
    query_start: torch.Tensor
    #: int32 [requests], keys of each request with those of this step
    lengths: torch.Tensor


class LutMetadataBuilder(AttentionMetadataBuilder[LutMetadata]):
    """Takes over what vLLM's model runner has prepared; our kernel plans for itself."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> LutMetadata:
        """Return the metadata of one step."""
        m = common_attn_metadata
        if m.causal is not True:
            raise UserError("softmax tables serve causal attention only; use --lut-sites without softmax")
        return LutMetadata(m.block_table_tensor, m.query_start_loc, m.seq_lens)


class LutAttentionImpl(CPUAttentionBackendImpl):
    """Decoder attention of one layer through `lutserve::lut_attention`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self, get_current_vllm_config())
        library.load()
        recipe = current_recipe()
        assert recipe is not None, "vLLM has changed the recipe between get_impl_cls and the implementation"
        self.recipe = recipe
        self.tables: tuple[torch.Tensor | None, torch.Tensor | None] | None = None
        self.counter: saturation.Counter | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store key and value [tokens, kv heads, head size] in the cache."""
        attention.cache_write(key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LutMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from query [tokens, heads, head size] to the cache; fills and returns output, so shaped."""
        # In the warm-up run, before any request: what is wrong with a table shows at the start.
        if self.tables is None:
            self.tables = load_tables(self.recipe, layer.layer_name)
            self.counter = saturation.COUNTERS.get((layer.layer_name, "softmax_exp"))
        if attn_metadata is None:
            return output
        if self.counter is not None:
            m = attn_metadata
            steps = m.block_table, m.query_start, m.lengths
            self.counter(query, kv_cache, *steps, self.scale, self.sliding_window)
        attention.lut_attention(
            query,
            kv_cache,
            attn_metadata.block_table,
            attn_metadata.query_start,
            attn_metadata.lengths,
            output,
            self.scale,
            self.sliding_window,
            *self.tables,
            self.recipe.softmax_sum == "float16",
        )
        return output


def refuse(impl: CPUAttentionBackendImpl, vllm_config: Any) -> None:
    """UserError where a layer needs what our kernel does not compute."""
    dtype = vllm_config.model_config.dtype
    reasons = {
        f"{impl.attn_type} attention": impl.attn_type != AttentionType.DECODER,
        "ALiBi": impl.alibi_slopes is not None,
        "capped scores": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        f"head size {impl.head_size} (multiples of 16 up to 256 are served)": not (
            impl.head_size % 16 == 0 and impl.head_size <= 256
        ),
        f"a {impl.kv_cache_dtype} KV cache": impl.is_fp8_kv_cache,
        f"the model's dtype {dtype}": dtype not in (torch.float16, torch.bfloat16),
        "KV transfer, which knows vLLM's cache layout only": vllm_config.kv_transfer_config is not None,
    }
    found = [reason for reason, true in reasons.items() if true]
    if found:
        raise UserError(
            f"softmax tables cannot serve this model: {', '.join(found)}; "
            "use --lut-sites without softmax_exp and softmax_recip"
        )


def load_tables(recipe: Recipe, module: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the fp16 tables [65536] of exp and reciprocal in an attention layer, None where exact.

    Reports them, and makes the counter of exp's saturations where the recipe asks for it.
    """
    sites: dict[Site, str] = {"softmax_exp": "softmax_exp", "softmax_recip": "reciprocal"}
    found: list[torch.Tensor | None] = []
    specs: list[str] = []
    for site, function in sites.items():
        spec = recipe.lut_for(site, names.layer_of(module), module)
        specs.append(f"{site} {spec}")
        if spec == "exact":
            found.append(None)
            continue
        found.append(luts.lut_table(function, spec, torch.float16))
        identity = luts.table_id(function, spec, torch.float16)
        REPORTS[module, site] = SiteReport(site, module, function, spec, identity)
        if recipe.count_saturations:
            saturation.counter(module, site, function, spec)
    kernel = library.backend_for("lut_attention")
    logger.info_once(
        "lutserve: attention: %s, sum %s, kernel %s", ", ".join(specs), recipe.softmax_sum, kernel
    )
    return found[0], found[1]


def register() -> None:
    """Stand in for vLLM's attention backend on CPUs; idempotent."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{LutAttentionBackend.__qualname__}")
