"""The int8 GEMM under MixQ's layers: vLLM's prepacked one where it is exact and faster, else our own."""

from __future__ import annotations

from typing import Protocol

import torch

from lutserve.compat import vllm_ops
from lutserve.errors import UserError
from lutserve.kernels import int8, isa, library, mixq
from lutserve.kernels.pages import in_huge_pages


class Int8Gemm(Protocol):
    """One packed int8 weight [N, K] with a scale for each output channel."""

    #: what computes, for the start-up lines
    name: str

    def __call__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        side: torch.Tensor,
        outliers: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return codes @ W^T * scales + side @ outliers + bias, [M, N], for arguments as of `int8.linear`."""

    def columns(self, columns: torch.Tensor) -> torch.Tensor:
        """Return W[:, columns] transposed, [S, N]: code * scale, rounded once to the model's dtype.

        That is the published choice for outlier columns found at run time, and needs no copy of the weight.
        """


class FusedGemm:
    """`lutserve::int8_linear`: everything in one pass, so short inputs cost one read of the weight. Exact."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        """Pack codes int8 [N, K] with scales float32 [N]."""
        self.n, self.dtype = len(codes), dtype
        self.name = f"int8 {library.backend_for('int8_linear')}"
        self.packed = in_huge_pages(int8.pack(codes))
        self.scales = torch.zeros(len(self.packed) * int8.COLUMNS, dtype=torch.float32)
        self.scales[: self.n] = scales

    def __call__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        side: torch.Tensor,
        outliers: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """See Int8Gemm."""
        out: torch.Tensor = int8.linear(codes, scales, self.packed, self.scales, side, outliers, bias)
        return out

    def columns(self, columns: torch.Tensor) -> torch.Tensor:
        """See Int8Gemm."""
        return (int8.columns_of(self.packed, columns, self.n) * self.scales[: self.n]).to(self.dtype)


class OnednnGemm:
    """vLLM's prepacked oneDNN op, and a thin 16-bit GEMM for the outlier columns.

    Exact with AVX512-VNNI or AMX only: without them oneDNN adds pairs of products in int16, which saturates
    (255 * 127 + 255 * 127 is twice its range).
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        """Pack codes int8 [N, K] with scales float32 [N]."""
        (self.n, self.k), self.dtype = codes.shape, dtype
        self.name = f"int8 onednn + {library.backend_for('mixq_add_outliers')}"
        # The packed handle keeps only a pointer to the scales: they must live as long as it does.
        self.scales = scales[None].contiguous()
        self.handle = vllm_ops.create_onednn_scaled_mm(codes.t(), self.scales, dtype, True, False, 32)

    def _multiply(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty((len(codes), self.n), dtype=self.dtype)
        vllm_ops.onednn_scaled_mm(self.handle, codes, out, scales, None, None, bias)
        return out

    def __call__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        side: torch.Tensor,
        outliers: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """See Int8Gemm."""
        out = self._multiply(codes, scales, bias)
        if not len(outliers):
            return out
        # torch's bf16 GEMM wins from about a dozen rows on; its fp16 GEMM never does without AMX-FP16.
        if self.dtype == torch.bfloat16 and len(out) > 8:
            return out.addmm_(side, outliers)
        mixq.add_outliers(out, side, outliers)
        return out

    def columns(self, columns: torch.Tensor) -> torch.Tensor:
        """See Int8Gemm."""
        if not len(columns):
            return torch.empty((0, self.n), dtype=self.dtype)
        # One-hot activations pick the columns out of a weight that only oneDNN can read.
        onehot = torch.zeros((len(columns), self.k), dtype=torch.int8)
        onehot[torch.arange(len(columns)), columns] = 1
        return self._multiply(onehot, torch.ones(len(columns), 1, dtype=torch.float32), None)


class CutlassGemm:
    """vLLM's CUTLASS GEMM for CUDA, and cuBLAS for the outlier columns; for few rows `int8_linear_rows`."""

    #: rows up to which one launch wins over two GEMMs
    FEW = 64

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        """Take codes int8 [N, K] with scales float32 [N] as they are."""
        self.weight, self.scales, self.dtype = codes.contiguous(), scales[:, None].contiguous(), dtype
        # CUTLASS has int8 up to Hopper.
        self.cutlass = torch.cuda.get_device_capability(codes.device)[0] < 10
        ours = f"int8 {library.backend_for('int8_linear_rows')}"
        self.name = f"{ours}, cutlass + cublas above {self.FEW} rows" if self.cutlass else ours

    def __call__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        side: torch.Tensor,
        outliers: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """See Int8Gemm."""
        if len(codes) <= self.FEW or not self.cutlass:
            fused: torch.Tensor = int8.linear_rows(
                codes, scales, self.weight, self.scales, side, outliers, bias
            )
            return fused
        out: torch.Tensor = vllm_ops.cutlass_scaled_mm(
            codes, self.weight.t(), scales, self.scales, self.dtype, bias
        )
        return out.addmm_(side, outliers) if len(outliers) else out

    def columns(self, columns: torch.Tensor) -> torch.Tensor:
        """See Int8Gemm."""
        return (self.weight[:, columns] * self.scales).t().to(self.dtype)


def choose(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> Int8Gemm:
    """Pack a weight, int8 [N, K] with scales float32 [N], for the fastest exact int8 GEMM of this machine.

    UserError if K is above `int8.MOST_COLUMNS`.
    """
    if (k := codes.shape[1]) > int8.MOST_COLUMNS:
        raise UserError(
            f"int8 and mix8 take at most {int8.MOST_COLUMNS} input columns, this layer has {k}; "
            "choose another method for it"
        )
    if codes.is_cuda:
        return CutlassGemm(codes, scales, dtype)
    # Ours has no AMX tiles, which win; and on a CPU with VNNI but without BF16 ours is compiled without VNNI.
    better = onednn_is_exact() and library.backend_for("int8_linear") != "cpu/avx512_bf16"
    return (OnednnGemm if better else FusedGemm)(codes, scales, dtype)


def onednn_is_exact() -> bool:
    """Whether oneDNN's int8 sums are exact on this CPU.

    AVX-VNNI alone (hybrid desktop CPUs) has exact instructions too, but whether oneDNN takes them for every
    shape has not been checked, so the answer is no.
    """
    return "avx512_vnni" in isa.cpu_flags()
