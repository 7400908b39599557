"""QUIK (arXiv 2310.09259) for vLLM: int4 weights by GPTQ, int4 activations with an offset, columns in 16 bit.

The integers are multiplied as int8, because CPUs multiply no narrower ones: the accuracy is QUIK's, speed and
memory those of `int8`. `lutserve.kernels.mixq_baselines.quik` is MixQ's port of it to the bit.
"""

from __future__ import annotations

import torch

from lutserve.kernels.mixq import Prepared
from lutserve.quant_methods import int8_gemm
from lutserve.quant_methods.mixq import PackedLinear
from lutserve.quantizers.outliers import OutlierSlots

#: least step of the activations, as published
_LEAST = 1e-6


class W4A4Offset:
    """int4 weights without the outlier columns, activations int4 by row between their least and largest."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, slots: OutlierSlots) -> None:
        """Pack codes int8 [N, K] from -8 to 7 with scales fp32 [N]; `slots` holds the outlier columns."""
        inside = torch.ones(codes.shape[1], dtype=torch.bool)
        inside[slots.columns] = False
        self.inside, rest = inside.nonzero()[:, 0], codes[:, inside]
        self.gemm = int8_gemm.choose(rest.contiguous(), scales, slots.weight.dtype)
        self.sums = rest.sum(1) * scales
        self.name, self.bits = f"quik {self.gemm.name}", 8 + 64 / codes.shape[1]

    def __call__(
        self, x: torch.Tensor, prepared: Prepared | None, slots: OutlierSlots, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x @ W^T + bias, [M, N], for x [M, K]."""
        rest = x.index_select(1, self.inside).float()
        least, most = torch.aminmax(rest, dim=1, keepdim=True)
        step = ((most - least) / 15).clamp_min_(_LEAST)
        codes = (rest - least).div_(step).round_().sub_(8).to(torch.int8)
        side = x.index_select(1, slots.columns)
        out = self.gemm(codes, step, side, slots.weight[: slots.count], bias)
        # x is (code + 8) * step + least, so what does not depend on the code meets the sum of the row.
        return out.float().addcmul_(least + 8 * step, self.sums).to(out.dtype)

    def columns(self, columns: torch.Tensor) -> torch.Tensor:
        """Return W[:, columns] transposed, [S, N], of columns that are not outlier columns."""
        return self.gemm.columns(torch.searchsorted(self.inside, columns))


class QuikLinear(PackedLinear):
    """A layer whose GEMM quantises its own input."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, slots: OutlierSlots) -> None:
        """See `W4A4Offset`."""
        self.quik = W4A4Offset(codes, scales, slots)
        super().__init__(self.quik, slots, len(codes), True, False)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See PackedLinear."""
        return self.quik(x, None, self.slots, bias)
