"""`lutserve::linear16`: a linear layer of 16-bit weights, for processors whose own 16-bit GEMM is slow."""

from __future__ import annotations

import torch

from lutserve.kernels.library import define

#: output columns that lie together in the packed weight, and what its input columns are padded to
COLUMNS, OCTET = 32, 8


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight [N, K] as `linear16` reads it: [ceil(N/32), K rounded up to 8, 32], 0 outside."""
    n, k = weight.shape
    panels, rows = -(-n // COLUMNS), -(-k // OCTET) * OCTET
    packed = weight.new_zeros((panels, rows, COLUMNS))
    whole = n // COLUMNS
    packed[:whole, :k] = weight[: whole * COLUMNS].view(whole, COLUMNS, k).transpose(1, 2)
    packed[whole:, :k, : n - whole * COLUMNS] = weight[whole * COLUMNS :].T
    return packed


def unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return the weight [n, k] of a packed one."""
    return packed.transpose(1, 2).flatten(0, 1)[:n, :k]


def _fake(x: torch.Tensor, packed: torch.Tensor, n: int, bias: torch.Tensor | None) -> torch.Tensor:
    torch._check(
        x.dtype in (torch.float16, torch.bfloat16),
        lambda: f"linear16: x must be float16 or bfloat16, not {x.dtype}",
    )
    torch._check(
        x.dim() == 2 and x.shape[1] > 0,
        lambda: f"linear16: x must be [M, K] with K > 0, not {tuple(x.shape)}",
    )
    shape = (-(-n // COLUMNS), -(-x.shape[1] // OCTET) * OCTET, COLUMNS)
    torch._check(
        packed.shape == shape
        and packed.dtype == x.dtype
        and (bias is None or (bias.shape == (n,) and bias.dtype == x.dtype)),
        lambda: "linear16: tensors do not fit each other; see its documentation",
    )
    return x.new_empty((x.shape[0], n))


def _reference(x: torch.Tensor, packed: torch.Tensor, n: int, bias: torch.Tensor | None) -> torch.Tensor:
    _fake(x, packed, n, bias)
    out = x.float() @ unpack(packed, n, x.shape[1]).float().T
    return (out if bias is None else out + bias.float()).to(x.dtype)


linear16 = define("linear16(Tensor x, Tensor packed, int n, Tensor? bias) -> Tensor", _reference, _fake)
"""Return x @ W^T + bias, [M, n]: products exact, sums fp32 in any order, rounded once.

x: [M, K], float16 or bfloat16. packed: W [n, K] of x's dtype, see `pack`. bias: [n] of x's dtype, or None.
All contiguous but x. RuntimeError if the arguments are not so.
"""
