"""How many bits a linear layer's weights and products take under a method."""

from __future__ import annotations

from dataclasses import dataclass

from lutserve.recipe import Group

#: bits of a scale in the published accounting; our kernels hold fp32 ones, 16 / group size more a weight
SCALE_BITS = 16
#: bits of the position that an outlier column of the input carries
_INDEX_BITS = 32


@dataclass(frozen=True)
class Precision:
    """weight, activation: bits. group: columns that share a scale, -1 for all; scale: bits stored for each.

    outliers: share of input columns that stay in 16 bit, beside the activations' columns.
    """

    weight: int
    activation: int
    scale: int = 0
    group: int = -1
    outliers: float = 0.0

    def bits(self, out: int, columns: int) -> int:
        """Stored bits of a weight [out, columns]: codes, scales, outlier columns and their positions."""
        kept = self._kept(columns)
        scales = out * (1 if self.group == -1 else -(-columns // self.group)) * self.scale
        return out * ((columns - kept) * self.weight + kept * 16) + scales + kept * _INDEX_BITS

    def bops(self, out: int, columns: int) -> int:
        """Bit operations a token: MACs times the bits of both factors."""
        kept = self._kept(columns)
        return out * ((columns - kept) * self.weight * self.activation + kept * 256)

    def _kept(self, columns: int) -> int:
        return round(self.outliers * columns)


#: how many columns MixQ keeps is found while serving; this is the published figure
_KEPT = 0.01
#: an AxCore block's type, as the published accounting spreads it over the block's scales
_TYPE_BITS = 2

_NAMED = {
    "none": Precision(16, 16),
    "int8": Precision(8, 8, SCALE_BITS),
    "llm-int8": Precision(8, 8, SCALE_BITS, outliers=_KEPT),
    "mix8": Precision(8, 8, SCALE_BITS, outliers=_KEPT),
    "tender8": Precision(8, 8, SCALE_BITS),
    "tender4": Precision(4, 4, SCALE_BITS),
    "fpma": Precision(16, 16),
    "lmul": Precision(16, 16),
}


def of(group: Group) -> Precision:
    """The precision of a recipe's choice."""
    method = group.arithmetic
    if method.name in _NAMED:
        return _NAMED[method.name]
    # Formats of fewer bits are stored in four.
    scale = SCALE_BITS + (_TYPE_BITS if method.family == "axcore" else 0)
    return Precision(4, method.activations, scale, group.group_size, _KEPT if method.outliers else 0.0)
