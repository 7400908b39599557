"""`lutserve::lut_gemm`: a linear layer whose weights are 4-bit indices into a table of 16 numbers.

Every 4-bit format is one table, and AxCore's approximate products are a table for each activation class.
"""

from __future__ import annotations

import torch

from lutserve.kernels.library import define
from lutserve.kernels.reference import quantize_rows

#: output columns that lie together in the packed weight, and input columns in one dword of it
COLUMNS, OCTET = 32, 8
#: nibble of a packed dword -> input column of the octet; see cpu/lut_gemm.cpp for the reason
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(indices: torch.Tensor) -> torch.Tensor:
    """Return the indices [N, K] (uint8, 0..15) as `lut_gemm` reads them.

    The result is uint8 [ceil(N/32), ceil(K/8), 2, 16, 4]: the dword [p, o, v, l] holds output column
    32p + 16v + l and input columns 8o..8o+7, the column 8o + ORDER[s] in its bits 4s..4s+3 (little-endian).
    What lies outside the weight is index 0 and meets activations of 0.
    """
    n, k = indices.shape
    panels, octets = -(-n // COLUMNS), -(-k // OCTET)
    padded = indices.new_zeros((panels * COLUMNS, octets * OCTET))
    padded[:n, :k] = indices
    nibbles = padded.view(panels, COLUMNS, octets, OCTET)[..., ORDER].transpose(1, 2)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous().view(panels, octets, 2, 16, 4)


def unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return the indices uint8 [n, k] of a packed weight."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).flatten(2, 3)
    inverse = [ORDER.index(column) for column in range(OCTET)]
    return nibbles[..., inverse].transpose(1, 2).reshape(nibbles.shape[0] * COLUMNS, -1)[:n, :k]


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return the scales [N, G] as `lut_gemm` reads them: float32 [ceil(N/32), G, 32], 0 outside."""
    n, groups = scales.shape
    panels = -(-n // COLUMNS)
    padded = scales.new_zeros((panels * COLUMNS, groups), dtype=torch.float32)
    padded[:n] = scales
    return padded.view(panels, COLUMNS, groups).transpose(1, 2).contiguous()


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    types: torch.Tensor | None,
    group_size: int,
    n: int,
    bias: torch.Tensor | None,
    quantize_activations: bool,
) -> torch.Tensor:
    torch._check(
        x.dtype in (torch.float16, torch.bfloat16),
        lambda: f"lut_gemm: x must be float16 or bfloat16, not {x.dtype}",
    )
    torch._check(
        x.dim() == 3 and x.shape[2] > 0,
        lambda: f"lut_gemm: x must be [C, M, K] with K > 0, not {tuple(x.shape)}",
    )
    classes, m, k = x.shape
    torch._check(
        group_size > 0 and (group_size % OCTET == 0 or group_size >= k),
        lambda: f"lut_gemm: group_size must be a multiple of {OCTET} or cover all of K, not {group_size}",
    )
    panels, groups = -(-n // COLUMNS), -(-k // group_size)
    torch._check(
        packed.shape == (panels, -(-k // OCTET), 2, 16, 4)
        and scales.shape == (panels, groups, COLUMNS)
        and codebooks.dim() == 3
        and codebooks.shape[1:] == (classes, 16)
        and (codebooks.shape[0] == 1 if types is None else types.shape == (panels, groups))
        and (bias is None or bias.shape == (n,))
        and (not quantize_activations or classes == 1),
        lambda: "lut_gemm: tensors do not fit each other; see its documentation",
    )
    return x.new_empty((m, n))


def _reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    types: torch.Tensor | None,
    group_size: int,
    n: int,
    bias: torch.Tensor | None,
    quantize_activations: bool,
) -> torch.Tensor:
    _fake(x, packed, codebooks, scales, types, group_size, n, bias, quantize_activations)
    classes, m, k = x.shape
    indices = unpack(packed, n, k).long()
    books = codebooks.to(x.dtype).float()
    kinds = torch.zeros_like(scales[..., 0]) if types is None else types
    out = scales.new_zeros((m, n))
    for group, begin in enumerate(range(0, k, group_size)):
        part = slice(begin, begin + group_size)
        kind = kinds[:, group].long().repeat_interleave(COLUMNS)[:n, None]
        sums = torch.zeros_like(out)
        for c in range(classes):
            values, factor = x[c, :, part].float(), scales.new_ones(m)
            if quantize_activations:
                codes, factor = quantize_rows(values)
                values = codes.float()
            sums += values @ books[kind, c, indices[:, part]].T * factor[:, None]
        out += sums * scales[:, group].flatten()[:n]
    return (out if bias is None else out + bias.float()).to(x.dtype)


lut_gemm = define(
    "lut_gemm(Tensor x, Tensor packed, Tensor codebooks, Tensor scales, Tensor? types, int group_size, "
    "int n, Tensor? bias, bool quantize_activations) -> Tensor",
    _reference,
    _fake,
)
"""Return the sum over classes of x[c] @ W_c^T, plus bias, rounded once: [M, n].

W_c[row, k] = codebooks[types[row, group of k], c, index[row, k]] * scale[row, group of k]; the table is
rounded to x's dtype first, products are exact, sums are fp32 in any order and scaled once a group.

x: [C, M, K], float16 or bfloat16; C is 1 but for approximate products. packed: uint8, see `pack`.
codebooks: float32 [T, C, 16]. scales: float32, see `pack_scales`. types: uint8 [ceil(n/32), groups], which of
the T codebooks a block of 32 columns takes, or None where T is 1. Of several classes one whose table is all 0
costs nothing, and NaN in it may be passed over. group_size: input columns that share a
scale, a multiple of 8 or at least K; the last group may be shorter. bias: [n] of x's dtype, or None.
quantize_activations: quantise x to int8 by row and group first (W4A8). The codebook must then hold whole
numbers from -127 to 127, and C must be 1.
All contiguous but x. RuntimeError if the arguments are not so.
"""
