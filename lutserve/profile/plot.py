"""A picture of one fit: the numbers' histogram with both densities, and their quantiles against both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm, t
from torch import Tensor

from lutserve import figure

#: the paper also draws a normal distribution this much narrower, which fits the middle better
NARROW = 0.6
#: share of the numbers on either side that the histogram leaves out
_OUTSIDE = 1e-3


class Gallery:
    """Draws rows of `distributions.profile` into a folder; UserError at once if it cannot."""

    def __init__(self, folder: Path) -> None:
        self.folder = figure.folder(folder)

    def show(self, row: dict[str, Any], numbers: Tensor) -> None:
        """Draw <kind>-<layer>.png, unless the row has no fit."""
        fit = row["fit"]
        if fit is None or fit["point_mass"]:
            return
        values = np.sort(numbers[numbers.isfinite()].double().numpy())
        student, normal = t(fit["nu"], fit["loc"], fit["scale"]), norm(fit["mu"], fit["sigma"])
        drawing = figure.new(10, 4)
        left, right = drawing.subplots(1, 2)
        low, high = np.quantile(values, (_OUTSIDE, 1 - _OUTSIDE))
        x = np.linspace(low, high, 400)
        left.hist(values, bins=100, range=(low, high), density=True, alpha=0.4)
        left.plot(x, student.pdf(x), label=f"Student's t, nu = {fit['nu']:.3g}")
        left.plot(x, normal.pdf(x), label="normal")
        left.plot(x, norm.pdf(x, fit["mu"], NARROW * fit["sigma"]), ":", label=f"normal, {NARROW:g} sigma")
        left.set_ylim(0, 1.3 * student.pdf(fit["loc"]))
        left.legend()
        shares = (np.arange(len(values)) + 0.5) / len(values)
        # Every number near the ends, where the tails are, and few in the middle.
        chosen = np.unique(np.round(len(values) * norm.cdf(np.linspace(-4.5, 4.5, 300))).astype(int))
        chosen = chosen[chosen < len(values)]
        for name, fitted in (("Student's t", student), ("normal", normal)):
            right.plot(fitted.ppf(shares[chosen]), values[chosen], ".", label=f"against {name}")
        right.axline((fit["mu"], fit["mu"]), slope=1, linewidth=0.8, color="gray")
        right.set_xlim(*_ends(values))
        right.set_ylim(*_ends(values))
        right.set_xlabel("quantile of the fit")
        right.set_ylabel("quantile of the numbers")
        right.legend()
        drawing.suptitle(f"{row['kind']} of {row['layers'][0]}: KS-Delta {fit['ks_delta']:+.4f}")
        figure.save(drawing, self.folder / f"{row['kind']}-{row['layers'][0]}.png")


def _ends(values: Any) -> tuple[float, float]:
    """All numbers, with a margin."""
    margin = 0.05 * (values[-1] - values[0])
    return values[0] - margin, values[-1] + margin
