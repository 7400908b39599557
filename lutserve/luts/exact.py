"""The functions themselves, in float64: float -> float, defined for every float but NaN.

Where a function has no value (the logarithm of -1) the result is NaN; at its limits it is the limit.
"""

from __future__ import annotations

import math

# Below this silu and its kin are -0 in float64 already; the bound keeps -inf * 0 = NaN out.
_FLOOR = -1000.0
# The published inverse sigmoid bounds x and 1 - x from below by this, so that it is finite everywhere.
_LOGIT_FLOOR = 1e-5


def sigmoid(x: float) -> float:
    """1 / (1 + e**-x), without overflow and without cancellation."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def silu(x: float) -> float:
    """SiLU, x * sigmoid(x); its limit -0 at -inf."""
    x = max(x, _FLOOR)
    return x * sigmoid(x)


def swish(x: float) -> float:
    """Approximate GELU by a sigmoid: x * sigmoid(1.702 x)."""
    x = max(x, _FLOOR)
    return x * sigmoid(1.702 * x)


def gelu(x: float) -> float:
    """GELU by the Gauss error function; its limit -0 at -inf."""
    x = max(x, _FLOOR)
    return 0.5 * x * math.erfc(-x * math.sqrt(0.5))


def gelu_tanh(x: float) -> float:
    """GELU by the tanh formula; its limit -0 at -inf."""
    x = max(x, _FLOOR)
    return x * sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))


def mish(x: float) -> float:
    """Mish, x * tanh(softplus(x)), written with one exponential."""
    if x > 30.0:  # tanh(softplus(x)) is 1 in float64
        return x
    x = max(x, _FLOOR)
    e = math.exp(x)
    return x * (e * (e + 2.0)) / (e * (e + 2.0) + 2.0)


def exp(x: float) -> float:
    """Exponential; inf where that overflows."""
    return math.exp(x) if x < 709.0 else math.inf


def log(x: float) -> float:
    """Natural logarithm; -inf at zero, NaN below."""
    if x > 0:
        return math.log(x)
    return -math.inf if x == 0 else math.nan


def reciprocal(x: float) -> float:
    """1 / x; infinity with the sign of x at zero."""
    return 1.0 / x if x else math.copysign(math.inf, x)


def rsqrt(x: float) -> float:
    """1 / sqrt(x); infinity with the sign of x at zero, NaN below."""
    if x > 0:
        return 1.0 / math.sqrt(x)
    return math.copysign(math.inf, x) if x == 0 else math.nan


def square(x: float) -> float:
    """Square x."""
    return x * x


def inverse_sigmoid(x: float) -> float:
    """log(x / (1 - x)) for x in [0, 1], both parts at least 1e-5; the value at the nearer end outside."""
    x = min(max(x, 0.0), 1.0)
    return math.log(max(x, _LOGIT_FLOOR) / max(1.0 - x, _LOGIT_FLOOR))


def softplus(x: float) -> float:
    """log(1 + e**x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def tanh(x: float) -> float:
    """Hyperbolic tangent."""
    return math.tanh(x)


def elu(x: float) -> float:
    """ELU: x above zero, e**x - 1 below."""
    return x if x > 0 else math.expm1(x)


def relu(x: float) -> float:
    """ReLU: x above zero, +0 below."""
    return x if x > 0 else 0.0


def leaky_relu(x: float) -> float:
    """Leaky ReLU: x above zero, 0.01 x below."""
    return x if x > 0 else 0.01 * x


def hardsigmoid(x: float) -> float:
    """Hard sigmoid: x / 6 + 1/2, between 0 and 1."""
    return min(max(x / 6.0 + 0.5, 0.0), 1.0)


def hardswish(x: float) -> float:
    """Hard swish: x * hardsigmoid(x); -0 below -3."""
    if x <= -3.0:
        return -0.0
    return x if x >= 3.0 else x * (x + 3.0) / 6.0


def sin(x: float) -> float:
    """Sine; NaN at infinity."""
    return math.sin(x) if math.isfinite(x) else math.nan


def cos(x: float) -> float:
    """Cosine; NaN at infinity."""
    return math.cos(x) if math.isfinite(x) else math.nan
