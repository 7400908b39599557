"""MixQ for vLLM: integer weights and activations, outlier columns of the input in 16 bit (`mix8`, `mix4`),
without them (`int8`), or by LLM.int8's rule (`llm-int8`).

Source: "MixQ: Taming Dynamic Outliers in Mixed-Precision Quantization by Online Prediction" (SC'24),
with three deliberate differences from the published code: scales are fp32 and codes are clamped, the
activations are never modified, and a column is an outlier relative to its row instead of above 6.0
(see `OutlierSlots`). The published rule to the bit is `lutserve.kernels.reference.MixqLinear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from lutserve.compat import LinearMethodBase, current_model, in_dummy_run
from lutserve.errors import UserError
from lutserve.kernels import library, mixq
from lutserve.kernels.mixq_reference import SIGMA
from lutserve.kernels.reference import quantize_rows
from lutserve.methods import Method
from lutserve.quant_methods import int8_gemm, online
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.quant_methods.int4_gemm import W4A4, W4A8
from lutserve.quantizers.columns import Calibration, calibration_of
from lutserve.quantizers.outliers import THRESHOLD, OutlierSlots
from lutserve.recipe import Group

#: layers that are 8-bit in a 4-bit model, because their input is the hardest to quantise
EIGHT_BITS = ("down_proj", "fc_out", "dense_4h_to_h")


class Gemm(Protocol):
    """A packed weight."""

    #: what computes, for the start-up lines
    name: str
    #: stored bits a weight, scales included
    bits: float

    def __call__(
        self, x: torch.Tensor, prepared: mixq.Prepared, slots: OutlierSlots, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x @ W^T + bias, [M, N], for x [M, K] and what `mixq.prepare` makes of it."""

    def columns(self, columns: torch.Tensor) -> torch.Tensor:
        """Return W[:, columns] transposed, [S, N], in the model's dtype."""


class W8A8:
    """int8 weights and activations, one scale a row of each."""

    def __init__(self, weight: torch.Tensor, dropped: torch.Tensor) -> None:
        """Pack a weight, bf16 or fp16 [N, K], all of it: `dropped` columns cost nothing here."""
        self.gemm = int8_gemm.choose(*quantize_rows(weight), weight.dtype)
        self.name, self.bits = self.gemm.name, 8 + 32 / weight.shape[1]
        self.columns = self.gemm.columns

    def __call__(
        self, x: torch.Tensor, prepared: mixq.Prepared, slots: OutlierSlots, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See Gemm."""
        codes, scales, side, _, _ = prepared
        return self.gemm(codes, scales, side, slots.weight, bias)


class MixqKernel:
    """One packed linear layer: quantised inputs, an integer GEMM, and the outlier columns in 16 bit."""

    def __init__(
        self,
        weight: torch.Tensor,
        outliers: bool,
        gain: torch.Tensor | None = None,
        static: bool = False,
        pack: Callable[[torch.Tensor, torch.Tensor], Gemm] = W8A8,
    ) -> None:
        """Quantise and pack a weight.

        Args:
            weight: bf16 or fp16 [N, K].
            outliers: whether there are outlier columns.
            gain: calibrated, fp32 [K], see `lutserve.quantizers.columns`.
            static: whether the calibrated columns are all there will ever be.
            pack: makes the GEMM from the weight and the columns that it need not hold.

        """
        self.n, self.k = weight.shape
        self.dtype = weight.dtype
        # Calibrated columns are kept as the checkpoint has them, those found later as the GEMM has them.
        self.slots = OutlierSlots(self.k, lambda columns: weight[:, columns].t())
        if gain is not None:
            self.slots.seed(gain)
        self.gemm = pack(weight, self.slots.columns if static else torch.empty(0, dtype=torch.int64))
        self.slots.weight_rows = self.gemm.columns
        self.outliers, self.learning = outliers, not static

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ W^T + bias, [M, N], for x [M, K]; x is left unchanged."""
        slots = self.slots

        def prepare() -> mixq.Prepared:
            prepared: mixq.Prepared = mixq.prepare(x, slots.index, slots.keep)
            return prepared

        prepared = prepare()
        # One scalar tells whether any row has an unknown outlier; there is no device to wait for.
        missed = self.outliers and prepared[-1].item() > THRESHOLD and not in_dummy_run()
        if missed and slots.wants() and self.learning:
            prepared = slots.learn(x, prepared, prepare)
        return self.gemm(x, prepared, slots, bias)


class LlmInt8Kernel(MixqKernel):
    """LLM.int8's rule (arXiv 2208.07339): in every call the columns with any |x| > 6, and no others."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See MixqKernel."""
        slots = self.slots
        slots.hold((x.abs() > SIGMA).any(0).nonzero()[:, 0])
        return self.gemm(x, mixq.prepare(x, slots.index, slots.keep), slots, bias)


#: kernels by layer name: torch.compile sees one opaque op with a string, never the state behind it
KERNELS: dict[str, MixqKernel] = {}


def _mixq_linear(x: torch.Tensor, bias: torch.Tensor | None, name: str, n: int) -> torch.Tensor:
    return KERNELS[name](x, bias)


def _mixq_linear_fake(x: torch.Tensor, bias: torch.Tensor | None, name: str, n: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], n)


class MixqLinearMethod(LinearMethodBase):
    """vLLM's side of a MixQ layer: loads a 16-bit weight and quantises it at load."""

    uses_meta_device = True

    def __init__(
        self, method: Method, group: Group, report: LayerReport, calibration: Calibration | None
    ) -> None:
        self.method, self.group, self.report = method, group, report
        self.calibration = calibration

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register the 16-bit weight [sum(out), in] that the checkpoint's (fused) shards load into."""
        self.input_size = input_size
        n, k = sum(output_partition_sizes), input_size_per_partition
        online.create_weight(layer, n, k, params_dtype, extra["weight_loader"])

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantise, pack, and let the 16-bit weight go."""
        report, gain, rank = self.report, None, getattr(layer.weight, "tp_rank", 0)
        weight = online.take_weight(layer)
        if weight is None:
            return
        if self.calibration:
            gain = self.calibration.gain(report.prefix, report.parts, self.input_size)
            # Where the input is split between devices this one has its share of the columns.
            k = weight.shape[1]
            gain = gain.narrow(0, k * rank if k < self.input_size else 0, k)
        static = self.method.outliers and self.group.outliers == "static"
        try:
            kind = LlmInt8Kernel if self.method.name == "llm-int8" else MixqKernel
            kernel = kind(weight, self.method.outliers, gain, static, self._pack)
        except UserError as error:
            raise UserError(f"{report.prefix}: {error}") from None
        KERNELS[report.prefix] = kernel
        report.live = kernel.slots
        report.weights = kernel.n * kernel.k
        report.bits = kernel.gemm.bits
        report.kernel = kernel.gemm.name
        REPORTS.finish(report)

    def _pack(self, weight: torch.Tensor, dropped: torch.Tensor) -> Gemm:
        if not self.method.format or self.report.group in EIGHT_BITS:
            return W8A8(weight, dropped)
        if self.method.activations == 4:
            return W4A4(weight, dropped)
        return W4A8(weight, dropped, self.group.group_size)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x @ W^T + bias, [..., N], for x [..., K]."""
        kernel = KERNELS[self.report.prefix]
        flat = x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():
            out: torch.Tensor = torch.ops.lutserve.mixq_linear(flat, bias, self.report.prefix, kernel.n)
        else:
            out = kernel(flat, bias)
        return out.view(*x.shape[:-1], kernel.n)


def linear_method(method: Method, group: Group, report: LayerReport) -> MixqLinearMethod:
    """Return the vLLM linear method of one layer (called through the registry in `lutserve.methods`)."""
    return MixqLinearMethod(method, group, report, calibration_of(group, current_model()))


library.define(
    "mixq_linear(Tensor x, Tensor? bias, str name, int n) -> Tensor", _mixq_linear, _mixq_linear_fake
)
