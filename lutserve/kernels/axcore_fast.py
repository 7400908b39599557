"""`lutserve::axcore_fast`: a linear layer of approximate products, each one integer addition ("AxCore").

Patterns are those of fp32, whose exponent never ends: an activation is widened, a weight's addend has its
offset and compensation at the place of the activation's mantissa (`luts.fpma_classes.addends`), and

    product = the fp32 number with the pattern(|a|) + addend, sign by exclusive or

which equals `fpma.products` wherever activation and product are normal numbers. Magnitudes below 2**-57, 0
too, count as 2**-57, those above 2**100, infinity too, as 2**100, so that no sum leaves the patterns of
numbers; NaN makes its row NaN. Sums are fp32, in any order. It costs what an exact product costs: on
processors whose only fast products are fp32 ones, less than a GEMM for each class.
"""

from __future__ import annotations

import torch

from lutserve.kernels import lut_gemm
from lutserve.kernels.library import define
from lutserve.kernels.lut_gemm import COLUMNS, OCTET

#: patterns of the smallest and the largest activation
_SMALLEST, _LARGEST = 70 << 23, 227 << 23


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    addends: torch.Tensor,
    scales: torch.Tensor,
    types: torch.Tensor | None,
    group_size: int,
    n: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    torch._check(
        x.dtype in (torch.float16, torch.bfloat16) and x.dim() == 2 and x.shape[1] > 0,
        lambda: f"axcore_fast: x must be float16 or bfloat16 [M, K], K > 0, not {x.dtype} {tuple(x.shape)}",
    )
    k = x.shape[1]
    torch._check(
        group_size > 0 and group_size % OCTET == 0 and k % group_size == 0,
        lambda: f"axcore_fast: group_size must be a multiple of {OCTET} that divides {k}, not {group_size}",
    )
    panels, groups = -(-n // COLUMNS), k // group_size
    torch._check(
        packed.shape == (panels, k // OCTET, 2, 16, 4)
        and scales.shape == (panels, groups, COLUMNS)
        and scales.dtype == torch.float32
        and addends.dtype == torch.int32
        and addends.shape[1:] == (16,)
        and (addends.shape[0] == 1 if types is None else types.shape == (panels, groups))
        and (bias is None or (bias.shape == (n,) and bias.dtype == x.dtype)),
        lambda: "axcore_fast: tensors do not fit each other; see its documentation",
    )
    return x.new_empty((x.shape[0], n))


def _reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    addends: torch.Tensor,
    scales: torch.Tensor,
    types: torch.Tensor | None,
    group_size: int,
    n: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    _fake(x, packed, addends, scales, types, group_size, n, bias)
    m, k = x.shape
    bits = x.float().view(torch.int32)
    patterns = (bits & 0x7FFFFFFF).clamp(_SMALLEST, _LARGEST) | (bits & -0x80000000)
    kinds = torch.zeros_like(scales[..., 0], dtype=torch.uint8) if types is None else types
    added = addends[kinds.long().repeat_interleave(COLUMNS, 0)[:n]]
    codes = lut_gemm.unpack(packed, n, k).long()
    out = torch.zeros(m, n)
    for group, begin in enumerate(range(0, k, group_size)):
        part = slice(begin, begin + group_size)
        added_here = added[:, group].gather(1, codes[:, part])
        sums = [(row + added_here).view(torch.float32).sum(1) for row in patterns[:, None, part]]
        out += torch.stack(sums) * scales[:, group].flatten()[:n] if m else 0
    out[x.isnan().any(1)] = torch.nan
    return (out if bias is None else out + bias.float()).to(x.dtype)


axcore_fast = define(
    "axcore_fast(Tensor x, Tensor packed, Tensor addends, Tensor scales, Tensor? types, int group_size, "
    "int n, Tensor? bias) -> Tensor",
    _reference,
    _fake,
)
"""Return the layer's output [M, N] in x's dtype, rounded once.

x: float16 or bfloat16 [M, K]. packed: uint8, `lut_gemm.pack` of the codes [N, K]. addends: int32 [T, 16].
scales: fp32, `lut_gemm.pack_scales`. types: uint8 [ceil(n/32), groups], the addends of a block of 32 columns,
or None where there is one. group_size: a multiple of 8 that divides K. bias: [n] of x's dtype or None.
All contiguous but x. RuntimeError if the arguments are not so.
"""
