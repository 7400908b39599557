"""`kv_numerics: reference`: the published evaluation of AxCore's cache, for perplexities and nothing else.

The cache holds decoded fp16 numbers and saves no memory. Each step is one of the paper's forward passes, so a
prompt must come in one step (`--max-num-batched-tokens` of its length, no prefix caching) to be theirs.
"""

from __future__ import annotations

from typing import Any

import torch

from lutserve import kv_formats
from lutserve.compat import get_current_vllm_config
from lutserve.errors import UserError
from lutserve.kernels import attention, kv_reference
from lutserve.layers.attention import LutAttentionImpl, LutMetadata, unsupported
from lutserve.layers.kv_cache import Tensors


class ReferenceAttentionImpl(LutAttentionImpl):
    """Decoder attention of one layer as published."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model_type = getattr(get_current_vllm_config().model_config.hf_config, "model_type", "")
        self.before = model_type == "opt"
        self.scheme = kv_formats.get(self.recipe.kv_cache_scheme, model_type)
        self.bounds = Tensors.of(self.scheme, torch.float16).bounds

    def refuse(self, vllm_config: Any) -> None:
        """UserError where a layer needs what is not published."""
        found = unsupported(self, vllm_config)
        if vllm_config.model_config.dtype != torch.float16:
            found.append(f"{vllm_config.model_config.dtype} (pass --dtype float16)")
        if self.sliding_window > 0:
            found.append("a sliding window")
        if self.kv_sharing_target_layer_name is not None:
            found.append("layers that share a cache")
        if found:
            raise UserError(f"kv_numerics reference cannot serve this model: {', '.join(found)}")

    def do_kv_cache_update(self, *args: Any) -> None:
        """Nothing yet: what is stored depends on the step's requests, which `forward` knows."""

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
        """Quantise this step's keys and values, store them decoded, and attend to all; fills output."""
        step = attn_metadata
        if step is None:
            return output
        starts = step.query_start.tolist()
        for request, end in enumerate(step.lengths.tolist()):
            rows = slice(starts[request], starts[request + 1])
            if rows.start == rows.stop:
                continue
            decoded = self.decoded(key[rows], value[rows])
            attention.cache_write(*decoded, kv_cache, step.slots[rows])
            blocks = step.block_table[request, : -(-end // kv_cache.shape[2])].long()
            flat = kv_cache[blocks].flatten(2).transpose(0, 1)
            at = attention.places(kv_cache.dtype, kv_cache.shape[2], kv_cache.shape[3] // 2)
            keys, values = (flat[:, :, place].flatten(1, 2)[:, :end].transpose(0, 1) for place in at)
            output[rows] = kv_reference.attend(query[rows], keys, values, self.scale, self.before)
        return output

    def decoded(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [tokens, kv heads, head size] of one step as they are after quantisation."""
        keys, values = self.scheme.keys, self.scheme.values
        first = kv_reference.fake_quantise(key, self.bounds[0], keys.divisor, torch.tensor(keys.values))
        tokens_last = value.permute(1, 2, 0)
        second = kv_reference.fake_quantise(
            tokens_last, self.bounds[1], values.divisor, torch.tensor(values.values)
        )
        return first, second.permute(2, 0, 1).contiguous()
