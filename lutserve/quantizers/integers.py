"""Weights as MixQ's layout holds them: integers by rows, and outlier columns in 16 bit.

Sources: MixQ (SC'24), and QUIK (arXiv 2310.09259): GPTQ that visits the outlier columns last and leaves them
as they are by then, so that they make up for the errors of all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lutserve.kernels.mixq_reference import CALIBRATED, pack_int4, quantize_weight_int4
from lutserve.kernels.reference import quantize_rows
from lutserve.methods import Method
from lutserve.mixq_layout import CODES, KEPT, PLACES, SCALE
from lutserve.quantizers.gptq import inverse_factor, sweep

#: layers that are 8-bit in a 4-bit model, because their input is the hardest to quantise
EIGHT_BITS = ("down_proj", "fc_out", "dense_4h_to_h")
#: columns that QUIK keeps; more than a quarter of a layer's is no method for outliers any more
_QUIK_COLUMNS = 256
_LARGEST_SHARE = 4


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight [N, K].

    codes: int8 [N, K], from -8 to 7 where bits is 4; 4-bit ones are 0 in the outlier columns.
    scales: fp32 [N].
    bits: 8 or 4.
    columns: outlier columns in ascending order, int64 [S].
    kept: fp32 [N, S], their weights.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    columns: Tensor
    kept: Tensor

    def dequantize(self) -> Tensor:
        """Return code * scale, and what is kept, fp32 [N, K]."""
        return (self.codes * self.scales[:, None]).index_copy_(1, self.columns, self.kept)

    def tensors(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what the checkpoint holds of the layer `name`; `dtype` is that of the outlier columns."""
        found = {
            f"{name}.{CODES}": self.codes if self.bits == 8 else pack_int4(self.codes),
            f"{name}.{SCALE}": self.scales[None].contiguous(),
        }
        if len(self.columns):
            found[f"{name}.{KEPT}"] = self.kept.to(dtype).contiguous()
            found[f"{name}.{PLACES}"] = self.columns.int()
        return found


def quantize(
    method: Method, layer: str, weight: Tensor, absmax: Tensor | None, hessian: Tensor | None, damping: float
) -> IntegerWeight:
    """Quantise a weight as a method of `mixq_layout.WRITTEN` stores it.

    Args:
        method: the method.
        layer: last part of the layer's name.
        weight: fp32 [N, K], K even.
        absmax: fp32 [K], largest |x| of the input's columns; for the methods with outlier columns.
        hessian: fp32 [K, K], sum of x x^T; for quik4.
        damping: of GPTQ, see `gptq`.

    """
    k = weight.shape[1]
    columns = torch.empty(0, dtype=torch.int64)
    if method.name != "int8":
        assert absmax is not None
        count = min(_QUIK_COLUMNS if method.offline else CALIBRATED, k // _LARGEST_SHARE)
        columns = absmax.topk(count).indices.sort().values
    if not method.format or layer in EIGHT_BITS or k % 2:
        codes, scales = quantize_rows(weight)
        return IntegerWeight(codes, scales, 8, columns, weight[:, columns])
    if not method.offline:
        codes, scales = quantize_weight_int4(weight.half(), columns)
        return IntegerWeight(codes, scales.float(), 4, columns, weight[:, columns])
    assert hessian is not None
    return quik(weight, hessian, columns, damping)


def quik(weight: Tensor, hessian: Tensor, columns: Tensor, damping: float = 0.01) -> IntegerWeight:
    """Round a weight to int4 by GPTQ, the outlier columns last and unrounded.

    Args:
        weight: fp32 [N, K].
        hessian: fp32 [K, K], sum or mean of x x^T over the calibration inputs.
        columns: int64 [S], ascending.
        damping: share of the mean diagonal added to it.

    Raises:
        UserError: no damping makes the hessian positive definite.

    """
    hessian = hessian.float().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    priority = hessian.diagonal().clone()
    priority[columns] = -1
    order = priority.argsort(descending=True, stable=True)
    w = weight.float().t().contiguous()
    w[dead] = 0
    w, rest = w[order], len(w) - len(columns)
    factor = inverse_factor(hessian[order][:, order], damping)
    scales = w[:rest].abs().amax(0) / 7
    step = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = torch.zeros(w.shape, dtype=torch.int8)

    def visit(i: int, column: Tensor) -> Tensor:
        whole = (column / step).round_().clamp_(-8, 7)
        codes[i] = whole.to(torch.int8)
        return whole * scales

    sweep(w, factor, rest, 128, visit)
    current = torch.empty_like(w).index_copy_(0, order, w)
    placed = torch.zeros_like(codes).index_copy_(0, order, codes)
    return IntegerWeight(placed.t().contiguous(), scales, 4, columns, current[columns].t().contiguous())
