"""What a quantised weight is: indices, scales and the list of values they select."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lutserve.formats import Codebook

#: elements from which comparing with every midpoint pays
_MANY = 1 << 14


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N out, K in] as indices into a codebook.

    codes: uint8 [N, K], indices into the sorted values; asymmetric integers count from 0 to 2**bits - 1.
    scales: fp32 [N, ceil(K / group_size)]; the last group is short where group_size does not divide K.
    codebook: the format.
    group_size: columns that share a scale, at most K.
    zero_points: fp32 like scales, asymmetric integers only: the code that stands for zero.
    permutation: int64 [K], GPTQ in activation order without static groups only: groups are taken along
        columns permutation[0], permutation[1], ...; codes stay in the weight's own order.
    """

    codes: Tensor
    scales: Tensor
    codebook: Codebook
    group_size: int
    zero_points: Tensor | None = None
    permutation: Tensor | None = None

    @property
    def groups(self) -> Tensor:
        """The group of each column, int64 [K]."""
        place = torch.arange(self.codes.shape[1])
        if self.permutation is not None:
            place = torch.empty_like(place).index_copy_(0, self.permutation, place)
        return place // self.group_size

    def dequantize(self) -> Tensor:
        """Return value[code] * scale (asymmetric: (code - zero point) * scale), fp32 [N, K]."""
        n, k = self.codes.shape
        if self.permutation is None and k % self.group_size == 0:
            shape = (n, k // self.group_size, self.group_size)
            zero = None if self.zero_points is None else self.zero_points[..., None]
            grouped = decode(self.codes.view(shape), self.scales[..., None], zero, self.codebook)
            return grouped.view(n, k)
        groups = self.groups
        zero = None if self.zero_points is None else self.zero_points.index_select(1, groups)
        return decode(self.codes, self.scales.index_select(1, groups), zero, self.codebook)


def encode(x: Tensor, scale: Tensor, zero: Tensor | None, codebook: Codebook) -> Tensor:
    """Codes uint8, shape of x, of the values nearest to x / scale; all fp32, scale and zero broadcast.

    Codebooks: a value equal to a midpoint takes the lower index, values beyond the ends saturate.
    Integers round half to even. Where the scale is zero the code is that of zero.
    """
    t = x / torch.where(scale == 0, torch.ones_like(scale), scale)
    if not codebook.integer:
        return _count_below(t, codebook.midpoints)
    # Index zero is the lowest integer, so both kinds of integers are clamped to 0 .. 2**bits - 1.
    shift = -codebook.values[0] if zero is None else zero
    return (t.round_() + shift).clamp_(0, len(codebook.values) - 1).to(torch.uint8)


def _count_below(t: Tensor, midpoints: tuple[float, ...]) -> Tensor:
    """How many midpoints lie strictly below each element, uint8."""
    if t.numel() < _MANY:
        return torch.bucketize(t, t.new_tensor(midpoints), out_int32=True).to(torch.uint8)
    # Fifteen vector comparisons are several times as fast as a binary search per element.
    count = torch.zeros_like(t, dtype=torch.uint8)
    above = torch.empty_like(t, dtype=torch.bool)
    for midpoint in midpoints:
        torch.gt(t, midpoint, out=above)
        count += above.view(torch.uint8)
    return count


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, codebook: Codebook) -> Tensor:
    """The inverse of `encode`: fp32 values, shape of codes."""
    if zero is not None:
        return (codes - zero) * scale
    values = torch.tensor(codebook.values, dtype=torch.float32)
    return values.index_select(0, codes.reshape(-1).int()).view(codes.shape).mul_(scale)
