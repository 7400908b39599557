"""A picture of a table: the function, the table, and the error between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lutserve import figure, luts
from lutserve.errors import UserError
from lutserve.luts import bits

WINDOW = (-10.0, 10.0)
"""What is shown of a wide domain unless told otherwise."""


def plot(function: str, spec: str, fmt: bits.Format, span: tuple[float, float], path: Path) -> None:
    """Draw function, table and error over span = (low, high) into a .png or .svg file.

    UserError if matplotlib is absent, the suffix is another one, or nothing in the range can be drawn.
    """
    figure.check(path)
    drawing = figure.new(8, 6)
    x = bits.decode64(bits.PATTERNS, fmt)
    y = bits.decode64(luts.patterns(function, spec, fmt), fmt)
    exact = luts.exact_values(function, fmt)
    wanted = np.isfinite(exact) & np.isfinite(y) & (x >= span[0]) & (x <= span[1])
    if not wanted.any():
        raise UserError(f"{function} has no finite value in {span[0]:g}:{span[1]:g}; choose another range")
    order = np.argsort(x[wanted], kind="stable")
    x, y, exact = (v[wanted][order] for v in (x, y, exact))
    above, below = drawing.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.plot(x, exact, linewidth=3, alpha=0.4, label=f"{function}, exact")
    above.plot(x, y, linewidth=1, label=f"{spec}, {fmt}")
    above.set_title(f"{function}  {spec}  {luts.digest(luts.patterns(function, spec, fmt))[:12]}")
    above.legend()
    below.plot(x, y - exact, linewidth=0.8)
    below.set_ylabel("error")
    below.set_xlabel("x")
    figure.save(drawing, path)
