"""Executable specifications: what a method computes, in plain torch, without regard to speed.

AxCore's is in a module of its own, `axcore_reference`.
MixQ: "MixQ: Taming Dynamic Outliers in Mixed-Precision Quantization by Online Prediction", SC'24.
"""

from __future__ import annotations

import torch

from lutserve.errors import UserError
from lutserve.kernels.axcore_reference import axcore_linear

__all__ = ["SIGMA", "TINY", "MixqLinear", "axcore_linear", "quantize_rows", "quantize_rows_fp16"]

#: |x| above this makes a column an outlier in the published algorithm
SIGMA = 6.0


def quantize_rows_fp16(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Published row quantisation in binary16: scale = half(max|x| / levels), code = rint(half(x / scale)).

    Args:
        x: [M, K] fp16.
        levels: 127 (8 bit).

    Returns:
        codes int8 [M, K] (the low byte: there is no clamp, so tiny rows wrap) and scales fp16 [M].

    """
    scale = (x.abs().amax(1).float() / levels).half()
    codes = (x.float() / scale.float()[:, None]).half().double().round()
    # A scale that underflowed to zero divides to infinity, which the original's int32 conversion saturates.
    return codes.nan_to_num(0, 2**31 - 1, -(2**31)).to(torch.int64).to(torch.int8), scale


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Served row quantisation to int8: fp32 scale max|x| / 127, ties to even, clamped to +-127.

    Args:
        x: [M, K], any float dtype.

    Returns:
        codes int8 [M, K] and scales fp32 [M]; a row of zeros gives codes 0 and scale 0.

    """
    wide = x.float()
    peak = wide.abs().amax(1, keepdim=True)
    # Tensor by tensor: a Python number divided by a tensor is a product with the rounded reciprocal.
    inverse = torch.where(peak > TINY, torch.full_like(peak, 127) / peak, 0.0)
    codes = (wide * inverse).round().clamp(-127, 127)
    return codes.to(torch.int8), torch.where(peak <= TINY, 0.0, peak / 127.0)[:, 0]


#: rows whose largest value is below this are zero: 127 / peak would leave fp32's range
TINY = 1e-30


class MixqLinear:
    """MixQ's mix8 linear of the published code, to the bit: y = int8 part + 16-bit outlier columns.

    It keeps state from call to call as the original does: the list of outlier columns grows during the
    first two calls and is fixed afterwards. Unlike the original it leaves x unchanged.

    Attributes:
        slots: outlier columns found so far, in order of discovery (int64 [S]).
        codes: int8 [M, K] of the last call's activations.
        scales: fp16 [M] of the last call's activations.

    """

    def __init__(self, weight: torch.Tensor, bits: int = 8, mode: str = "reference") -> None:
        """Quantise `weight`, fp16 [N, K]; bits must be 8 and mode "reference"."""
        if bits != 8 or mode != "reference":
            raise UserError(f"MixqLinear(bits={bits}, mode={mode!r}): only bits=8, mode='reference' exists")
        if weight.dtype != torch.float16 or weight.dim() != 2:
            raise UserError(f"weight must be fp16 [N, K], not {weight.dtype} {list(weight.shape)}")
        self.weight_codes, self.weight_scales = quantize_rows_fp16(weight, 127)
        self.slots = torch.empty(0, dtype=torch.int64)
        self.detecting = True
        self.calls = 0

    def _dequantized(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns of the weight as the original keeps them: half(code * scale), fp16 [N, S]."""
        return (self.weight_codes[:, columns].float() * self.weight_scales.float()[:, None]).half()

    def _quantize(self, x: torch.Tensor) -> None:
        rest = x.clone()
        rest[:, self.slots] = 0
        self.codes, self.scales = quantize_rows_fp16(rest, 127)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return fp16 [M, N] for x fp16 [M, K], detecting outlier columns in the first two calls."""
        self._quantize(x)
        if self.detecting:
            threshold = (torch.tensor(SIGMA) / 127).half()
            if x.shape[0] and self.scales.max() > threshold:
                found = (x.abs() > SIGMA).any(0).nonzero()[:, 0]
                self.slots = torch.cat([self.slots, found[~torch.isin(found, self.slots)]])
                self._quantize(x)
            self.calls += 1
            self.detecting = self.calls < 2 and len(self.slots) <= 128
        exact = self.codes.double() @ self.weight_codes.double().T
        outliers = (x[:, self.slots].double() @ self._dequantized(self.slots).double().T).half()
        scale = self.weight_scales.float()[None] * self.scales.float()[:, None]
        out = (exact.float() * scale + outliers.float()).half()
        return out if bias is None else (out + bias).half()
