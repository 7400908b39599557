"""Which inputs every nonlinear site of a model sees: what a table must cover.

The model runs as transformers loads it, with exact arithmetic; its activations, norms and attentions tell
their inputs. The published table of such ranges holds the minimum and maximum of the SiLU input; this
one adds quantiles and the other sites: softmax_exp (score minus the row's maximum, masked ones left out),
softmax_recip (the softmax's sum, before the reciprocal) and rsqrt (mean square or variance, plus eps).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lutserve.profile.histogram import Histogram
from lutserve.profile.source import load

SCHEMA = "lutserve-ranges-1"
#: class of an activation in torch or transformers -> site
ACTIVATIONS = {
    **dict.fromkeys(("SiLU", "SiLUActivation", "Swish"), "silu"),
    **dict.fromkeys(("GELU", "GELUActivation", "GELUTanh", "PytorchGELUTanh", "NewGELUActivation"), "gelu"),
    **dict.fromkeys(("FastGELUActivation", "QuickGELUActivation"), "gelu"),
}
_ATTENTION = "lutserve_ranges"

Collected = dict[tuple[str, str], Histogram]


def profile(
    model: str,
    text: str,
    *,
    window: int = 2048,
    windows: int | None = 4,
    dtype: str = "bfloat16",
    done: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Return the ranges of every site and module of a model on a text.

    Args:
        model: Hugging Face folder or id.
        text: tokenized as a whole and cut into windows without overlap; an incomplete last one is dropped.
        window: tokens in a window.
        windows: how many, from the start; None for all.
        dtype: bfloat16, float16 or float32.
        done: called with (windows done, windows in all).

    Returns:
        {"schema", "model", "dtype", "window", "windows", "sites": [...], "summary": {site: ...}}; every
        entry of `sites` has site, module, count, odd (infinities and NaNs), min, max (exact) and quantiles
        (rounded to bfloat16); a summary has the same over all modules.

    Raises:
        UserError: the model cannot be loaded, or the text has not one window.

    """
    import transformers

    transformers.AttentionInterface.register(_ATTENTION, _attention)
    transformers.AttentionMaskInterface.register(_ATTENTION, transformers.masking_utils.eager_mask)
    network, parts = load(model, text, window, windows, dtype, attn_implementation=_ATTENTION)
    seen = watch(network)
    with torch.inference_mode():
        for number, part in enumerate(parts):
            network.base_model(part[None], use_cache=False)
            done(number + 1, len(parts))
    return {
        "schema": SCHEMA,
        "model": model,
        "dtype": dtype,
        "window": window,
        "windows": len(parts),
        "sites": [{"site": site, "module": name} | h.to_dict() for (site, name), h in seen.items()],
        "summary": {site: h.to_dict() for site, h in _by_site(seen).items()},
    }


def watch(network: torch.nn.Module) -> Collected:
    """Let every site of a transformers model write into the returned histograms from now on."""
    seen: Collected = {}
    for name, module in network.named_modules():
        kind = type(module).__name__
        if kind in ACTIVATIONS:
            histogram = seen.setdefault((ACTIVATIONS[kind], name), Histogram())
            module.register_forward_pre_hook(partial(_see_input, histogram))
        elif kind.endswith("RMSNorm") or kind == "LayerNorm":
            histogram = seen.setdefault(("rsqrt", name), Histogram())
            module.register_forward_pre_hook(partial(_see_norm, histogram, kind == "LayerNorm"))
        elif hasattr(module, "is_causal"):
            pair = [seen.setdefault((site, name), Histogram()) for site in ("softmax_exp", "softmax_recip")]
            module.lutserve_ranges = pair
    return seen


def _see_input(histogram: Histogram, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    histogram.add(inputs[0])


def _see_norm(histogram: Histogram, centred: bool, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    x = inputs[0].float()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    eps = next(getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name))
    histogram.add(x.square().mean(-1) + eps)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of [1, heads, tokens, head size], head by head: all scores at once could fill the memory."""
    exps, sums = module.lutserve_ranges
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.empty(1, query.shape[2], query.shape[1], value.shape[-1], dtype=query.dtype)
    for head in range(query.shape[1]):
        scores = (query[0, head] @ key[0, head // groups].T).float() * scale
        if attention_mask is not None:
            scores = scores + attention_mask[0, 0]
        reached = scores > torch.finfo(query.dtype).min / 2
        scores = scores - scores.amax(-1, keepdim=True)
        exps.add(scores[reached])
        weights = scores.exp()
        total = weights.sum(-1, keepdim=True)
        sums.add(total)
        out[0, :, head] = (weights / total).to(query.dtype) @ value[0, head // groups]
    return out, None


def _by_site(seen: Collected) -> dict[str, Histogram]:
    sites: dict[str, Histogram] = {}
    for (site, _), histogram in seen.items():
        sites.setdefault(site, Histogram()).merge(histogram)
    return sites
