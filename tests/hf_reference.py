"""transformers models whose nonlinear sites read our tables, written independently of the served layers.

Only the tables themselves are shared with the product: gathers, norms and the softmax are plain torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import repeat_kv

from lutserve import luts

#: class of an activation in transformers (or torch) -> site, function
ACTIVATIONS = {
    "SiLU": ("silu", "silu"),
    "SiLUActivation": ("silu", "silu"),
    "GELUActivation": ("gelu", "gelu"),
    "GELUTanh": ("gelu", "gelu_tanh"),
    "PytorchGELUTanh": ("gelu", "gelu_tanh"),
    "NewGELUActivation": ("gelu", "gelu_tanh"),
}

#: site, module name -> table spec or "exact"
Choose = Callable[[str, str], str]


def use_tables(model: torch.nn.Module, choose: Choose) -> None:
    """Replace the arithmetic of every site of `model` in place, as `choose` says."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ACTIVATIONS:
            site, function = ACTIVATIONS[kind]
            if (spec := choose(site, name)) != "exact":
                module.forward = partial(gather, function, spec)
        elif kind.endswith("RMSNorm") or kind == "LayerNorm":
            if (spec := choose("rsqrt", name)) != "exact":
                module.forward = partial(norm, module, spec, "Gemma" in kind, kind == "LayerNorm")
        elif hasattr(module, "scaling") and "attn" in name.rpartition(".")[2]:
            module.softmax_spec = choose("softmax_exp", name)


def gather(function: str, spec: str, x: torch.Tensor) -> torch.Tensor:
    """The table at every element; fp32 is rounded to fp16 first, as the published method does."""
    dtype = torch.float16 if x.dtype == torch.float32 else x.dtype
    index = x.to(dtype).contiguous().view(torch.int16).long() % 65536
    return luts.lut_table(function, spec, dtype)[index].to(x.dtype)


def norm(module: Any, spec: str, gemma: bool, centred: bool, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm or LayerNorm with 1 / sqrt(v) = table(m) / 2**e, v = m * 4**e."""
    wide = x.float()
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    eps = next(getattr(module, key) for key in ("variance_epsilon", "eps") if hasattr(module, key))
    v = wide.square().mean(-1, keepdim=True) + eps
    m, e = torch.frexp(v)  # m in [0.5, 1)
    odd = (e - 1) % 2
    m, e = m * 2 * (1 + odd), (e - 1 - odd) // 2
    wide = wide * torch.ldexp(gather("rsqrt", spec, m), -e)
    if gemma:
        return (wide * (1 + module.weight.float())).to(x.dtype)
    if centred:
        return (wide * module.weight.float() + module.bias.float()).to(x.dtype)
    return wide.to(x.dtype) * module.weight


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Eager attention, every step rounded to the model's dtype, with the table's exponential if chosen."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if mask is not None:
        scores = scores + mask
    spec = getattr(module, "softmax_spec", "exact")
    if spec == "exact":
        chances = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    else:
        difference = (scores - scores.amax(-1, keepdim=True)).half()
        exps = luts.lut_table("softmax_exp", spec, torch.float16)[
            difference.view(torch.int16).long() % 65536
        ].float()
        chances = (exps / exps.sum(-1, keepdim=True).half().float()).to(query.dtype)
    return (chances @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("tables", attention)
AttentionMaskInterface.register("tables", eager_mask)
