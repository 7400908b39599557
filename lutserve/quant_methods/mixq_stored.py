"""Layers whose integers come from the checkpoint, in MixQ's layout (`lutserve.mixq_layout`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lutserve.checkpoint import unpack
from lutserve.compat import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    graph_rows,
    register_weight_loader_v2_supported_method,
)
from lutserve.errors import UserError
from lutserve.methods import Method
from lutserve.mixq_layout import KEPT, PLACES, SCALE, Stored, stored
from lutserve.quant_methods.codebook import TableParameter
from lutserve.quant_methods.config import LayerReport
from lutserve.quant_methods.int4_gemm import W4A4, W4A8
from lutserve.quant_methods.mixq import W8A8, Gemm, PackedLinear, PackedMethod, install
from lutserve.quant_methods.quik import QuikLinear
from lutserve.quantizers.outliers import OutlierSlots
from lutserve.recipe import Group


class UnusedParameter(BasevLLMParameter):
    """A tensor of the checkpoint that is left there."""

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """Take nothing."""

    load_row_parallel_weight = load_column_parallel_weight

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        """Take nothing."""

    load_qkv_weight = load_merged_column_weight


@register_weight_loader_v2_supported_method
class StoredMethod(PackedMethod):
    """Loads integers, scales and outlier columns."""

    layout: Stored

    def __init__(self, method: Method, group: Group, report: LayerReport, model: str) -> None:
        self.method, self.group, self.report, self.folder = method, group, report, Path(model)
        self.graph_rows = graph_rows()

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
        """Register what the checkpoint holds of this layer."""
        parts = self.report.parts or (self.report.prefix,)
        self.layout = layout = stored(self.folder, parts[0])
        if any(stored(self.folder, part) != layout for part in parts):
            raise UserError(f"{self.report.prefix}: its parts are stored in different ways in {self.folder}")
        n, k, loader = sum(output_partition_sizes), input_size_per_partition, extra["weight_loader"]
        self.dtype, self.k, self.parts = params_dtype, k, len(output_partition_sizes)
        codes = torch.empty(n, k, dtype=torch.int8) if layout.bits == 8 else torch.empty(n, k // 2).byte()
        parameters: dict[str, torch.nn.Parameter] = {
            layout.codes: ModelWeightParameter(data=codes, input_dim=1, output_dim=0, weight_loader=loader),
            SCALE: ChannelQuantScaleParameter(
                data=torch.empty(1, n, dtype=torch.float32), output_dim=1, weight_loader=loader
            ),
        }
        if layout.columns:
            kept = torch.empty(n, layout.columns, dtype=params_dtype)
            places = torch.empty(self.parts, layout.columns, dtype=torch.int32)
            parameters[KEPT] = ChannelQuantScaleParameter(data=kept, output_dim=0, weight_loader=loader)
            parameters[PLACES] = TableParameter(data=places, weight_loader=loader)
        for name in layout.unused:
            parameters[name] = UnusedParameter(data=torch.empty(0), weight_loader=loader)
        for name, parameter in parameters.items():
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack, and let the loaded tensors go."""
        # What is made on the way is made where the integers are.
        with layer.get_parameter(self.layout.codes).device:
            self._process(layer)

    def _process(self, layer: torch.nn.Module) -> None:
        layout = self.layout
        codes = layer.get_parameter(layout.codes)
        rank, scales = getattr(codes, "tp_rank", 0), layer.get_parameter(SCALE).data[0]
        columns, kept = self._columns(layer, rank)
        if layout.bits == 8:
            integers = codes.data
        else:
            nibbles = unpack(codes.data, self.k)
            integers = (nibbles ^ 8).to(torch.int8) - 8
        kernel: PackedLinear
        fixed = self.graph_rows > 0
        slots = OutlierSlots(
            self.k, lambda wanted: kept[torch.searchsorted(columns, wanted)], fixed, codes.device
        )
        slots.capacity = max(slots.capacity, len(columns))
        slots.hold(columns)
        if self.method.name == "quik4" and layout.bits == 4:
            kernel = QuikLinear(integers, scales, slots)
        else:
            gemm = self._gemm(integers, scales)
            slots.weight_rows = gemm.columns
            # Columns that the checkpoint names are all there will be: its 4-bit weights have nothing there.
            learning = self.group.outliers == "online" and self.method.outliers and not layout.columns
            outliers = bool(len(columns)) or learning
            kernel = PackedLinear(gemm, slots, len(integers), outliers, learning, self.graph_rows)
        for name in (layout.codes, SCALE, *layout.unused, *((KEPT, PLACES) if layout.columns else ())):
            delattr(layer, name)
        # vLLM's own code looks for one.
        layer.register_parameter("weight", torch.nn.Parameter(torch.empty(0), requires_grad=False))
        install(self.report, kernel, self.k)

    def _columns(self, layer: torch.nn.Module, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this device's outlier columns in ascending order, int64 [S], and their weights [S, N]."""
        if not self.layout.columns:
            n = layer.get_parameter(SCALE).shape[1]
            return torch.empty(0, dtype=torch.int64), torch.empty(0, n, dtype=self.dtype)
        places, kept = layer.get_parameter(PLACES).data.long(), layer.get_parameter(KEPT).data
        if not torch.equal(places, places[:1].expand_as(places)):
            raise UserError(f"{self.report.prefix}: its parts have different outlier columns, but one input")
        order = places[0].argsort()
        # Where the input is split between devices this one has its share of the columns.
        whole = layer.input_size == self.k
        columns = places[0][order] - (0 if whole else self.k * rank)
        here = (columns >= 0) & (columns < self.k)
        if whole and not (here.all() and (columns.diff() > 0).all()):
            raise UserError(f"{self.report.prefix}: {PLACES} is no list of different columns below {self.k}")
        return columns[here], kept[:, order[here]].t().contiguous()

    def _gemm(self, codes: torch.Tensor, scales: torch.Tensor) -> Gemm:
        if self.layout.bits == 8:
            return W8A8(codes, scales, self.dtype)
        if self.method.activations == 4:
            return W4A4(codes, scales, self.dtype)
        return W4A8((codes + 8).byte(), scales[:, None], self.dtype, self.k)
