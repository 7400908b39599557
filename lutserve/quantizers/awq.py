"""AWQ (arXiv 2306.00978) for any codebook: scale up the channels that matter, then clip what does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lutserve.errors import UserError
from lutserve.formats import Codebook
from lutserve.quantizers import grid
from lutserve.quantizers.rtn import rtn

#: exponents r that the scale search tries: 0, 0.05, ..., 0.95
EXPONENTS = tuple(i / 20 for i in range(20))
#: ratios that the clip search tries: 1.00, 0.99, ..., 0.91
CLIP_RATIOS = tuple(1 - i / 100 for i in range(10))


@dataclass(frozen=True)
class Scale:
    """The outcome of `search_scale`: scale fp32 [K], its exponent r, and the loss there."""

    scale: Tensor
    exponent: float
    loss: float


def weight_mean(weights: Sequence[Tensor], group_size: int = 128) -> Tensor:
    """Mean over the rows of all weights [N_i, K] of |w| over its group's largest |w|: fp32 [K]."""
    stacked = torch.cat([w.float() for w in weights]).abs()
    k = stacked.shape[1]
    groups = grid.grouped(stacked, grid.effective_group(group_size, k))
    largest = groups.amax(-1, keepdim=True)
    relative = groups / torch.where(largest == 0, torch.ones_like(largest), largest)
    return relative.reshape(len(stacked), -1)[:, :k].mean(0)


def channel_scale(x_mean: Tensor, w_mean: Tensor, exponent: float) -> Tensor:
    """The scale x_mean^r / w_mean^(1 - r), at least 1e-4, centred so that max * min = 1; fp32 [K]."""
    scale = (x_mean.float() ** exponent / w_mean.float() ** (1 - exponent)).clamp(min=1e-4)
    # A channel whose weights are all zero would be scaled by infinity, to no effect.
    scale = torch.where(scale.isfinite(), scale, torch.ones_like(scale))
    return scale / (scale.max() * scale.min()).sqrt()


def search_scale(
    weights: Sequence[Tensor],
    x_mean: Tensor,
    loss: Callable[[list[Tensor]], float],
    fmt: str | Codebook,
    group_size: int = 128,
    scheme: grid.Scheme = "sym",
    tie: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> Scale:
    """Find the scale of the input channels that some linear layers share.

    Args:
        weights: [N_i, K] of the layers that read the same input.
        x_mean: [K], mean |x| over the calibration tokens.
        loss: error made when the layers have the given weights (rounded, scaled back).
        fmt: a format or its name.
        group_size: columns that share a scale.
        scheme: sym, or asym for integers.
        tie: brings a scale into a form that can be folded.

    Returns:
        The scale s with the least loss, the first one among equals: quantise W * s, divide x by s.

    """
    w_mean = weight_mean(weights, group_size)
    best: Scale | None = None
    for exponent in EXPONENTS:
        scale = tie(channel_scale(x_mean, w_mean, exponent))
        rounded = [rtn(w * scale, fmt, group_size, scheme).dequantize().div_(scale) for w in weights]
        found = loss(rounded)
        if best is None or found < best.loss:
            best = Scale(scale, exponent, found)
    assert best is not None
    return best


def search_clip(
    weight: Tensor,
    loss: Callable[[Tensor], float],
    fmt: str | Codebook,
    group_size: int = 128,
    scheme: grid.Scheme = "sym",
) -> float:
    """Return the clip ratio of a weight [N, K] with the least loss, the first one among equals.

    Args:
        weight: the (scaled) weight.
        loss: error of the layer's output with the given, rounded weight.
        fmt: a format or its name.
        group_size: columns that share a scale.
        scheme: sym, or asym for integers.

    """
    losses = [
        loss(rtn(weight, fmt, group_size, scheme, quantile=ratio).dequantize()) for ratio in CLIP_RATIOS
    ]
    return CLIP_RATIOS[losses.index(min(losses))]


def output_error(hessian: Tensor, difference: Tensor) -> float:
    """Squared error of x W^T over all calibration tokens for a difference of weights [N, K].

    The sum over x of |(W - W') x|^2, which is tr(D H D^T) with H = sum x x^T.
    """
    if hessian.shape[0] != difference.shape[1]:
        raise UserError(f"a weight {tuple(difference.shape)} does not fit a hessian {tuple(hessian.shape)}")
    return float((difference @ hessian).mul_(difference).sum(dtype=torch.float64))
