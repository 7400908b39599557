"""Fit NN-LUT tables: train one-layer ReLU networks (arXiv 2112.02191), keep the best of several seeds.

The network is the published one, g(x) = sum_h m_h relu(w_h x + b_h), trained with Adam and a cosine decay.
Only the ratios -b_h / w_h, the cut points, change what such a network can express, and for given cut points
the best m is a least-squares solution. So Adam moves the cut points alone, in asinh(x), and m is solved anew
in every step (variable projection); that takes hundreds of steps where training all three at once takes tens
of thousands, and depends little on the seed. Also different from the published recipe:

* Half of the points are uniform over the range and half are uniform in asinh(4x), so that a wide range does
  not starve the units around 0, where activations live: the gates of a model have deviations of 0.3 to 3.
* The cut points start spread as the square root of |f''|.
* What will be used is the table in fp16, so that is what the last step optimises and what the seeds are
  compared by: in each region the fp16 slope near the network's and the fp16 bias that fit the function best.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from lutserve.errors import UserError
from lutserve.luts import files
from lutserve.luts.nnlut import F64, Table, regions, to_fp16
from lutserve.luts.search import evaluate

_RATE = 0.1  # first learning rate, in mean distances between cut points
_DENSE = 4.0  # half of the points are uniform in asinh of this many times x
_TRAINED_ON = 2048  # points
_JUDGED_ON = 1 << 16  # points
_NEAR = 8  # fp16 slopes tried to each side of the network's
_ZERO = 2.0**-14  # a function that is smaller at the left end vanishes there


def fit(
    function: Callable[[float], float],
    name: str,
    low: float,
    high: float,
    hidden: int,
    *,
    seed: int = 0,
    seeds: int = 4,
    steps: int = 300,
    progress: Callable[[float, str], None] = lambda _fraction, _text: None,
) -> tuple[Table, float]:
    """Fit a table of `hidden` cut points to a function over [low, high].

    Args:
        function: float -> float, finite over the range.
        name: what the table says it approximates.
        low: left end of the range.
        high: right end of the range.
        hidden: units of the network.
        seed: the first seed; it jitters the cut points of the start.
        seeds: how many consecutive seeds to try.
        steps: training steps a seed.
        progress: told the fraction that a step adds to the whole, and the best error so far.

    Returns:
        the table with the least root-mean-square error among the seeds, and that error.

    Raises:
        UserError: the function is not finite everywhere in the range, or a number of units that no file has.

    """
    if not 2 < hidden <= files.MAX_HIDDEN:
        raise UserError(f"{hidden} hidden units; allowed: 3 to {files.MAX_HIDDEN}")
    x, y = judged(function, low, high)
    best: tuple[float, int, Table] | None = None
    for each in range(seed, seed + seeds):
        said = f"rms error {best[0]:.2e}" if best else ""
        network = _train(x, y, hidden, steps, each, lambda: progress(1 / steps / seeds, said))  # noqa: B023
        table = tabulate(name, network, x, y, (low, high))
        error = float(np.sqrt(np.mean((table(x.astype(np.float32)) - y) ** 2)))
        if best is None or error < best[0]:
            best = error, each, table
    assert best is not None
    return best[2], best[0]


def judged(function: Callable[[float], float], low: float, high: float) -> tuple[F64, F64]:
    """Return fp16 values x of the range as often as they count, ascending, and the function there."""
    share = (np.arange(_JUDGED_ON // 2) + 0.5) / (_JUDGED_ON // 2)
    a, b = np.arcsinh(_DENSE * low), np.arcsinh(_DENSE * high)
    both = np.concatenate([low + share * (high - low), np.sinh(a + share * (b - a)) / _DENSE])
    x, counts = np.unique(both.astype(np.float16).astype(np.float64), return_counts=True)
    y = np.array([evaluate(function, v) for v in x.tolist()])
    if not np.isfinite(y).all():
        raise UserError(f"the function is not finite at {x[~np.isfinite(y)][0]:g}; choose another range")
    return np.repeat(x, counts), np.repeat(y, counts)


def _train(
    x: F64, y: F64, hidden: int, steps: int, seed: int, progress: Callable[[], None]
) -> tuple[F64, F64, F64]:
    """Return w, b, m [hidden] of a trained network; every w is 1 or -1."""
    cut, w = _start(x, y, hidden, np.random.default_rng(seed))
    every = max(1, len(x) // _TRAINED_ON)
    xs, ys, ws = (torch.from_numpy(v) for v in (x[::every].copy(), y[::every].copy(), w))
    place = torch.from_numpy(np.arcsinh(cut)).requires_grad_()
    rate = _RATE * float(np.arcsinh(x[-1]) - np.arcsinh(x[0])) / hidden
    optimizer = torch.optim.Adam([place], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=rate / 100)

    def units() -> torch.Tensor:
        return ((xs[:, None] - place.sinh()) * ws).relu()

    for _ in range(steps):
        opened = units()
        m = torch.linalg.lstsq(opened.detach(), ys[:, None]).solution[:, 0]
        loss = (opened @ m - ys).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress()
    with torch.no_grad():
        m = torch.linalg.lstsq(units(), ys[:, None]).solution[:, 0]
        return w, -w * place.sinh().numpy(), m.numpy()


def _start(x: F64, y: F64, hidden: int, rng: np.random.Generator) -> tuple[F64, F64]:
    """Return cut points and directions [hidden] to start from."""
    at, first = np.unique(x, return_index=True)
    bend = np.sqrt(np.abs(np.gradient(np.gradient(y[first], at), at)))
    mass = np.concatenate([[0.0], np.cumsum((bend[1:] + bend[:-1]) / 2 * np.diff(at))])
    w = np.ones(hidden)
    # Units that open to the right are 0 at the left end. A function that is not needs a ramp and an offset
    # there, which one unit left of the range and one that opens to the left, right of it, make together.
    outer = [] if abs(y[0]) < _ZERO else [1.5 * x[0] - 0.5 * x[-1], 1.5 * x[-1] - 0.5 * x[0]]
    inner = hidden - len(outer)
    if outer:
        w[-1] = -1.0
    share = (np.arange(inner) + rng.uniform(size=inner)) / inner
    return np.concatenate([np.interp(share * mass[-1], mass, at), outer]), w


def tabulate(name: str, network: tuple[F64, F64, F64], x: F64, y: F64, span: tuple[float, float]) -> Table:
    """Make the fp16 table of a network (w, b, m): the cut points are the network's, the lines fit x and y."""
    cut, slopes, biases = (to_fp16(v) for v in regions(*network))
    region = np.searchsorted(cut, x, side="right")  # ascending, as x is
    edges = np.searchsorted(region, np.arange(len(slopes) + 1))
    for k, (start, stop) in enumerate(pairwise(edges)):
        # Where no unit is open the network is 0, as the function is there; it stays 0 out of range.
        if start < stop and (slopes[k] or biases[k]):
            slopes[k], biases[k] = _line(x[start:stop], y[start:stop], slopes[k])
    return Table(name, cut, slopes, biases, span)


def _line(x: F64, y: F64, slope: np.float32) -> tuple[float, float]:
    """Return the fp16 slope near `slope` and the fp16 bias with the least squared error at x, y."""
    ulp = float(np.spacing(np.abs(np.float16(slope))))
    slopes = to_fp16(float(slope) + ulp * np.arange(-_NEAR, _NEAR + 1)).astype(np.float64)
    rest = y - slopes[:, None] * x
    biases = to_fp16(rest.mean(1)).astype(np.float64)
    best = int(((rest - biases[:, None]) ** 2).mean(1).argmin())
    return float(slopes[best]), float(biases[best])
