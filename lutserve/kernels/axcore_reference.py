"""Linear layers of approximate products in plain torch ("AxCore", MICRO'25), without regard to speed."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import torch

from lutserve.errors import UserError
from lutserve.luts import fpma, fpma_classes
from lutserve.luts.bits import Format

#: output rows of a weight that share a format, group by group
BLOCK = 64
#: input columns that a layer without 4-bit weights sums in fp16, as published
TILE = 64
#: how a group's sum meets its scale: rounded fp16 product, or FPMA without compensation
Dequant = Literal["exact", "fpma"]
#: what NaN is on the published hardware, where it then takes part in integer arithmetic
_NAN = 0x7FFF


@cache
def product_tables(
    formats: tuple[fpma.Fp4, ...] = fpma.FP4, snc: bool = True, compensation: fpma.Compensation = True
) -> torch.Tensor:
    """`fpma.products` by activation: fp16 [T, 65536, 16]; cached and shared, do not write."""
    tables = np.stack([fpma.products(fmt.name, snc, compensation) for fmt in formats])
    return torch.from_numpy(tables.view(np.int16)).view(torch.float16).transpose(1, 2).contiguous()


@cache
def activation_maps(shifts: tuple[int, ...], dtype: Format = "float16") -> torch.Tensor:
    """`fpma_classes.maps` as a tensor [C, 65536] of `dtype`; cached and shared, do not write."""
    maps = torch.from_numpy(fpma_classes.maps(shifts, dtype).view(np.int16))
    return maps.view(torch.float16 if dtype == "float16" else torch.bfloat16)


def patterns(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns of a 16-bit tensor, int64."""
    return x.contiguous().view(torch.int16).long() & 0xFFFF


def multiply(a: torch.Tensor, b: torch.Tensor, compensation: int = 0) -> torch.Tensor:
    """`fpma.fpma` of fp16 tensors that broadcast; fp16."""
    left, right = patterns(a), patterns(b)
    n = ((left & 0x7FFF) + (right & 0x7FFF) - fpma.BIAS["float16"] + compensation).clamp_min(0) & 0x7FFF
    bits = torch.where((left & 0x7FFF == 0) | (right & 0x7FFF == 0), 0, n | ((left ^ right) & 0x8000))
    return torch.where(bits < 0x8000, bits, bits - 0x10000).to(torch.int16).view(torch.float16)


def strict(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    kinds: torch.Tensor,
    products: torch.Tensor,
    group_size: int,
    fpma_dequant: bool,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Published order of sums, fp16 [M, N].

    By groups of input columns, products are summed in fp16, column after column from +0; each sum times its
    scale is rounded to fp16; these are added in fp32, group after group, and rounded; plus bias, rounded.

    x: fp16 [M, K]. codes: uint8 [N, K]. scales: fp16 [N, G]. kinds: uint8 [N, G], the table of each group.
    products: fp16 [T, 65536, 16]. bias: fp16 [N].
    """
    rows, total = patterns(x), x.new_zeros((len(x), len(codes)), dtype=torch.float32)
    for group, begin in enumerate(range(0, x.shape[1], group_size)):
        kind, scale = kinds[:, group].long(), scales[:, group]
        sums = torch.zeros_like(total, dtype=torch.float16)
        for column in range(begin, begin + group_size):
            sums = products[kind, rows[:, column, None], codes[:, column].long()] + sums
        if fpma_dequant:
            nan = torch.tensor(_NAN, dtype=torch.int16, device=x.device).view(torch.float16)
            total += multiply(torch.where(sums.isnan(), nan, sums), scale).float()
        else:
            total += (sums * scale).float()
    return total.half() if bias is None else total.half() + bias


def uniform(
    x: torch.Tensor,
    weight: torch.Tensor,
    compensation: int,
    bias: torch.Tensor | None = None,
    tile: int = TILE,
) -> torch.Tensor:
    """FPMA of fp16 x [M, K] and weight [N, K], summed as in `strict` by tiles without scales; fp16 [M, N]."""
    total = x.new_zeros((len(x), len(weight)), dtype=torch.float32)
    for begin in range(0, x.shape[1], tile):
        sums = torch.zeros_like(total, dtype=torch.float16)
        for column in range(begin, min(begin + tile, x.shape[1])):
            sums = multiply(x[:, column, None], weight[:, column], compensation) + sums
        total += sums.float()
    return total.half() if bias is None else total.half() + bias


def _fast(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    kinds: torch.Tensor,
    classes: fpma_classes.Classes,
    group_size: int,
    fpma_dequant: bool,
) -> torch.Tensor:
    """The same products by classes, summed in fp32 and rounded once."""
    books, total = torch.from_numpy(classes.codebooks), torch.zeros((len(x), len(codes)))
    mapped = activation_maps(classes.shifts)[:, patterns(x)].float()
    for group, begin in enumerate(range(0, x.shape[1], group_size)):
        part = slice(begin, begin + group_size)
        weights = books[kinds[:, group, None].long(), :, codes[:, part].long()]
        sums = torch.einsum("cmk,nkc->mn", mapped[:, :, part], weights)
        scale = scales[:, group]
        if fpma_dequant:
            moved = sums.view(torch.int32) + ((patterns(scale) - fpma.BIAS["float16"]) << 13).int()
            total += torch.where((sums == 0) | (scale == 0), 0.0, moved.view(torch.float32))
        else:
            total += sums * scale.float()
    return total.half()


def axcore_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    types: torch.Tensor,
    group_size: int,
    dequant: Dequant = "exact",
    numerics: Literal["strict", "fast"] = "strict",
    *,
    snc: bool = True,
    compensation: fpma.Compensation = True,
) -> torch.Tensor:
    """AxCore's linear layer.

    Args:
        x: fp16 [M, K].
        codes: uint8 [N, K]: sign and index of a magnitude of the block's format.
        scales: fp16 [N, K / group_size].
        types: uint8 [N / 64, K / group_size]: 0 E3M0, 1 E2M1, 2 E1M2.
        group_size: input columns that share a scale, a divisor of K.
        dequant: sum times scale by a rounded product, or by FPMA without compensation.
        numerics: strict: the published fp16 sums in their order. fast: the same products by classes (see
            `lutserve.luts.fpma_classes`), summed in fp32 and rounded once.
        snc: convert subnormal weights.
        compensation: see `fpma.products`.

    Returns:
        fp16 [M, N].

    Raises:
        UserError: shapes, dtypes or options that are not so.

    """
    n, k = codes.shape if codes.dim() == 2 else (0, 0)
    if dequant not in ("exact", "fpma") or numerics not in ("strict", "fast"):
        raise UserError(f"dequant {dequant!r} is exact or fpma, numerics {numerics!r} strict or fast")
    if x.dtype != torch.float16 or x.dim() != 2 or x.shape[1] != k:
        raise UserError(f"x must be fp16 [M, {k}], not {x.dtype} {list(x.shape)}")
    if group_size < 1 or not k or k % group_size or n % BLOCK:
        raise UserError(
            f"codes [{n}, {k}] in groups of {group_size}: {BLOCK} must divide the rows, a group the columns"
        )
    groups = k // group_size
    if scales.shape != (n, groups) or types.shape != (n // BLOCK, groups):
        raise UserError(f"scales must be [{n}, {groups}] and types [{n // BLOCK}, {groups}]")
    kinds = types.repeat_interleave(BLOCK, 0)
    if numerics == "strict":
        tables = product_tables(fpma.FP4, snc, compensation)
        return strict(x, codes, scales, kinds, tables, group_size, dequant == "fpma")
    classes = fpma_classes.classes(fpma.FP4, snc, compensation)
    return _fast(x, codes, scales, kinds, classes, group_size, dequant == "fpma")
