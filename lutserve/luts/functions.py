"""The functions that have tables: for each the exact function and the NLI cut points, as data.

A new function is one literal in `FUNCTIONS`; `lutserve lut build` finds its cut points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lutserve.luts import exact
from lutserve.luts.samples import PUBLISHED

Tail = Literal["hold", "zero", "one", "identity"]


@dataclass(frozen=True)
class Function:
    """A unary function with a table.

    exact: the function in float64, defined for every float but NaN.
    cuts: the eleven NLI cut points c_0 < ... < c_10; decimals, meant as the nearest fp16 value.
    clamp: whether the input is clamped to [c_0, c_10] in its own dtype first (activations are).
    samples: fp32 values on the grid of 32 points a segment, for a table whose published values are not
        `exact` rounded once to fp32; text, in grid order.
    tails: what a clamped NN-LUT table gives left and right of its range: its value at the end ("hold"), a
        constant, or x itself.
    """

    exact: Callable[[float], float]
    cuts: tuple[float, ...]
    clamp: bool = True
    samples: str | None = None
    tails: tuple[Tail, Tail] = ("hold", "hold")


# Cut points: NLI, arXiv 2602.02988, the lists used in its models. The tanh GELU takes the cut points of the
# GELU: the published method samples whatever GELU the model itself has. Those of reciprocal and rsqrt are our
# own (`lutserve lut build`, 4 points, both ends pinned), for arguments brought to [1, 2) and [1, 4) by their
# exponent; the published wide reciprocal is `divide`.
FUNCTIONS: dict[str, Function] = {
    "silu": Function(
        exact.silu,
        (-20.36, -17.11, -8.37, -1.976, -0.2556, -0.007244, 0.007217, 0.2285, 1.582, 10.47, 65504.0),
        samples=PUBLISHED["silu"],
        tails=("zero", "identity"),
    ),
    "gelu": Function(
        exact.gelu,
        (-65504.0, -6.027, -3.945, -3.0, -1.254, -0.1436, -0.02237, 0.08545, 0.6733, 3.012, 65504.0),
        samples=PUBLISHED["gelu"],
        tails=("zero", "identity"),
    ),
    "gelu_tanh": Function(
        exact.gelu_tanh,
        (-65504.0, -6.027, -3.945, -3.0, -1.254, -0.1436, -0.02237, 0.08545, 0.6733, 3.012, 65504.0),
        samples=PUBLISHED["gelu_tanh"],
        tails=("zero", "identity"),
    ),
    "softmax_exp": Function(
        exact.exp,
        (-65504.0, -18.45, -11.016, -7.71, -5.688, -4.305, -2.436, -1.253, -0.4907, -0.1015, 0.0),
        clamp=False,
        tails=("zero", "one"),
    ),
    "reciprocal": Function(
        exact.reciprocal, (1.0, 1.013, 1.098, 1.183, 1.272, 1.38, 1.522, 1.655, 1.811, 1.953, 2.0)
    ),
    "rsqrt": Function(exact.rsqrt, (1.0, 1.041, 1.221, 1.438, 1.683, 1.976, 2.371, 2.785, 3.273, 3.844, 4.0)),
    "exp": Function(
        exact.exp,
        (-17.34, -15.17, -8.89, -5.273, -2.355, -0.3584, 0.9165, 3.451, 6.848, 10.945, 11.086),
        tails=("zero", "hold"),
    ),
    "log": Function(
        exact.log, (0.000489, 0.0005865, 0.01761, 0.237, 1.022, 2.152, 6.918, 150.8, 1696.0, 47600.0, 65504.0)
    ),
    "divide": Function(
        exact.reciprocal,
        (0.000489, 0.0005364, 0.008675, 0.0683, 0.2693, 2.176, 60.94, 267.5, 2974.0, 30020.0, 65504.0),
    ),
    "sigmoid": Function(
        exact.sigmoid,
        (-65504.0, -19.56, -10.445, -7.63, -6.32, -4.594, -2.89, -1.288, 2.068, 8.65, 65504.0),
        tails=("zero", "one"),
    ),
    "swish": Function(
        exact.swish,
        (-65504.0, -11.766, -5.754, -1.246, -0.5483, -0.0796, 0.011444, 0.1354, 1.245, 3.492, 65504.0),
        samples=PUBLISHED["swish"],
        tails=("zero", "identity"),
    ),
    "inversesigmoid": Function(
        exact.inverse_sigmoid,
        (-0.8247, 8.7e-06, 0.000763, 0.002356, 0.011185, 0.04086, 0.2065, 0.6123, 0.899, 0.993, 0.9995),
        samples=PUBLISHED["inversesigmoid"],
    ),
    "pow_2.0": Function(
        exact.square, (-65504.0, -258.0, -18.31, -4.613, -1.153, -0.1437, 0.247, 2.225, 34.47, 257.2, 65504.0)
    ),
    "hardswish": Function(
        exact.hardswish,
        (-41760.0, -3.035, -2.441, -1.259, -0.3364, -0.03745, 0.009674, 0.1991, 1.077, 3.035, 65504.0),
        samples=PUBLISHED["hardswish"],
        tails=("zero", "identity"),
    ),
    "tanh": Function(
        exact.tanh, (-65504.0, -4.664, -2.57, -1.52, -0.602, -0.2598, 0.0738, 0.7944, 2.5, 4.805, 65504.0)
    ),
    "mish": Function(
        exact.mish,
        (-65504.0, -21.86, -12.48, -6.59, -1.965, -0.7705, -0.083, 0.03842, 0.9077, 3.334, 65504.0),
        samples=PUBLISHED["mish"],
        tails=("zero", "identity"),
    ),
    "elu": Function(
        exact.elu,
        (-65504.0, -8.914, -4.184, -2.434, -1.11, -0.776, -0.309, -0.0868, -0.01325, -0.000673, 65504.0),
    ),
    "softplus": Function(
        exact.softplus,
        (-65504.0, -19.56, -10.445, -7.63, -6.316, -4.59, -2.883, -1.071, 0.922, 5.523, 65504.0),
        samples=PUBLISHED["softplus"],
        tails=("zero", "identity"),
    ),
    "hardsigmoid": Function(
        exact.hardsigmoid,
        (-65504.0, -32750.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 32750.0, 65504.0),
        tails=("zero", "one"),
    ),
    "relu": Function(
        exact.relu,
        (-65504.0, 0.0, 0.11664, 0.1688, 0.2292, 1.74, 25.86, 132.9, 3854.0, 29280.0, 65504.0),
        tails=("zero", "identity"),
    ),
    "leaky_relu": Function(
        exact.leaky_relu,
        (-65470.0, -2976.0, -132.5, -14.36, -3.422, -0.1969, -0.00873, 0.0, 257.8, 41700.0, 65504.0),
    ),
    "sin": Function(
        exact.sin, (-3.14, -3.125, -2.828, -2.11, -1.234, -0.0781, 0.7656, 1.766, 2.86, 3.11, 3.14)
    ),
    "cos": Function(
        exact.cos,
        (-3.14, -3.084, -1.859, -1.422, -0.5156, 0.2969, 1.422, 1.859, 2.234, 3.047, 3.14),
        samples=PUBLISHED["cos"],
    ),
}
