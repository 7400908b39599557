"""MixQ as published, to the bit: an executable specification in plain torch, without regard to speed.

Source: "MixQ: Taming Dynamic Outliers in Mixed-Precision Quantization by Online Prediction" (SC'24) and the
published code: binary16 scales, no clamping of activations. What is served differs, see `quant_methods`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lutserve.errors import UserError

#: |x| above this makes a column an outlier in the published algorithm
SIGMA = 6.0
#: calibrated columns of a 4-bit or static layer
CALIBRATED = 128
#: calls in which a layer looks for outliers
LEARNING_CALLS = 2
#: a 4-bit weight scale is the row's maximum by this: what is larger than 7 / 10 of it saturates
INT4_DIVISOR = 10.0


def quantize_rows_fp16(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Published row quantisation in binary16: scale = half(max|x| / levels), code = rint(half(x / scale)).

    Args:
        x: [M, K] fp16.
        levels: 127 (8 bit) or 7 (4 bit).

    Returns:
        codes int8 [M, K] (the low byte or nibble: there is no clamp, so tiny rows wrap), scales fp16 [M].

    """
    scale = (x.abs().amax(1).float() / levels).half()
    codes = _rounded_quotient(x, scale)
    # A scale that underflowed to zero divides to infinity, which the original's int32 conversion saturates.
    whole = codes.nan_to_num(0, 2**31 - 1, -(2**31)).to(torch.int64)
    return (whole if levels > 7 else (whole & 15 ^ 8) - 8).to(torch.int8), scale


def quantize_weight_int4(weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Published 4-bit weights: codes int8 [N, K] from -8 to 7, scales fp16 [N]; 0 in `columns` [S]."""
    rest = weight.clone()
    rest[:, columns] = 0
    scale = (rest.abs().amax(1).float() / INT4_DIVISOR).half()
    return _rounded_quotient(rest, scale).nan_to_num(0).clamp(-8, 7).to(torch.int8), scale


def _rounded_quotient(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale.float()[:, None]).half().double().round()


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes -8..7 [R, K], K even, as uint8 [R, K / 2], the even column in the low nibble."""
    nibbles = codes.to(torch.uint8) & 15
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def calibrated_columns(act_scales: Tensor) -> Tensor:
    """The CALIBRATED columns with the largest calibrated max|x| [K], int64, the largest last."""
    return act_scales.sort(stable=True).indices[-CALIBRATED:]


class MixqLinear:
    """MixQ's linear layer of the published code, to the bit: y = integer part + 16-bit outlier columns.

    It keeps state from call to call as the original does: the list of outlier columns grows during the
    first two calls and is fixed afterwards. Unlike the original it leaves x unchanged.

    Attributes:
        slots: outlier columns, calibrated ones first, then in order of discovery (int64 [S]).
        outlier_weights: fp16 [N, S], their weights: the originals of calibrated columns, half(code * scale)
            of those found later.
        weight_codes, weight_scales: int8 [N, K] and fp16 [N]; `pack_int4` is how 4-bit codes are stored.
        codes: int8 [M, K] of the last call's activations.
        scales: fp16 [M] of the last call's activations.

    """

    def __init__(
        self,
        weight: Tensor,
        bits: int = 8,
        mode: str = "reference",
        *,
        columns: Tensor | None = None,
        act_scales: Tensor | None = None,
    ) -> None:
        """Quantise a weight.

        Args:
            weight: fp16 [N, K].
            bits: 8, or 4 for weights and activations.
            mode: "reference" learns columns in the first two calls; "static", the later form for vLLM and
                TensorRT-LLM, has the calibrated ones for ever.
            columns: calibrated outlier columns [S], in order; 4 bits and the static mode need them.
            act_scales: calibrated max|x| of every column [K], from which columns are chosen.

        """
        if bits not in (4, 8) or mode not in ("reference", "static"):
            raise UserError(
                f"MixqLinear(bits={bits}, mode={mode!r}); allowed: bits 4 or 8, mode reference or static"
            )
        if weight.dtype != torch.float16 or weight.dim() != 2:
            raise UserError(f"weight must be fp16 [N, K], not {weight.dtype} {list(weight.shape)}")
        self.levels = 127 if bits == 8 else 7
        self.slots = _calibrated(weight.shape[1], bits == 4 or mode == "static", columns, act_scales)
        if bits == 8:
            self.weight_codes, self.weight_scales = quantize_rows_fp16(weight, 127)
        else:
            self.weight_codes, self.weight_scales = quantize_weight_int4(weight, self.slots)
        self.outlier_weights = weight[:, self.slots]
        self.detecting = mode == "reference"
        self.calls = 0

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return fp16 [M, N] for x fp16 [M, K], detecting outlier columns in the first two calls."""
        self.quantize(x)
        out = self.multiply(x).half()
        return out if bias is None else (out + bias).half()

    def quantize(self, x: Tensor) -> None:
        """Set codes and scales for x, and learn from it if this is one of the first calls."""
        self._quantize(x)
        if not self.detecting:
            return
        threshold = (torch.tensor(SIGMA) / self.levels).half()
        if x.shape[0] and self.scales.max() > threshold:
            found = (x.abs() > SIGMA).any(0).nonzero()[:, 0]
            self.append(found[~torch.isin(found, self.slots)])
            self._quantize(x)
        self.calls += 1
        self.detecting = self.calls < LEARNING_CALLS and len(self.slots) <= CALIBRATED

    def append(self, columns: Tensor) -> None:
        """Take in new outlier columns [S]."""
        weights = (self.weight_codes[:, columns].float() * self.weight_scales.float()[:, None]).half()
        self.slots = torch.cat([self.slots, columns])
        self.outlier_weights = torch.cat([self.outlier_weights, weights], 1)

    def multiply(self, x: Tensor) -> Tensor:
        """Return x @ W^T for the x of `quantize`, fp32 [M, N] before its rounding to half."""
        exact = self.codes.double() @ self.weight_codes.double().T
        outliers = (x[:, self.slots].double() @ self.outlier_weights.double().T).half()
        scale = self.weight_scales.float()[None] * self.scales.float()[:, None]
        return exact.float() * scale + outliers.float()

    def _quantize(self, x: Tensor) -> None:
        rest = x.clone()
        rest[:, self.slots] = 0
        self.codes, self.scales = quantize_rows_fp16(rest, self.levels)


def _calibrated(k: int, needed: bool, columns: Tensor | None, act_scales: Tensor | None) -> Tensor:
    """The columns that a layer of width k starts with, int64; UserError if they are missing or unfit."""
    given = act_scales if columns is None else columns
    if (given is not None) != needed or (columns is not None and act_scales is not None):
        raise UserError("4 bits and mode='static' need columns= or act_scales=, one of them; 8 bits learn")
    if given is None:
        return torch.empty(0, dtype=torch.int64)
    if columns is None:
        if given.shape != (k,):
            raise UserError(f"act_scales must be [{k}], not {list(given.shape)}")
        return calibrated_columns(given)
    if given.dim() != 1 or given.is_floating_point() or not ((given >= 0) & (given < k)).all():
        raise UserError(f"columns must be a list of integers from 0 to {k - 1}")
    return given.long()


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """The norm before a fused layer: fp16 [M, K] for x, gamma fp16; fp32 inside, clamped to fp16's range."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gamma.float()
    limit = torch.finfo(torch.float16).max
    return y.clamp(-limit, limit).half()


class MlpValues(NamedTuple):
    """What a gated MLP computes on its way, all fp16."""

    up: Tensor
    gate: Tensor
    product: Tensor
    out: Tensor


class MixqMlp:
    """The fused gated MLP: `up` detects and quantises, `gate` reads the same codes and outlier list."""

    def __init__(self, up: MixqLinear, gate: MixqLinear, down: MixqLinear) -> None:
        self.up, self.gate, self.down = up, gate, down

    def __call__(self, x: Tensor) -> MlpValues:
        """Return every value for x fp16 [M, K], the output of `rms_norm`."""
        up, gate = self.up, self.gate
        up_out = up(x)
        gate.append(up.slots[len(gate.slots) :])
        gate.codes, gate.scales = up.codes, up.scales
        wide = gate.multiply(x)
        # numpy's exponential: the golden arrays hold values so near a tie that its last bit shows.
        with np.errstate(over="ignore"):
            gate_out = (wide / (1 + torch.from_numpy(np.exp(-wide.numpy())))).half()
        product = gate_out * up_out
        return MlpValues(up_out, gate_out, product, self.down(product))
