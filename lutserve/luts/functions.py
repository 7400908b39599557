"""The functions that have tables: for each the exact function and the NLI cut points, as data.

A new function is one literal in `FUNCTIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lutserve.luts.samples import PUBLISHED

# Below this silu and the GELUs are -0 in float64 already; the bound keeps -inf * 0 = NaN out.
_FLOOR = -1000.0


def _sigmoid(x: float) -> float:
    """1 / (1 + e**-x) without overflow and without cancellation."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def silu(x: float) -> float:
    """SiLU, x * sigmoid(x), in float64; its limit -0 at -inf."""
    x = max(x, _FLOOR)
    return x * _sigmoid(x)


def gelu(x: float) -> float:
    """GELU by the Gauss error function in float64; its limit -0 at -inf."""
    x = max(x, _FLOOR)
    return 0.5 * x * math.erfc(-x * math.sqrt(0.5))


def gelu_tanh(x: float) -> float:
    """GELU by the tanh formula in float64; its limit -0 at -inf."""
    x = max(x, _FLOOR)
    return x * _sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))


def exp(x: float) -> float:
    """Exponential in float64; inf where that overflows."""
    return math.exp(x) if x < 709.0 else math.inf


@dataclass(frozen=True)
class Function:
    """A unary function with a table.

    exact: the function in float64, defined for every float but NaN.
    cuts: the eleven NLI cut points c_0 < ... < c_10; decimals, meant as the nearest fp16 value.
    clamp: whether the input is clamped to [c_0, c_10] in its own dtype first (activations are).
    samples: fp32 values on the grid of 32 points a segment, for a table whose published values are not
        `exact` rounded once to fp32; text, in grid order.
    """

    exact: Callable[[float], float]
    cuts: tuple[float, ...]
    clamp: bool = True
    samples: str | None = None


_SILU_CUTS = (
    *(-20.359375, -17.109375, -8.3671875, -1.9755859375, -0.255615234375, -0.007244110107421875),
    *(0.0072174072265625, 0.228515625, 1.58203125, 10.46875, 65504.0),
)
_GELU_CUTS = (
    *(-65504.0, -6.02734375, -3.9453125, -3.0, -1.25390625, -0.1435546875, -0.0223693847656),
    *(0.08544921875, 0.67333984375, 3.01171875, 65504.0),
)
_SOFTMAX_EXP_CUTS = (
    *(-65504.0, -18.453125, -11.015625, -7.7109375, -5.6875, -4.3046875, -2.435546875, -1.2529296875),
    *(-0.49072265625, -0.10150146484375, 0.0),
)

# Cut points: NLI, arXiv 2602.02988, the lists used in its models. The tanh GELU takes the cut points of the
# GELU: the published method samples whatever GELU the model itself has.
FUNCTIONS: dict[str, Function] = {
    "silu": Function(silu, _SILU_CUTS, samples=PUBLISHED["silu"]),
    "gelu": Function(gelu, _GELU_CUTS, samples=PUBLISHED["gelu"]),
    "gelu_tanh": Function(gelu_tanh, _GELU_CUTS, samples=PUBLISHED["gelu_tanh"]),
    "softmax_exp": Function(exp, _SOFTMAX_EXP_CUTS, clamp=False),
}
