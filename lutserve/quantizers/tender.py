"""Tender's integers (ISCA'24, arXiv 2406.12930) by emulation: the baseline that AxCore was measured against.

Weights are symmetric integers with a scale for each output row. Activations are taken in chunks of tokens.
In a chunk every channel loses its midrange, and the channels form groups by their largest magnitude, whose
scales are powers of two apart, so that hardware moves from one group's sum to the next by a shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: tokens whose channels share midranges and scales
CHUNK = 256


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round a weight [N, K], any floating dtype, to nearest; ties to even.

    Returns:
        Integers up to 2**(bits - 1) - 1 in magnitude, fp32 [N, K], and scales fp32 [N, 1] (0 for zeros).

    """
    wide, most = weight.float(), 2 ** (bits - 1) - 1
    scale = wide.abs().amax(1, keepdim=True) / most
    return torch.where(scale == 0, 0.0, wide / scale).round_(), scale


def round_activations(x: Tensor, bits: int, groups: int) -> Tensor:
    """Return activations [tokens, K], any floating dtype, as they are after quantisation; fp32.

    Of a chunk's channels, without their midranges, let t be the largest magnitude. Group i of `groups` has
    the threshold t / 2**(groups - 1 - i) and the scale threshold / (2**(bits - 1) - 1). A channel is in the
    first group whose threshold is not below its own largest magnitude. Infinity or NaN spoils its chunk.
    """
    return torch.cat([_round_chunk(chunk, bits, groups) for chunk in x.float().split(CHUNK)]) if len(x) else x


def _round_chunk(x: Tensor, bits: int, groups: int) -> Tensor:
    middle = (x.amax(0) + x.amin(0)) / 2
    centred = x - middle
    largest = centred.abs().amax(0)
    thresholds = largest.amax() * 0.5 ** torch.arange(groups - 1, -1, -1)
    place = torch.bucketize(largest, thresholds).clamp_max(groups - 1)
    scale = thresholds[place] / (2 ** (bits - 1) - 1)
    rounded: Tensor = torch.where(scale == 0, 0.0, centred / scale).round_() * scale + middle
    return rounded
