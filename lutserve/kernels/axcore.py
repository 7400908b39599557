"""Linear layers of approximate products in the published order of sums, to the last bit ("AxCore", MICRO'25).

`lutserve::axcore_strict`: weights are 4-bit floats, a product is one entry of a table indexed by the 16-bit
activation and the 4-bit weight. `lutserve::fpma_linear`: both have 16 bits, a product is an integer addition.
"""

from __future__ import annotations

import torch

from lutserve.kernels import axcore_reference, lut_gemm
from lutserve.kernels.library import define
from lutserve.kernels.lut_gemm import COLUMNS, OCTET

#: largest compensation of `fpma_linear`
_MOST = 0x3C00


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return the scales fp16 [N, G] as `axcore_strict` reads them: fp16 [ceil(N/32), G, 32], 0 outside."""
    return lut_gemm.pack_scales(scales).half()


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    types: torch.Tensor | None,
    products: torch.Tensor,
    group_size: int,
    n: int,
    fpma_dequant: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    torch._check(
        x.dtype == torch.float16 and x.dim() == 2 and x.shape[1] > 0,
        lambda: f"axcore_strict: x must be float16 [M, K] with K > 0, not {x.dtype} {tuple(x.shape)}",
    )
    k = x.shape[1]
    torch._check(
        group_size > 0 and group_size % OCTET == 0 and k % group_size == 0,
        lambda: f"axcore_strict: group_size must be a multiple of {OCTET} that divides {k}, not {group_size}",
    )
    panels, groups = -(-n // COLUMNS), k // group_size
    torch._check(
        packed.shape == (panels, k // OCTET, 2, 16, 4)
        and scales.shape == (panels, groups, COLUMNS)
        and scales.dtype == torch.float16
        and products.dtype == torch.float16
        and products.shape[1:] == (65536, 16)
        and (products.shape[0] == 1 if types is None else types.shape == (panels, groups))
        and (bias is None or (bias.shape == (n,) and bias.dtype == torch.float16)),
        lambda: "axcore_strict: tensors do not fit each other; see its documentation",
    )
    return x.new_empty((x.shape[0], n))


def _reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    types: torch.Tensor | None,
    products: torch.Tensor,
    group_size: int,
    n: int,
    fpma_dequant: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    _fake(x, packed, scales, types, products, group_size, n, fpma_dequant, bias)
    codes = lut_gemm.unpack(packed, n, x.shape[1])
    wide = scales.transpose(1, 2).flatten(0, 1)[:n]
    kinds = torch.zeros_like(scales[..., 0]) if types is None else types
    by_row = kinds.repeat_interleave(COLUMNS, 0)[:n]
    return axcore_reference.strict(x, codes, wide, by_row, products, group_size, fpma_dequant, bias)


axcore_strict = define(
    "axcore_strict(Tensor x, Tensor packed, Tensor scales, Tensor? types, Tensor products, int group_size, "
    "int n, bool fpma_dequant, Tensor? bias) -> Tensor",
    _reference,
    _fake,
)
"""Return `axcore_reference.strict` of packed arguments, fp16 [M, N].

x: fp16 [M, K]. packed: uint8, `lut_gemm.pack` of the codes [N, K]. scales: fp16, `pack_scales`. types: uint8
[ceil(n/32), groups], the table of a block of 32 columns, or None where there is one. products: fp16
[T, 65536, 16], see `axcore_reference.product_tables`. group_size: a multiple of 8 that divides K.
fpma_dequant: the product of sum and scale is FPMA without compensation. bias: fp16 [n] or None.
All contiguous but x. RuntimeError if the arguments are not so. Infinities and NaN are patterns like others.
"""


def pack_uniform(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight fp16 [N, K] as `fpma_linear` reads it: fp16 [ceil(N/32), K, 32], 0 outside."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -n % COLUMNS))
    return padded.view(-1, COLUMNS, k).transpose(1, 2).contiguous()


def _uniform_fake(
    x: torch.Tensor, weight: torch.Tensor, compensation: int, tile: int, n: int, bias: torch.Tensor | None
) -> torch.Tensor:
    torch._check(
        x.dtype == torch.float16 and x.dim() == 2,
        lambda: f"fpma_linear: x must be float16 [M, K], not {x.dtype} {tuple(x.shape)}",
    )
    torch._check(
        weight.dtype == torch.float16
        and weight.shape == (-(-n // COLUMNS), x.shape[1], COLUMNS)
        and 0 <= compensation <= _MOST
        and tile > 0
        and (bias is None or (bias.shape == (n,) and bias.dtype == torch.float16)),
        lambda: "fpma_linear: tensors do not fit each other; see its documentation",
    )
    return x.new_empty((x.shape[0], n))


def _uniform_reference(
    x: torch.Tensor, weight: torch.Tensor, compensation: int, tile: int, n: int, bias: torch.Tensor | None
) -> torch.Tensor:
    _uniform_fake(x, weight, compensation, tile, n, bias)
    return axcore_reference.uniform(x, weight.transpose(1, 2).flatten(0, 1)[:n], compensation, bias, tile)


fpma_linear = define(
    "fpma_linear(Tensor x, Tensor weight, int compensation, int tile, int n, Tensor? bias) -> Tensor",
    _uniform_reference,
    _uniform_fake,
)
"""Return `axcore_reference.uniform` of a packed weight, fp16 [M, N].

x: fp16 [M, K]. weight: fp16, see `pack_uniform`. compensation: 0 to 0x3C00. tile: columns that are summed
in fp16, `axcore_reference.TILE` as published. bias: fp16 [n] or None.
All contiguous but x. RuntimeError if the arguments are not so. Infinities and NaN are patterns like others.
"""
