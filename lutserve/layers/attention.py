"""vLLM's attention with tables in its softmax or 4 bits in its cache (`kernels.attention`, `kv4`).

vLLM's platform for CPUs always takes the backend CPU_ATTN, so ours takes that name and decides from the
recipe while the model is built: vLLM's own classes where cache and every softmax are exact, ours for all
layers where one is not. All layers, because those that share a cache must write it in one layout, and
builder and implementation must fit; a layer whose sites are exact then computes the exact rule of our kernel.
On CUDA the same implementations serve under a name of their own (`layers.cuda_attention`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lutserve import kv_formats, luts
from lutserve.compat import (
    AttentionBackendEnum,
    AttentionCGSupport,
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
from lutserve.kernels import attention, kv4, kv4_attention, library
from lutserve.layers import names, saturation
from lutserve.layers.kv_cache import Tensors
from lutserve.layers.sites import REPORTS, SiteReport
from lutserve.recipe import Recipe, Site

logger = init_logger("vllm.lutserve")


def wanted() -> bool:
    """Whether the model being built needs our attention in some layer."""
    recipe = current_recipe() if is_building() else None
    return recipe is not None and recipe.attends


class LutAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU_ATTN, or ours under its name."""

    #: of the model that this process has built; vLLM asks for page sizes after that, without a configuration
    scheme: kv_formats.Scheme | None = None

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Return the class that computes."""
        recipe = current_recipe() if is_building() else None
        if recipe is not None and recipe.kv_numerics == "reference":
            from lutserve.layers.kv_reference import ReferenceAttentionImpl

            return ReferenceAttentionImpl
        if recipe is not None and recipe.packs_cache:
            return Kv4AttentionImpl
        return LutAttentionImpl if wanted() else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        """Return the class that prepares a step for the class above."""
        return LutMetadataBuilder if wanted() else CPUAttentionMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Return vLLM's description of a layer's cache with the bytes that our pages take."""
        if cls.scheme is None or spec.dtype != torch.uint8 or spec.state_content_bytes is not None:
            return spec
        layout = kv4.Layout(spec.block_size, spec.head_size, cls.scheme.by_unit)
        return replace(spec, state_content_bytes=layout.bytes_per_token)


@dataclass
class LutMetadata:
    """One step's requests, shared by the layers of a KV cache group."""

    #: int32 [requests, blocks]
    block_table: torch.Tensor
    #: int32 [requests + 1]
    query_start: torch.Tensor
    #: int32 [requests], keys of each request with those of this step
    lengths: torch.Tensor
    #: int64 [tokens], where this step's keys go
    slots: torch.Tensor


class LutMetadataBuilder(AttentionMetadataBuilder[LutMetadata]):
    """Takes over what vLLM's model runner has prepared; our kernel plans for itself."""

    #: launches depend on shapes alone, so a CUDA graph can hold any step
    _cudagraph_support = AttentionCGSupport.ALWAYS

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
            raise UserError(
                "softmax tables and 4-bit caches serve causal attention only; "
                "use --lut-sites without softmax, and --kv exact"
            )
        return LutMetadata(m.block_table_tensor, m.query_start_loc, m.seq_lens, m.slot_mapping)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> LutMetadata:
        """Return the metadata of a step that is captured, not computed: one key a request is enough."""
        metadata = self.build(0, common_attn_metadata)
        metadata.lengths.fill_(1)
        return metadata


class LutAttentionImpl(CPUAttentionBackendImpl):
    """Decoder attention of one layer through `lutserve::lut_attention`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        recipe = current_recipe()
        assert recipe is not None, "vLLM has changed the recipe between get_impl_cls and the implementation"
        self.recipe = recipe
        self.refuse(get_current_vllm_config())
        library.load()
        self.tables: tuple[torch.Tensor | None, torch.Tensor | None] | None = None
        self.counter: saturation.Counter | None = None

    def refuse(self, vllm_config: Any) -> None:
        """UserError where a layer needs what our kernel does not compute."""
        found = unsupported(self, vllm_config)
        if self.is_fp8_kv_cache:
            found.append(f"a {self.kv_cache_dtype} KV cache")
        if found:
            raise UserError(
                f"softmax tables cannot serve this model: {', '.join(found)}; "
                "use --lut-sites without softmax_exp and softmax_recip"
            )

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
            self.tables = load_tables(self.recipe, layer.layer_name, query.device)
            self.counter = saturation.COUNTERS.get((layer.layer_name, "softmax_exp"))
        if attn_metadata is None:
            return output
        self.attend(query, value, kv_cache, attn_metadata, output)
        return output

    def attend(
        self,
        query: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        step: LutMetadata,
        out: torch.Tensor,
    ) -> None:
        """Attend from query [tokens, heads, head size] to the cache, into out."""
        assert self.tables is not None
        if self.counter is not None:
            steps = step.block_table, step.query_start, step.lengths
            self.counter(query, cache, *steps, self.scale, self.sliding_window)
        attention.lut_attention(
            query,
            cache,
            step.block_table,
            step.query_start,
            step.lengths,
            out,
            self.scale,
            self.sliding_window,
            *self.tables,
            self.recipe.softmax_sum == "float16",
        )


def unsupported(impl: CPUAttentionBackendImpl, vllm_config: Any) -> list[str]:
    """What a layer needs that none of our kernels computes."""
    dtype = vllm_config.model_config.dtype
    reasons = {
        f"{impl.attn_type} attention": impl.attn_type != AttentionType.DECODER,
        "ALiBi": impl.alibi_slopes is not None,
        "capped scores": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        f"head size {impl.head_size} (multiples of 16 up to 256 are served)": not (
            impl.head_size % 16 == 0 and impl.head_size <= 256
        ),
        f"the model's dtype {dtype}": dtype not in (torch.float16, torch.bfloat16),
        "KV transfer, which knows vLLM's cache layout only": vllm_config.kv_transfer_config is not None,
    }
    return [reason for reason, true in reasons.items() if true]


class Kv4AttentionImpl(LutAttentionImpl):
    """Decoder attention of one layer through `lutserve::kv4_attention`, its cache in 4 bits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        model_type = getattr(config.model_config.hf_config, "model_type", "")
        self.scheme = kv_formats.get(self.recipe.kv_cache_scheme, model_type)
        self.tensors = Tensors.of(self.scheme, config.model_config.dtype)
        LutAttentionBackend.scheme = self.scheme
        block = config.cache_config.block_size
        layout = kv4.Layout(block, self.head_size, self.scheme.by_unit)
        logger.info_once(
            "lutserve: KV cache: %s, %.2f bits a value, all included, %d tokens a block, kernel %s",
            self.recipe.kv_cache_scheme,
            4 * layout.bytes_per_token / self.head_size,
            block,
            library.backend_for("kv4_attention"),
        )

    def refuse(self, vllm_config: Any) -> None:
        """UserError where a layer needs what our kernel does not compute."""
        found = unsupported(self, vllm_config)
        by_unit = self.recipe.kv_cache_scheme == kv_formats.AXCORE
        block, step = vllm_config.cache_config.block_size, kv4.UNIT if by_unit else attention.GROUP
        reasons = {
            f"a {self.kv_cache_dtype} cache (pass --kv-cache-dtype {kv_formats.CACHE_DTYPE})": (
                self.kv_cache_dtype != kv_formats.CACHE_DTYPE
            ),
            "a sliding window": self.sliding_window > 0,
            "layers that share a cache": self.kv_sharing_target_layer_name is not None,
            f"--block-size {block} (multiples of {step} are served)": block % step != 0,
            "counting the softmax's saturations": self.recipe.count_saturations
            and self.recipe.may_use("softmax_exp"),
            # A rejected token would have entered the scales of its unit.
            "speculative decoding": by_unit and vllm_config.speculative_config is not None,
        }
        found += [reason for reason, true in reasons.items() if true]
        if found:
            scheme = self.recipe.kv_cache_scheme
            raise UserError(f"--kv {scheme} cannot serve this model: {', '.join(found)}; use --kv exact")

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantise key and value [tokens, kv heads, head size] and store them in the cache."""
        divisors = (self.scheme.keys.divisor, self.scheme.values.divisor)
        kv4.write(key, value, kv_cache, slot_mapping, self.tensors.bounds, *divisors, self.scheme.by_unit)

    def attend(
        self,
        query: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        step: LutMetadata,
        out: torch.Tensor,
    ) -> None:
        """Attend from query [tokens, heads, head size] to the cache, into out."""
        assert self.tables is not None
        kv4_attention.kv4_attention(
            query,
            value if self.scheme.by_unit else None,
            cache,
            step.block_table,
            step.query_start,
            step.lengths,
            out,
            self.tensors.key_tables,
            self.tensors.offsets,
            self.tensors.value_table,
            self.scale,
            *self.tables,
            self.recipe.softmax_sum == "float16",
        )
        if self.scheme.by_unit:
            kv4.keep_tail(value, cache, step.slots)


def load_tables(
    recipe: Recipe, module: str, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
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
        found.append(luts.lut_table(function, spec, torch.float16).to(device))
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
