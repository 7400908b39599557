"""Round to nearest: every weight takes the nearest value of its group's scaled codebook."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lutserve.errors import UserError
from lutserve.formats import Codebook
from lutserve.quantizers import grid
from lutserve.quantizers.weight import QuantizedWeight, decode, encode

#: clip ratios that the search tries, best first among equals
CLIP_RATIOS = tuple(1 - i / 200 for i in range(40))
#: elements handled at a time: few enough to stay in the cache, and a bound on temporary memory
_CHUNK = 1 << 18


def rtn(
    weight: Tensor,
    fmt: str | Codebook,
    group_size: int = 128,
    scheme: grid.Scheme = "sym",
    full_range: bool = False,
    mse: bool = False,
    quantile: float = 1.0,
) -> QuantizedWeight:
    """Quantise a weight by rounding to nearest, in fp32 (arXiv 2405.03103, section 4).

    Args:
        weight: [N out, K in], any floating dtype, finite.
        fmt: a format or its name.
        group_size: columns that share a scale; -1 for all K.
        scheme: sym, or asym for integers.
        full_range: integers only: use all codes.
        mse: choose one ratio below `quantile` for the whole matrix, by the squared error.
        quantile: clip ratio: the share of the largest magnitude that the largest value stands for.

    Raises:
        UserError: unknown format, a scheme that it does not have, or a weight that is no finite matrix.

    """
    codebook = grid.check(fmt, scheme, full_range)
    if weight.ndim != 2 or 0 in weight.shape:
        raise UserError(f"a weight has two dimensions, not shape {tuple(weight.shape)}")
    if mse:
        quantile *= _best_ratio(weight, codebook, group_size, scheme, full_range, quantile)
    k = weight.shape[1]
    group = grid.effective_group(group_size, k)
    codes, scales, zeros = [], [], []
    for groups in _chunks(weight, group):
        scale, zero = grid.scales(groups, codebook, scheme, full_range, quantile)
        if not scale.isfinite().all():
            raise UserError("the weight holds NaN or infinity, or values beyond the range of float32")
        wide = None if zero is None else zero[..., None]
        codes.append(encode(groups, scale[..., None], wide, codebook).view(len(groups), -1)[:, :k])
        scales.append(scale)
        zeros.append(zero)
    return QuantizedWeight(
        codes=torch.cat(codes),
        scales=torch.cat(scales),
        codebook=codebook,
        group_size=group,
        zero_points=None if scheme == "sym" else torch.cat([z for z in zeros if z is not None]),
    )


def _chunks(weight: Tensor, group: int) -> Iterator[Tensor]:
    """Blocks of rows in fp32, grouped: [rows, G, group]."""
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        yield grid.grouped(rows.float(), group)


def _best_ratio(
    weight: Tensor,
    codebook: Codebook,
    group_size: int,
    scheme: grid.Scheme,
    full_range: bool,
    quantile: float,
) -> float:
    """The clip ratio with the least squared error over the whole matrix; the first one among equals."""
    k = weight.shape[1]
    group = grid.effective_group(group_size, k)
    errors = [0.0] * len(CLIP_RATIOS)
    for groups in _chunks(weight, group):
        for i, ratio in enumerate(CLIP_RATIOS):
            scale, zero = grid.scales(groups, codebook, scheme, full_range, ratio * quantile)
            scale, zero = scale[..., None], None if zero is None else zero[..., None]
            error = decode(encode(groups, scale, zero, codebook), scale, zero, codebook).sub_(groups)
            # What fills up a short group is no weight.
            error = error.view(len(groups), -1)[:, :k]
            errors[i] += float(error.square_().sum(dtype=torch.float64))
    return CLIP_RATIOS[errors.index(min(errors))]
