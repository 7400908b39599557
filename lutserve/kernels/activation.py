"""`lutserve::act_and_mul`: a gated activation as one gather and one product."""

from __future__ import annotations

import torch

from lutserve.kernels.library import define


def _fake(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    torch._check(
        x.dtype in (torch.float16, torch.bfloat16),
        lambda: f"act_and_mul: x must be float16 or bfloat16, not {x.dtype}",
    )
    torch._check(
        x.dim() >= 1 and x.shape[-1] % 2 == 0,
        lambda: f"act_and_mul: the last dimension of x must be even: gate and up; x is {tuple(x.shape)}",
    )
    torch._check(
        table.dtype == x.dtype and table.shape == (65536,) and table.is_contiguous(),
        lambda: f"act_and_mul: table must be a contiguous [65536] tensor of x's dtype {x.dtype}",
    )
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _reference(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    _fake(x, table)
    gate, up = x.chunk(2, dim=-1)
    bits = gate.view(torch.int16).to(torch.int32) & 0xFFFF
    return table[bits] * up


act_and_mul = define("act_and_mul(Tensor x, Tensor table) -> Tensor", _reference, _fake)
"""A gated activation as a look-up: `table[bits(gate)] * up`, rounded once to x's dtype, to nearest even.

x: [..., 2d], float16 or bfloat16, gate in the first half of the last dimension and up in the second.
table: [65536] of x's dtype, indexed by the bit pattern of the gate (`lutserve.lut_table`).
Returns a new contiguous tensor [..., d]. RuntimeError if the arguments are not so. NaN payloads are free.
"""
