"""Dynamic activation quantisation: each token and group of channels gets its own scale (W4A4)."""

from __future__ import annotations

from torch import Tensor

from lutserve.formats import Codebook
from lutserve.quantizers import grid
from lutserve.quantizers.weight import decode, encode


def quantize_activations(
    x: Tensor,
    fmt: str | Codebook,
    group_size: int = 128,
    scheme: grid.Scheme = "sym",
    quantile: float = 1.0,
    input_scale: Tensor | None = None,
) -> Tensor:
    """Round x to the format and back, token by token (arXiv 2405.03103: no calibration, no static scale).

    Args:
        x: [..., K], any floating dtype; computed in fp32.
        fmt: a format or its name.
        group_size: channels that share a scale; -1 for all K.
        scheme: sym, or asym for integers.
        quantile: clip ratio.
        input_scale: [K], multiplied into x first (SmoothQuant: one over the smoothing scale).

    Returns:
        fp32, shape of x. In a group with NaN or infinity nothing is finite.

    Raises:
        UserError: unknown format or a scheme that it does not have.

    """
    codebook = grid.check(fmt, scheme)
    flat = x.reshape(-1, x.shape[-1]).float()
    if input_scale is not None:
        flat = flat * input_scale
    groups = grid.grouped(flat, grid.effective_group(group_size, x.shape[-1]))
    scale, zero = grid.scales(groups, codebook, scheme, quantile=quantile)
    scale, zero = scale[..., None], None if zero is None else zero[..., None]
    rounded = decode(encode(groups, scale, zero, codebook), scale, zero, codebook)
    return rounded.view(len(flat), -1)[:, : x.shape[-1]].reshape(x.shape)
