"""vLLM's attention on CUDA devices with tables in its softmax or 4 bits in its cache: the backend LUTSERVE.

CUDA's platform takes the backend that it is told (`--attention-backend LUTSERVE`, which `lutserve serve`
adds where the recipe needs it), so ours has a name of its own and vLLM's stay as they are. What computes is
the CPUs' (`layers.attention`), because the operators are the same.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from lutserve.compat import (
    Attention,
    AttentionBackend,
    AttentionBackendEnum,
    AttentionMetadataBuilder,
    KVCacheLayout,
    MultipleOf,
    current_platform,
    register_backend,
)
from lutserve.errors import UserError
from lutserve.kernels import attention, kv4
from lutserve.kv_formats import ATTENTION_BACKEND, CACHE_DTYPE
from lutserve.layers import names
from lutserve.layers.attention import LutAttentionBackend, LutAttentionImpl, LutMetadataBuilder, wanted


class LutCudaAttentionBackend(AttentionBackend):
    """Decoder attention of every layer by our kernels, as the recipe has it."""

    forward_includes_kv_cache_update = False
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", CACHE_DTYPE]

    @staticmethod
    def get_name() -> str:
        """Return the name for `--attention-backend`."""
        return ATTENTION_BACKEND

    @staticmethod
    def get_impl_cls() -> type[LutAttentionImpl]:
        """Return the class that computes; UserError where no recipe asks for one."""
        if not wanted():
            raise UserError(
                f"--attention-backend {ATTENTION_BACKEND} serves tables in the softmax and 4-bit caches, and "
                "the recipe has neither; leave the flag away"
            )
        found: type[LutAttentionImpl] = LutAttentionBackend.get_impl_cls()
        return found

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        """Return the class that prepares a step."""
        return LutMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[MultipleOf]:
        """Whole groups of keys, and whole units where values are coded by unit."""
        scheme = LutAttentionBackend.scheme
        return [MultipleOf(kv4.UNIT if scheme and scheme.by_unit else attention.GROUP)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Blocks by head, as `kernels.attention` has them."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Multiples of 16 up to 256."""
        return head_size % 16 == 0 and head_size <= 256

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """With 16-bit caches; `Kv4AttentionImpl` refuses the others."""
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Ampere and newer: bf16 and TF32 products."""
        return bool(capability.major >= 8)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Return vLLM's description of a layer's cache with the bytes that our pages take."""
        return LutAttentionBackend.customize_spec(spec)


def _check(module: nn.Module) -> None:
    """UserError for an attention layer that vLLM gave to a backend without tables; a hook of `names`."""
    if (
        isinstance(module, Attention)
        and wanted()
        and not issubclass(module.attn_backend, LutCudaAttentionBackend)
    ):
        raise UserError(
            f"the recipe has tables in the softmax or a 4-bit cache, which the attention backend "
            f"{module.attn_backend.get_name()} does not compute; add --attention-backend {ATTENTION_BACKEND}"
        )


def member() -> AttentionBackendEnum:
    """Return vLLM's name of our backend, registering it where it is not yet."""
    if ATTENTION_BACKEND not in AttentionBackendEnum.__members__:
        path = f"{__name__}.{LutCudaAttentionBackend.__qualname__}"
        register_backend(ATTENTION_BACKEND, path)
        # vLLM sends its configuration to processes that have not loaded their plugins when they read it.
        AttentionBackendEnum[ATTENTION_BACKEND].__reduce_ex__ = lambda protocol: (member, ())
    return AttentionBackendEnum[ATTENTION_BACKEND]


def register() -> None:
    """Add our backend to vLLM's where it computes on CUDA; idempotent."""
    if current_platform.is_cuda():
        member()
        names.replace_with(_check)
