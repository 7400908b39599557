"""Minimum, maximum and quantiles of a stream of numbers, in one pass and constant memory."""

from __future__ import annotations

import math

import torch

QUANTILES = (0.001, 0.01, 0.5, 0.99, 0.999)

# Finite patterns by value: negative ones backwards, then positive ones.
_ORDER = torch.cat([torch.arange(0xFF7F, 0x7FFF, -1), torch.arange(0x7F80)])
_VALUES = _ORDER.to(torch.int16).view(torch.bfloat16).float()


class Histogram:
    """Counts by bfloat16 pattern: 65,536 bins over the whole range of fp32, each 0.4 % wide.

    Attributes:
        count: finite numbers seen.
        odd: infinities and NaNs seen, which are in nothing else.
        low: their minimum, exact. high: their maximum, exact.

    """

    def __init__(self) -> None:
        self.count = self.odd = 0
        self.low, self.high = math.inf, -math.inf
        self.bins = torch.zeros(65536, dtype=torch.int64)

    def add(self, x: torch.Tensor) -> None:
        """Take in x, any shape and float dtype."""
        if not x.numel():
            return
        low, high = (bound.item() for bound in x.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = x.isfinite()
            self.odd += int((~finite).sum())
            self.add(x[finite])
            return
        self.count += x.numel()
        self.low, self.high = min(self.low, low), max(self.high, high)
        # Without this clamp the largest fp32 numbers would round to infinity.
        limit = torch.finfo(torch.bfloat16).max
        patterns = x.float().clamp(-limit, limit).bfloat16().contiguous().view(torch.int16)
        self.bins += torch.bincount(patterns.flatten().int() & 0xFFFF, minlength=65536)

    def merge(self, other: Histogram) -> None:
        """Take in everything that `other` has seen."""
        self.count, self.odd = self.count + other.count, self.odd + other.odd
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.bins += other.bins

    def quantile(self, share: float) -> float:
        """Return the smallest number with at least `share` of all at or below it, rounded to bfloat16."""
        index = int(torch.searchsorted(self.bins[_ORDER].cumsum(0), math.ceil(share * self.count)))
        return min(max(_VALUES[index].item(), self.low), self.high)

    def to_dict(self) -> dict[str, object]:
        """Return count, odd, min, max and quantiles by name ("0.001"), for a report."""
        if not self.count:
            return {"count": 0, "odd": self.odd, "min": None, "max": None, "quantiles": {}}
        quantiles = {str(share): self.quantile(share) for share in QUANTILES}
        return {
            "count": self.count,
            "odd": self.odd,
            "min": self.low,
            "max": self.high,
            "quantiles": quantiles,
        }
