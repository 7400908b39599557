"""`lutserve::act_and_mul` and `lutserve::lut_unary`: activations as one gather, gated with one product."""

from __future__ import annotations

import torch

from lutserve.kernels.library import define


def _check(op: str, x: torch.Tensor, table: torch.Tensor) -> None:
    torch._check(
        x.dtype in (torch.float16, torch.bfloat16),
        lambda: f"{op}: x must be float16 or bfloat16, not {x.dtype}",
    )
    torch._check(
        table.dtype == x.dtype and table.shape == (65536,) and table.is_contiguous(),
        lambda: f"{op}: table must be a contiguous [65536] tensor of x's dtype {x.dtype}",
    )


def _fake(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    _check("act_and_mul", x, table)
    torch._check(
        x.dim() >= 1 and x.shape[-1] % 2 == 0,
        lambda: f"act_and_mul: the last dimension of x must be even: gate and up; x is {tuple(x.shape)}",
    )
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _gather(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table[x.view(torch.int16).to(torch.int32) & 0xFFFF]


def _reference(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    _fake(x, table)
    gate, up = x.chunk(2, dim=-1)
    return _gather(gate, table) * up


act_and_mul = define("act_and_mul(Tensor x, Tensor table) -> Tensor", _reference, _fake)
"""A gated activation as a look-up: `table[bits(gate)] * up`, rounded once to x's dtype, to nearest even.

x: [..., 2d], float16 or bfloat16, gate in the first half of the last dimension and up in the second.
table: [65536] of x's dtype, indexed by the bit pattern of the gate (`lutserve.lut_table`).
Returns a new contiguous tensor [..., d]. RuntimeError if the arguments are not so. NaN payloads are free.
"""


def _unary_fake(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    _check("lut_unary", x, table)
    return x.new_empty(x.shape)


def _unary_reference(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    _check("lut_unary", x, table)
    return _gather(x.contiguous(), table)


unary = define("lut_unary(Tensor x, Tensor table) -> Tensor", _unary_reference, _unary_fake)
"""`table[bits(x)]` for every element of x, float16 or bfloat16, any shape; a new contiguous tensor.

table: [65536] of x's dtype. RuntimeError if the arguments are not so.
"""
