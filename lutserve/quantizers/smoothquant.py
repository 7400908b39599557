"""SmoothQuant (arXiv 2211.10438): move the range of activations into the weights, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lutserve.errors import UserError


def smooth_scale(x_absmax: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """Scale s of the input channels: the weight becomes W * s, the input x / s.

    Args:
        x_absmax: [K], largest |x| of each channel over the calibration tokens.
        weights: [N_i, K], all layers that read this input.
        alpha: 0 leaves the activations alone, 1 makes them all alike.

    Returns:
        fp32 [K], x_absmax^alpha / w_absmax^(1 - alpha), at least 1e-5; 1 where a channel's inputs or
        weights are all zero.

    Raises:
        UserError: alpha outside 0..1.

    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha={alpha}; allowed: 0 to 1")
    # Powers in float64, rounded once: those of float32 differ from machine to machine in their last bit.
    x = x_absmax.double()
    w = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).double()
    scale = ((x**alpha).float() / (w ** (1 - alpha)).float()).clamp(min=1e-5)
    return torch.where((x == 0) | (w == 0), torch.ones_like(scale), scale)
