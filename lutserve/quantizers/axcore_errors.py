"""What a 4-bit format costs in a layer's output, block by block: three ways to measure it.

The error of an output is linear in x and in the activation maps of its classes (`luts.fpma_classes`), so its
mean square needs only their products: measured on activations (the Gram matrix), or expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from lutserve.kernels import library, lut_gemm
from lutserve.kernels.axcore import axcore_strict, pack_scales
from lutserve.kernels.axcore_reference import BLOCK, Dequant, activation_maps, patterns, product_tables
from lutserve.luts import fpma_classes
from lutserve.luts.fpma import FP4, Compensation
from lutserve.quantizers.fp4 import Fp4Weight

#: numbers that the published search computes its errors in: in float16 small ones tie, and ties go to E3M0
Precision = Literal["float32", "float16"]


def replayed_errors(
    weight: Tensor,
    candidates: Sequence[Fp4Weight],
    x: Tensor,
    dequant: Dequant = "exact",
    precision: Precision = "float32",
    compensation: Compensation = True,
) -> Tensor:
    """Mean squared error of each block's output in each format, by multiplying as the paper does.

    Args:
        weight: fp16 [N, K], N a multiple of 64.
        candidates: the weight in each of FP4.
        x: [M, K]; rounded to fp16.
        dequant: as in `quantize`.
        precision: differences, squares and means are rounded to float16, or not.
        compensation: as in `fpma.products`.

    Returns:
        fp32 or fp16 [N / 64, K / group_size, 3].

    """
    library.load()
    tables, (n, k), group = product_tables(FP4, True, compensation), weight.shape, candidates[0].group_size
    wide = torch.float16 if precision == "float16" else torch.float32
    errors = torch.empty(n // BLOCK, k // group, len(FP4), dtype=wide)
    for g in range(k // group):
        part = slice(g * group, (g + 1) * group)
        inputs = x[:, part].half().contiguous()
        exact = (inputs.float() @ weight[:, part].float().T).half()
        for kind, candidate in enumerate(candidates):
            packed = lut_gemm.pack(candidate.codes[:, part])
            scales = pack_scales(candidate.scales[:, g, None])
            out = axcore_strict(
                inputs, packed, scales, None, tables[kind, None], group, n, dequant == "fpma", None
            )
            squares = (exact.to(wide) - out.to(wide)).square()
            errors[:, g, kind] = squares.view(len(x), -1, BLOCK).transpose(0, 1).flatten(1).mean(1)
    return errors


def gram_errors(
    weight: Tensor, candidates: Sequence[Fp4Weight], x: Tensor, compensation: Compensation = True
) -> Tensor:
    """The same from the Gram matrix of x and its maps, in fp32: exact scales, sums that are not rounded.

    Arguments and result as of `replayed_errors`; the time does not grow with the formats' products.
    """
    classes = fpma_classes.classes(FP4, True, compensation)
    maps, books = activation_maps(classes.shifts), torch.from_numpy(classes.codebooks)
    plain = classes.shifts.index(0)
    (n, k), group = weight.shape, candidates[0].group_size
    errors = torch.empty(n // BLOCK, k // group, len(FP4))
    for g in range(k // group):
        part = slice(g * group, (g + 1) * group)
        features = maps[:, patterns(x[:, part].half())].float().transpose(0, 1)
        for kind, candidate in enumerate(candidates):
            used = books[kind].any(1)
            used[plain] = True
            parts = -books[kind][:, candidate.codes[:, part].long()] * candidate.scales[:, g, None].float()
            parts[plain] += weight[:, part].float()
            error = parts[used].transpose(0, 1).flatten(1)
            seen = features[:, used].flatten(1)
            squares = (error @ (seen.T @ seen) * error).sum(1)
            errors[:, g, kind] = squares.view(-1, BLOCK).mean(1) / len(x)
    return errors


def expected_errors(
    weight: Tensor, candidates: Sequence[Fp4Weight], compensation: Compensation = True
) -> Tensor:
    """The same for activations of mean zero that do not depend on each other, up to a factor.

    No activations are needed: only squares are left, and their mantissas are taken to be spread evenly.
    """
    classes = fpma_classes.classes(FP4, True, compensation)
    books, moments = torch.from_numpy(classes.codebooks), _moments(classes.shifts)
    plain = classes.shifts.index(0)
    w = weight.float().view(*candidates[0].scales.shape, -1)
    errors = []
    for kind, candidate in enumerate(candidates):
        codes = candidate.codes.view(w.shape).int()
        scales = candidate.scales.float()[..., None]
        cross = (books[kind] * moments[plain, :, None]).sum(0)
        square = (books[kind].square() * moments.diagonal()[:, None]).sum(0)
        mean = w.square() * moments[plain, plain] - 2 * w * scales * _look_up(cross, codes)
        mean += scales.square() * _look_up(square, codes)
        errors.append(mean.sum(-1).view(-1, BLOCK, w.shape[1]).mean(1))
    return torch.stack(errors, -1)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    return table.index_select(0, codes.flatten()).view(codes.shape)


@cache
def _moments(shifts: tuple[int, ...]) -> Tensor:
    """Mean products of the maps over [1, 2), fp32 [C, C]; those of other octaves are proportional."""
    values = activation_maps(shifts)[:, 0x3C00:0x4000].double()
    return (values @ values.T / values.shape[1]).float()
