"""GPTQ (arXiv 2210.17323) for any codebook: round column by column, let later columns make up for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lutserve.errors import UserError
from lutserve.formats import Codebook
from lutserve.quantizers import grid
from lutserve.quantizers.weight import QuantizedWeight, decode, encode

_Scales = tuple[Tensor, Tensor | None]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    fmt: str | Codebook,
    group_size: int = 128,
    scheme: grid.Scheme = "sym",
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
) -> QuantizedWeight:
    """Quantise a weight so that its output on the calibration data changes least.

    Args:
        weight: [N out, K in], any floating dtype; computed in fp32.
        hessian: fp32 [K, K], sum or mean of x x^T over the calibration inputs; any factor will do.
        fmt: a format or its name.
        group_size: columns that share a scale; -1 for all K.
        scheme: sym, or asym for integers.
        act_order: visit the columns with the largest activations first.
        static_groups: with act_order, keep groups of neighbouring columns, their scales taken from the
            original weight; otherwise groups follow the order of the visit (`permutation`).
        damping: share of the mean diagonal added to it.
        block_size: columns updated at once before the rest is.

    Raises:
        UserError: unknown format or scheme, shapes that do not fit, or a hessian that ever more damping does
            not make positive definite.

    """
    codebook = grid.check(fmt, scheme)
    n, k = weight.shape
    if hessian.shape != (k, k):
        raise UserError(f"a weight [{n}, {k}] needs a hessian [{k}, {k}], not {list(hessian.shape)}")
    if not damping >= 0 or block_size < 1:
        raise UserError(f"damping={damping}, block size={block_size}; allowed: damping >= 0, block size >= 1")
    group = grid.effective_group(group_size, k)
    # Columns become rows: each step then works on contiguous memory.
    w = weight.t().float().contiguous()
    if not w.isfinite().all():
        raise UserError("the weight holds NaN or infinity")
    hessian = hessian.float().clone()
    # One group a row has its scale from the weight as it came, dead columns included.
    fixed: list[_Scales] | None = [_scales(w, codebook, scheme)] if group == k else None
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    w[dead] = 0
    order = torch.arange(k)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        hessian = hessian[order][:, order]
        if fixed is None and static_groups:
            fixed = [_scales(part, codebook, scheme) for part in w.split(group)]
        w = w[order]
    groups = order // group if static_groups else torch.arange(k) // group
    factor = inverse_factor(hessian, damping)
    del hessian

    codes = torch.empty((k, n), dtype=torch.uint8)
    chosen: list[_Scales] = fixed or []

    def visit(i: int, column: Tensor) -> Tensor:
        if fixed is None and i % group == 0:
            # From the weight as finished blocks left it, not as the current one is changing it.
            chosen.append(_scales(w[i : i + group], codebook, scheme))
        scale, zero = chosen[int(groups[i])]
        codes[i] = encode(column, scale, zero, codebook)
        return decode(codes[i], scale, zero, codebook)

    sweep(w, factor, k, block_size, visit)
    moved = act_order and not static_groups and group != k
    zeros = [zero for _, zero in chosen if zero is not None]
    return QuantizedWeight(
        codes=torch.empty_like(codes).index_copy_(0, order, codes).t().contiguous(),
        scales=torch.stack([scale for scale, _ in chosen], dim=1),
        codebook=codebook,
        group_size=group,
        zero_points=torch.stack(zeros, dim=1) if zeros else None,
        permutation=order if moved else None,
    )


def sweep(
    w: Tensor, factor: Tensor, count: int, block_size: int, visit: Callable[[int, Tensor], Tensor]
) -> None:
    """Round column after column, and let later ones make up for the errors of those before.

    Args:
        w: fp32 [K, N], the weight transposed; what is after the first `count` rows ends as it should be used.
        factor: fp32 [K, K], of `inverse_factor`.
        count: rows to visit.
        block_size: rows updated at once before the rest is.
        visit: (i, row i as it is now, [N]) -> what it is rounded to.

    """
    for start in range(0, count, block_size):
        stop = min(start + block_size, count)
        block, errors = w[start:stop].clone(), torch.empty((stop - start, w.shape[1]))
        for i in range(start, stop):
            column = block[i - start]
            error = (column - visit(i, column)) / factor[i, i]
            block[i - start + 1 :].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)


def _scales(columns: Tensor, codebook: Codebook, scheme: grid.Scheme) -> _Scales:
    """Scale and zero point [N] of one group, given as [columns, N]."""
    return grid.gptq_scales(columns.t(), codebook, scheme)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U = (hessian + damping)^-1, fp32; overwrites the hessian.

    Factorised back to front: reversed(H) = L L^T makes H = R R^T with R = reversed(L) upper triangular, and
    U is the inverse of R. That is half the work of inverting first and loses fewer digits.
    """
    mean = hessian.diagonal().mean()
    identity = torch.eye(len(hessian))
    damped = 0.0
    for _ in range(6):
        hessian.diagonal().add_((damping - damped) * mean)
        damped = damping
        for dtype in (torch.float32, torch.float64):
            lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1).to(dtype))
            if not failed:
                upper = lower.flip(0, 1)
                factor: Tensor = torch.linalg.solve_triangular(upper, identity.to(dtype), upper=True)
                return factor.float()
        damping = max(10 * damping, 1e-4)
    raise UserError("the hessian is not positive definite, whatever the damping; is the input finite?")
