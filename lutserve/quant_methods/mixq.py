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

from lutserve.compat import LinearMethodBase, current_model, graph_rows, in_dummy_run
from lutserve.errors import UserError
from lutserve.kernels import library, mixq
from lutserve.kernels.mixq_reference import SIGMA
from lutserve.kernels.reference import quantize_rows
from lutserve.layers import activation
from lutserve.methods import Method
from lutserve.quant_methods import int8_gemm, online
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.quant_methods.int4_gemm import W4A4, W4A8
from lutserve.quantizers.columns import Calibration, calibration_of
from lutserve.quantizers.integers import EIGHT_BITS
from lutserve.quantizers.outliers import THRESHOLD, OutlierSlots
from lutserve.recipe import Group


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

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        """Pack codes int8 [N, K] with scales fp32 [N] for a model of the given dtype."""
        self.gemm = int8_gemm.choose(codes, scales, dtype)
        self.name, self.bits = self.gemm.name, 8 + 32 / codes.shape[1]
        self.columns = self.gemm.columns

    @classmethod
    def rounded(cls, weight: torch.Tensor, dropped: torch.Tensor) -> W8A8:
        """Round a weight, bf16 or fp16 [N, K], all of it: `dropped` columns cost nothing here."""
        return cls(*quantize_rows(weight), weight.dtype)

    def __call__(
        self, x: torch.Tensor, prepared: mixq.Prepared, slots: OutlierSlots, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See Gemm."""
        codes, scales, side, _, _ = prepared
        return self.gemm(codes, scales, side, slots.weight, bias)


class PackedLinear:
    """One packed linear layer: quantised inputs, an integer GEMM, and the outlier columns in 16 bit."""

    def __init__(
        self, gemm: Gemm, slots: OutlierSlots, n: int, outliers: bool, learning: bool, graph_rows: int = 0
    ) -> None:
        """Put the parts together.

        Args:
            gemm: the packed weight.
            slots: the outlier columns.
            n: output columns.
            outliers: whether there are outlier columns.
            learning: whether there may be others than `slots` has now.
            graph_rows: rows of the longest input that a CUDA graph replays, from which nothing is learnt.

        """
        self.gemm, self.slots, self.n = gemm, slots, n
        self.outliers, self.learning, self.graph_rows = outliers, learning, graph_rows
        # An input that is prepared already, and what it was prepared to.
        self.ahead: tuple[torch.Tensor, mixq.Prepared] | None = None

    def gate(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Return `act_and_mul` of x [M, 2 K], the next input of this layer, and prepare it while in cache."""
        gated: mixq.Gated = mixq.gate_and_prepare(x, table, self.slots.index, self.slots.keep)
        self.ahead = gated[0], gated[1:]
        return gated[0]

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ W^T + bias, [M, N], for x [M, K]; x is left unchanged."""
        slots = self.slots

        def prepare() -> mixq.Prepared:
            prepared: mixq.Prepared = mixq.prepare(x, slots.index, slots.keep)
            return prepared

        ahead, self.ahead = self.ahead, None
        prepared = ahead[1] if ahead and ahead[0] is x else prepare()
        # One scalar tells whether any row has an unknown outlier. A GPU is waited for only where that pays.
        looks = self.outliers and (self.learning or x.is_cpu) and len(x) > self.graph_rows
        missed = looks and not in_dummy_run() and prepared[-1].item() > THRESHOLD
        if missed and slots.wants() and self.learning:
            prepared = slots.learn(x, prepared, prepare)
        return self.gemm(x, prepared, slots, bias)


class MixqKernel(PackedLinear):
    """A layer from its 16-bit weight."""

    def __init__(
        self,
        weight: torch.Tensor,
        outliers: bool,
        gain: torch.Tensor | None = None,
        static: bool = False,
        pack: Callable[[torch.Tensor, torch.Tensor], Gemm] = W8A8.rounded,
        graph_rows: int = 0,
    ) -> None:
        """Quantise and pack a weight.

        Args:
            weight: bf16 or fp16 [N, K].
            outliers: whether there are outlier columns.
            gain: calibrated, fp32 [K], see `lutserve.quantizers.columns`.
            static: whether the calibrated columns are all there will ever be.
            pack: makes the GEMM from the weight and the columns that it need not hold.
            graph_rows: see `PackedLinear`.

        """
        n, k = weight.shape
        # Calibrated columns are kept as the checkpoint has them, those found later as the GEMM has them.
        slots = OutlierSlots(k, lambda columns: weight[:, columns].t(), graph_rows > 0, weight.device)
        if gain is not None:
            slots.seed(gain)
        gemm = pack(weight, slots.columns if static else slots.columns[:0])
        slots.weight_rows = gemm.columns
        super().__init__(gemm, slots, n, outliers, not static, graph_rows)


class LlmInt8Kernel(MixqKernel):
    """LLM.int8's rule (arXiv 2208.07339): in every call the columns with any |x| > 6, and no others."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See MixqKernel."""
        slots = self.slots
        slots.hold((x.abs() > SIGMA).any(0).nonzero()[:, 0])
        return self.gemm(x, mixq.prepare(x, slots.index, slots.keep), slots, bias)


#: kernels by layer name: torch.compile sees one opaque op with a string, never the state behind it
KERNELS: dict[str, PackedLinear] = {}


def _mixq_linear(x: torch.Tensor, bias: torch.Tensor | None, name: str, n: int) -> torch.Tensor:
    return KERNELS[name](x, bias)


def _mixq_linear_fake(x: torch.Tensor, bias: torch.Tensor | None, name: str, n: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], n)


def install(report: LayerReport, kernel: PackedLinear, k: int) -> None:
    """Let a layer with k input columns be served by a kernel, and report it."""
    KERNELS[report.prefix] = kernel
    # Methods that look at the input themselves have no use for what `gate` prepares.
    if type(kernel).__call__ is PackedLinear.__call__:
        activation.READERS[report.prefix] = kernel.gate
    report.live = kernel.slots
    report.weights = kernel.n * k
    report.bits, report.kernel = kernel.gemm.bits, kernel.gemm.name
    REPORTS.finish(report)


class PackedMethod(LinearMethodBase):
    """vLLM's side of a layer that is served by KERNELS[report.prefix]."""

    report: LayerReport

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x @ W^T + bias, [..., N], for x [..., K]."""
        kernel = KERNELS[self.report.prefix]
        # The very tensor where it can be: it may have been prepared already.
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():
            out: torch.Tensor = torch.ops.lutserve.mixq_linear(flat, bias, self.report.prefix, kernel.n)
        else:
            out = kernel(flat, bias)
        return out.view(*x.shape[:-1], kernel.n)


class MixqLinearMethod(PackedMethod):
    """Loads a 16-bit weight and quantises it at load."""

    uses_meta_device = True

    def __init__(
        self, method: Method, group: Group, report: LayerReport, calibration: Calibration | None
    ) -> None:
        self.method, self.group, self.report = method, group, report
        self.calibration = calibration
        self.graph_rows = graph_rows()
        if self.graph_rows and method.name == "llm-int8":
            raise UserError(
                "llm-int8 chooses columns in every call, which no CUDA graph can hold; add --enforce-eager"
            )

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
            gain = gain.narrow(0, k * rank if k < self.input_size else 0, k).to(weight.device)
        static = self.method.outliers and self.group.outliers == "static"
        try:
            kind = LlmInt8Kernel if self.method.name == "llm-int8" else MixqKernel
            # What is made on the way is made where the weight is.
            with weight.device:
                kernel = kind(weight, self.method.outliers, gain, static, self._pack, self.graph_rows)
        except UserError as error:
            raise UserError(f"{report.prefix}: {error}") from None
        install(report, kernel, weight.shape[1])

    def _pack(self, weight: torch.Tensor, dropped: torch.Tensor) -> Gemm:
        if not self.method.format or self.report.group in EIGHT_BITS:
            return W8A8.rounded(weight, dropped)
        if self.method.activations == 4:
            return W4A4.rounded(weight, dropped)
        return W4A8.rounded(weight, dropped, self.group.group_size)


def linear_method(method: Method, group: Group, report: LayerReport) -> PackedMethod:
    """Return the vLLM linear method of one layer (called through the registry in `lutserve.methods`)."""
    if group.stored:
        from lutserve.quant_methods.mixq_stored import StoredMethod

        return StoredMethod(method, group, report, current_model())
    return MixqLinearMethod(method, group, report, calibration_of(group, current_model()))


library.define(
    "mixq_linear(Tensor x, Tensor? bias, str name, int n) -> Tensor", _mixq_linear, _mixq_linear_fake
)
