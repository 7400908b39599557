"""MixQ for vLLM: int8 weights and activations, outlier columns of the input in 16 bit (`mix8`), or
without them (`int8`).

Source: "MixQ: Taming Dynamic Outliers in Mixed-Precision Quantization by Online Prediction" (SC'24),
with three deliberate differences from the published code: scales are fp32 and codes are clamped, the
activations are never modified, and a column is an outlier relative to its row instead of above 6.0
(see `OutlierSlots`). The published rule to the bit is `lutserve.kernels.reference.MixqLinear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lutserve.compat import LinearMethodBase, in_dummy_run
from lutserve.kernels import library, mixq
from lutserve.kernels.reference import quantize_rows
from lutserve.methods import Method
from lutserve.quant_methods import int8_gemm, online
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.recipe import Group

#: a value is an outlier where it is above this many times the root mean square of its row's other columns
THRESHOLD = 10.0
#: What a column must gain to be worth a 16-bit product. The gain is the mean over rows of (x / rms)^2 above
#: THRESHOLD^2: the square of a row's int8 step goes with the square of its largest value, so this is how much
#: of it the column is to blame for. Frequent outliers gain, and rare ones that are very large.
GAIN = 0.1
#: rows without outliers that every layer is taken to have seen, so that a chance value gains nothing
PRIOR_ROWS = 4096
#: most times one call may look for outliers hidden behind the ones it has just found
ROUNDS = 4
#: most calls with outliers that are passed over between two that teach; the gaps double up to it
PATIENCE = 64


def capacity(k: int) -> int:
    """Most outlier columns a layer of input width k may have: k / 16, at least 64, at most 128 (and k)."""
    return min(k, max(64, min(128, k // 16)))


class OutlierSlots:
    """The outlier columns of one input, learnt while serving ("locality", section 4 of the paper).

    Every column has a gain, see GAIN; those that gain enough, at most `capacity`, are kept in 16 bit.
    Gains are learnt from calls that meet an unknown outlier, from fewer and fewer of them: learning costs
    more than the call itself. A column leaves when its gain falls below half of what it entered with.

    Attributes:
        index: int32 [S], S a multiple of 16; unused places hold -1.
        keep: int32 [ceil(K / 32)], bit k is 1 where column k stays in the int8 part.
        weight: [S, N] in the model's dtype, the weight rows of the columns of `index`, 0 where -1.
        count: how many columns there are.
        misses: calls that met an outlier in no known column.
    """

    def __init__(self, k: int, weight_rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Start empty; `weight_rows(columns)` must return the weight of columns [S] as [S, N]."""
        self.capacity = capacity(k)
        self.weight_rows = weight_rows
        self.excess = torch.zeros(k, dtype=torch.float32)
        self.rows = PRIOR_ROWS
        self.misses = self.waiting = self.patience = 0
        self.index, self.weight = torch.empty(0, dtype=torch.int32), torch.empty(0)
        self._publish(torch.empty(0, dtype=torch.int64))

    def wants(self) -> bool:
        """Count a call that meets an unknown outlier; return whether to learn from it."""
        self.misses += 1
        self.waiting -= 1
        return self.waiting < 0

    def learn(
        self, x: torch.Tensor, prepared: mixq.Prepared, prepare: Callable[[], mixq.Prepared]
    ) -> mixq.Prepared:
        """Learn from x [M, K], prepared with the known columns; return it with the new ones."""
        before, self.rows = self.excess, self.rows + len(x)
        for _ in range(ROUNDS):
            self.excess = before + self._excess(x, prepared)
            if not self._choose():
                break
            # Again, because a large outlier hides a smaller one behind the row's mean square.
            prepared = prepare()
        self.waiting = self.patience = min(2 * self.patience + 1, PATIENCE)
        return prepared

    def _excess(self, x: torch.Tensor, prepared: mixq.Prepared) -> torch.Tensor:
        """Return the sum over rows of ((x / rms)^2 - THRESHOLD^2), where positive, by column [K]."""
        _, scales, side, ratios, _ = prepared
        rms = 127.0 * scales / ratios[:, None]
        above = ratios > THRESHOLD
        excess = ((x[above].float() / rms[above]).square_() - THRESHOLD**2).clamp_min_(0).sum(0)
        known = ((side.float() / rms).square_() - THRESHOLD**2).clamp_min_(0).nan_to_num_(0, 0, 0).sum(0)
        taken = self.index >= 0
        excess[self.index[taken].long()] = known[taken]
        return excess.nan_to_num_(0, 0, 0)

    def _choose(self) -> bool:
        """Publish the columns that gain enough; return whether they are others than before."""
        known = self.index[self.index >= 0].long()
        # Twice the gain for a place already held: what is near the limit must not come and go.
        gain = self.excess.index_add(0, known, self.excess[known])
        enough = int((gain >= GAIN * self.rows).sum())
        columns = gain.topk(min(self.capacity, enough)).indices.sort().values
        if torch.equal(columns, known):
            return False
        self._publish(columns)
        return True

    def _publish(self, columns: torch.Tensor) -> None:
        k = self.excess.numel()
        mask = torch.ones(-(-k // 32) * 32, dtype=torch.int64)
        mask[columns] = 0
        words = (mask.view(-1, 32) << torch.arange(32)).sum(1)
        # Whole tiles of 16 columns keep the number of GEMM shapes small.
        index = torch.full((-(-len(columns) // 16) * 16,), -1, dtype=torch.int32)
        index[: len(columns)] = columns.to(torch.int32)
        # Rows that are held already are moved; reading one out of the packed weight costs a GEMM.
        same = (index[:, None] == self.index) & (index[:, None] >= 0)
        kept = same.any(1)
        fresh = self.weight_rows(index[~kept & (index >= 0)].long())
        weight = fresh.new_zeros(len(index), fresh.shape[1])
        weight[kept] = self.weight[same.int().argmax(1)[kept]] if kept.any() else fresh[:0]
        weight[~kept & (index >= 0)] = fresh
        self.keep = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        self.index, self.weight, self.count = index, weight, len(columns)


class MixqKernel:
    """One packed linear layer: quantised inputs, an int8 GEMM, and the outlier columns in 16 bit."""

    def __init__(self, weight: torch.Tensor, outliers: bool) -> None:
        """Quantise and pack `weight`, bf16 or fp16 [N, K], per output channel."""
        self.n, self.k = weight.shape
        self.dtype = weight.dtype
        self.gemm = int8_gemm.choose(*quantize_rows(weight), self.dtype)
        self.slots = OutlierSlots(self.k, self.gemm.columns)
        self.outliers = outliers

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ W^T + bias, [M, N], for x [M, K]; x is left unchanged."""
        slots = self.slots

        def prepare() -> mixq.Prepared:
            prepared: mixq.Prepared = mixq.prepare(x, slots.index, slots.keep)
            return prepared

        prepared = prepare()
        # One scalar tells whether any row has an unknown outlier; there is no device to wait for.
        if self.outliers and prepared[-1].item() > THRESHOLD and not in_dummy_run() and slots.wants():
            prepared = slots.learn(x, prepared, prepare)
        codes, scales, side, _, _ = prepared
        return self.gemm(codes, scales, side, slots.weight, bias)


#: kernels by layer name: torch.compile sees one opaque op with a string, never the state behind it
KERNELS: dict[str, MixqKernel] = {}


def _mixq_linear(x: torch.Tensor, bias: torch.Tensor | None, name: str, n: int) -> torch.Tensor:
    return KERNELS[name](x, bias)


def _mixq_linear_fake(x: torch.Tensor, bias: torch.Tensor | None, name: str, n: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], n)


class MixqLinearMethod(LinearMethodBase):
    """vLLM's side of a mix8 or int8 layer: loads a 16-bit weight and quantises it at load."""

    uses_meta_device = True

    def __init__(self, method: Method, report: LayerReport) -> None:
        self.method = method
        self.report = report

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
        n, k = sum(output_partition_sizes), input_size_per_partition
        online.create_weight(layer, n, k, params_dtype, extra["weight_loader"])

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Quantise, pack, and let the 16-bit weight go."""
        report, weight = self.report, online.take_weight(layer)
        if weight is None:
            return
        kernel = KERNELS[report.prefix] = MixqKernel(weight, outliers=self.method.name == "mix8")
        report.live = kernel.slots
        report.weights = kernel.n * kernel.k
        report.bits = 8 + 32 / kernel.k
        report.kernel = kernel.gemm.name
        REPORTS.finish(report)

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
    return MixqLinearMethod(method, report)


library.define(
    "mixq_linear(Tensor x, Tensor? bias, str name, int n) -> Tensor", _mixq_linear, _mixq_linear_fake
)
