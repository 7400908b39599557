"""The 4-bit weights of MixQ's mix4: a look-up GEMM with int8 activations, and the published W4A4."""

from __future__ import annotations

import torch

from lutserve import formats
from lutserve.errors import UserError
from lutserve.kernels import library, lut_gemm, mixq
from lutserve.kernels.mixq_reference import quantize_weight_int4
from lutserve.kernels.pages import in_huge_pages
from lutserve.kernels.reference import quantize_rows
from lutserve.quantizers import rtn
from lutserve.quantizers.outliers import OutlierSlots


def without(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return x [R, K] with 0 in some columns int64 [S]; x is left as it is."""
    return x.index_fill(1, columns, 0) if len(columns) else x


class W4A8:
    """int4 weights by groups of columns, activations quantised to int8 by row and group."""

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, group_size: int
    ) -> None:
        """Pack indices of int4's values uint8 [N, K] with scales fp32 [N, ceil(K / group_size)]."""
        (self.n, self.k), self.dtype, self.group_size = codes.shape, dtype, group_size
        image = formats.get("int4").int8_table()
        self.packed = in_huge_pages(lut_gemm.pack(codes))
        self.scales = lut_gemm.pack_scales(scales * image.scale)
        self.table = torch.tensor(image.values, dtype=torch.float32).view(1, 1, 16)
        self.name = f"lut_gemm {library.backend_for('lut_gemm')}"
        self.bits = 4 + 8 * self.scales.nbytes / codes.numel()

    @classmethod
    def rounded(cls, weight: torch.Tensor, dropped: torch.Tensor, group_size: int) -> W4A8:
        """Round a weight, bf16 or fp16 [N, K]; `dropped` int64 [S] are columns that it need not hold."""
        k = weight.shape[1]
        group = k if group_size == -1 else min(group_size, k)
        if group % lut_gemm.OCTET and group < k:
            raise UserError(f"group_size {group_size} is not a multiple of {lut_gemm.OCTET}")
        quantized = rtn(without(weight, dropped), "int4", group_size)
        return cls(quantized.codes, quantized.scales, weight.dtype, group)

    def __call__(
        self, x: torch.Tensor, prepared: mixq.Prepared, slots: OutlierSlots, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x @ W^T + bias, [M, N], for x [M, K]."""
        out = self._multiply(slots.rest(x), bias, True)
        if len(slots.index):
            mixq.add_outliers(out, prepared[2], slots.weight)
        return out

    def columns(self, columns: torch.Tensor) -> torch.Tensor:
        """Return W[:, columns] transposed, [S, N]: code * scale, rounded once to the model's dtype."""
        onehot = torch.zeros((len(columns), self.k), dtype=self.dtype, device=columns.device)
        onehot.scatter_(1, columns[:, None], 1)
        return self._multiply(onehot, None, False)

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None, quantize: bool) -> torch.Tensor:
        out: torch.Tensor = lut_gemm.lut_gemm(
            x[None], self.packed, self.table, self.scales, None, self.group_size, self.n, bias, quantize
        )
        return out


class W4A4:
    """The published int4 weights and activations, one scale a row; safe fp32 scales for the activations."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        """Take codes int8 [N, K] from -8 to 7 and scales fp32 [N]."""
        self.codes, self.scales, self.dtype = codes, scales, dtype
        self.name, self.bits = "torch", 8 + 32 / codes.shape[1]

    @classmethod
    def rounded(cls, weight: torch.Tensor, dropped: torch.Tensor) -> W4A4:
        """Round a weight as published, see `W4A8.rounded`."""
        codes, scales = quantize_weight_int4(weight.half(), dropped)
        return cls(codes, scales.float(), weight.dtype)

    def __call__(
        self, x: torch.Tensor, prepared: mixq.Prepared, slots: OutlierSlots, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x @ W^T + bias, [M, N], for x [M, K]."""
        codes, scales = quantize_rows(slots.rest(x), levels=7)
        # Integers below 2^24, so exact in fp32.
        out = codes.float() @ self.codes.float().t() * (scales[:, None] * self.scales)
        out += prepared[2].float() @ slots.weight.float()
        return (out if bias is None else out + bias.float()).to(self.dtype)

    def columns(self, columns: torch.Tensor) -> torch.Tensor:
        """See W4A8."""
        return (self.codes[:, columns].t() * self.scales).to(self.dtype)
