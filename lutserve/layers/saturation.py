"""Count the inputs that lie outside their table's range (`luts.input_range`), where a recipe asks for it."""

from __future__ import annotations

import torch
from torch import nn

from lutserve import luts
from lutserve.compat import in_dummy_run
from lutserve.kernels.attention import scored
from lutserve.kernels.library import define


def _check(x: torch.Tensor, counter: torch.Tensor, low: float, high: float) -> None:
    torch._check(
        counter.dtype == torch.int64 and counter.shape == (1,),
        lambda: "lut_count_outside: counter must be int64 [1]",
    )


def _count(x: torch.Tensor, counter: torch.Tensor, low: float, high: float) -> None:
    _check(x, counter, low, high)
    if not in_dummy_run():
        counter += torch.count_nonzero((x < low) | (x > high))


count_outside = define(
    "lut_count_outside(Tensor x, Tensor(a!) counter, float low, float high) -> ()", _count, _check
)
"""counter += number of elements of x below `low` or above `high`; NaN is neither. Not in warm-up runs.

x: any shape and float dtype. counter: int64 [1]. RuntimeError if it is not.
"""


class Counter(nn.Module):
    """Saturations of one site: inputs outside [low, high]."""

    total: torch.Tensor

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.register_buffer("total", torch.zeros(1, dtype=torch.int64), persistent=False)


class InputCounter(Counter):
    """Saturations of a site that sees its input as a tensor."""

    def forward(self, x: torch.Tensor) -> None:
        """Count in x."""
        count_outside(x, self.total, self.low, self.high)


class ScoreCounter(Counter):
    """Saturations of a softmax's exponential: seen scores minus their row's maximum, outside [low, high]."""

    def forward(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor,
        query_start: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
        window: int,
    ) -> None:
        """Count in the scores of `kernels.attention.lut_attention`'s arguments, computed once more."""
        group = query.shape[1] // cache.shape[1]
        # Head by head: all scores at once could fill the memory.
        for head in range(cache.shape[1]):
            part = query[:, head * group : (head + 1) * group], cache[:, head : head + 1]
            for _, scores, seen, _ in scored(*part, block_table, query_start, lengths, scale, window):
                scores = scores.masked_fill(~seen, -torch.inf)
                below = scores - scores.amax(-1, keepdim=True)
                self.total += torch.count_nonzero(((below < self.low) | (below > self.high)) & seen)


#: module and site -> its counter
COUNTERS: dict[tuple[str, str], Counter] = {}


def counter(module: str, site: str, function: str, spec: str) -> Counter | None:
    """Return a new counter for a site, or None where no input can be outside or its range is unknown."""
    # The range reduction of these two leaves no input outside.
    bounds = None if site in ("rsqrt", "softmax_recip") else luts.input_range(function, spec)
    if bounds is None:
        return None
    COUNTERS[module, site] = (ScoreCounter if site == "softmax_exp" else InputCounter)(*bounds)
    return COUNTERS[module, site]


def totals() -> dict[str, int]:
    """Return site -> saturations counted so far in this process."""
    sums: dict[str, int] = {}
    for (_, site), one in COUNTERS.items():
        sums[site] = sums.get(site, 0) + int(one.total)
    return sums
