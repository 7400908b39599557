"""What mix8 does around its int8 GEMM: prepare the activations, add the product of the outlier columns."""

from __future__ import annotations

import torch

from lutserve.kernels import activation
from lutserve.kernels.library import define
from lutserve.kernels.reference import TINY, quantize_rows

Prepared = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _fake(x: torch.Tensor, index: torch.Tensor, keep: torch.Tensor) -> Prepared:
    torch._check(
        x.dtype in (torch.float16, torch.bfloat16),
        lambda: f"mixq_prepare: x must be float16 or bfloat16, not {x.dtype}",
    )
    torch._check(
        x.dim() == 2 and x.shape[1] > 0,
        lambda: f"mixq_prepare: x must be [M, K] with K > 0, not {tuple(x.shape)}",
    )
    torch._check(
        index.dtype == torch.int32 and index.dim() == 1 and index.is_contiguous(),
        lambda: "mixq_prepare: index must be a contiguous int32 [S]",
    )
    torch._check(
        keep.dtype == torch.int32 and keep.shape == (-(-x.shape[1] // 32),) and keep.is_contiguous(),
        lambda: "mixq_prepare: keep must be a contiguous int32 [ceil(K / 32)]",
    )
    m = x.shape[0]
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((m, 1), dtype=torch.float32),
        x.new_empty((m, index.shape[0])),
        x.new_empty((m,), dtype=torch.float32),
        x.new_empty((1,), dtype=torch.float32),
    )


def _reference(x: torch.Tensor, index: torch.Tensor, keep: torch.Tensor) -> Prepared:
    _fake(x, index, keep)
    bits = (keep.long()[:, None] >> torch.arange(32)) & 1
    rest = torch.where(bits.flatten()[: x.shape[1]].bool(), x, 0).float()
    codes, scales = quantize_rows(rest)
    side = torch.where(index >= 0, x[:, index.clamp_min(0).long()], 0)
    rms = rest.square().mean(1).sqrt()
    ratios = torch.where(rms > TINY, rest.abs().amax(1) / rms, 0.0)
    return (
        codes,
        scales[:, None],
        side,
        ratios,
        ratios.amax(0, keepdim=True) if len(x) else ratios.new_zeros(1),
    )


prepare = define(
    "mixq_prepare(Tensor x, Tensor index, Tensor keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)
"""Split the outlier columns off x and quantise the rest by rows.

x: [M, K], float16 or bfloat16. index: int32 [S], the outlier columns, -1 for unused places.
keep: int32 [ceil(K / 32)], bit k % 32 of word k // 32 is 1 where column k is quantised.

Returns codes int8 [M, K] (0 in columns that are not kept), scales float32 [M, 1]
(max|x| / 127; NaN or inf where the row has one), side [M, S] in x's dtype (columns of `index`, 0 for -1),
ratios float32 [M] (max|x| / rms(x) of each row over its kept columns, 0 without a finite positive rms) and
their maximum [1].
RuntimeError if the arguments are not so.
"""


Gated = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _gate_fake(x: torch.Tensor, table: torch.Tensor, index: torch.Tensor, keep: torch.Tensor) -> Gated:
    torch._check(
        x.dim() == 2 and x.shape[1] > 0,
        lambda: f"mixq_gate_and_prepare: x must be [M, 2 K] with K > 0, not {tuple(x.shape)}",
    )
    product = activation._fake(x, table)
    return (product, *_fake(product, index, keep))


def _gate_reference(x: torch.Tensor, table: torch.Tensor, index: torch.Tensor, keep: torch.Tensor) -> Gated:
    _gate_fake(x, table, index, keep)
    product = activation._reference(x, table)
    return (product, *_reference(product, index, keep))


gate_and_prepare = define(
    "mixq_gate_and_prepare(Tensor x, Tensor table, Tensor index, Tensor keep) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gate_reference,
    _gate_fake,
)
"""`activation.act_and_mul` and `prepare` of its result, row by row while the row is in cache.

x: [M, 2 K], gate and up. table: as of `act_and_mul`. index, keep: as of `prepare`.

Returns the product [M, K], then what `prepare` makes of it; all equal in bits to the two operators'.
"""


def _add_fake(out: torch.Tensor, side: torch.Tensor, weight: torch.Tensor) -> None:
    torch._check(
        out.dtype in (torch.float16, torch.bfloat16) and side.dtype == weight.dtype == out.dtype,
        lambda: "mixq_add_outliers: out, side and weight must be all float16 or all bfloat16",
    )
    torch._check(
        side.shape[0] == out.shape[0] and weight.shape == (side.shape[1], out.shape[1]),
        lambda: "mixq_add_outliers: out must be [M, N], side [M, S] and weight [S, N]",
    )


def _add_reference(out: torch.Tensor, side: torch.Tensor, weight: torch.Tensor) -> None:
    _add_fake(out, side, weight)
    out.copy_(out.float() + side.float() @ weight.float())


add_outliers = define(
    "mixq_add_outliers(Tensor(a!) out, Tensor side, Tensor weight) -> ()", _add_reference, _add_fake
)
"""out += side @ weight in place, summed in fp32 and rounded once; reads weight once per four rows.

out: [M, N], side: [M, S], weight: [S, N], contiguous, all float16 or all bfloat16. RuntimeError if not so.
"""
