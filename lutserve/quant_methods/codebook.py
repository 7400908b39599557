"""4-bit codebook formats for vLLM: every name of `lutserve.formats`, through one look-up GEMM.

Weights come from a folder made by `lutserve quantize`, or are rounded to nearest while a 16-bit checkpoint
loads. `+a8` also quantises the activations to int8, by token and group, for an integer GEMM; `+a4` rounds
them to the weights' own format first, for studies (plain torch, so not fast).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lutserve.checkpoint import CODEBOOK, PACKED, SCALE, unpack
from lutserve.compat import (
    BasevLLMParameter,
    GroupQuantScaleParameter,
    LinearMethodBase,
    PackedvLLMParameter,
    register_weight_loader_v2_supported_method,
)
from lutserve.errors import UserError
from lutserve.kernels import library, lut_gemm
from lutserve.kernels.pages import in_huge_pages
from lutserve.methods import Method
from lutserve.quant_methods import online
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.quantizers import quantize_activations, rtn
from lutserve.recipe import Group

#: codes uint8 [rows, K] and scales fp32 [rows, G] of some rows of a weight
Piece = tuple[torch.Tensor, torch.Tensor]
#: what the checkpoint holds of a layer
_STORED = (PACKED, SCALE, CODEBOOK)
#: elements quantised or packed at once: a bound on memory that is needed for a moment
_PIECE = 1 << 22


def _rows(k: int) -> int:
    """Rows of a piece, whole panels of the kernel."""
    return max(1, _PIECE // (k * lut_gemm.COLUMNS)) * lut_gemm.COLUMNS


class TableParameter(BasevLLMParameter):
    """The table of every part of a fused layer, [parts, 16]; none of it is split between devices."""

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """Take the table of a layer that is not fused."""
        self.data.copy_(loaded_weight.expand_as(self.data))

    load_row_parallel_weight = load_column_parallel_weight

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        """Take the table of one part."""
        self.data[self._shard_id_as_int(kwargs["shard_id"])].copy_(loaded_weight)

    load_qkv_weight = load_merged_column_weight


@register_weight_loader_v2_supported_method
class CodebookLinearMethod(LinearMethodBase):
    """vLLM's side of a codebook layer."""

    def __init__(self, method: Method, group: Group, report: LayerReport) -> None:
        self.format = group.codebook
        self.a8, self.a4 = method.activations == 8, method.activations == 4
        self.stored, self.group_size = group.stored, group.group_size
        self.uses_meta_device = not group.stored
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
        """Register what the checkpoint holds: the 16-bit weight, or indices, scales and tables."""
        n, k, loader = sum(output_partition_sizes), input_size_per_partition, extra["weight_loader"]
        parts = len(output_partition_sizes)
        self.n, self.k = n, k
        self._check(k, input_size)
        group = self.group_size = k if self.group_size == -1 else min(self.group_size, k)
        if not self.stored:
            online.create_weight(layer, n, k, params_dtype, loader)
            return
        indices, scales = torch.empty(n, -(-k // 2), dtype=torch.uint8), torch.empty(n, -(-k // group))
        layer.register_parameter(
            PACKED,
            PackedvLLMParameter(
                data=indices, input_dim=1, output_dim=0, packed_dim=1, packed_factor=2, weight_loader=loader
            ),
        )
        layer.register_parameter(
            SCALE,
            GroupQuantScaleParameter(
                data=scales.to(torch.float32), input_dim=1, output_dim=0, weight_loader=loader
            ),
        )
        tables = torch.empty(parts, 16, dtype=torch.float32)
        layer.register_parameter(CODEBOOK, TableParameter(data=tables, weight_loader=loader))

    def _check(self, k: int, whole: int) -> None:
        """UserError for groups that the kernel cannot take, or that a tensor-parallel cut would split."""
        name, group = self.report.prefix, self.group_size
        if group % lut_gemm.OCTET and -1 < group < k:
            raise UserError(f"{name}: group_size {group} is not a multiple of {lut_gemm.OCTET}")
        if whole != k and (group == -1 or k % group or k % 2):
            raise UserError(
                f"{name}: {whole} input columns in {whole // k} tensor-parallel parts of {k} cut a group of "
                f"{whole if group == -1 else group}; choose another group size or another -tp"
            )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Quantise what is not quantised yet, pack, and let the loaded tensors go."""
        if self.stored:
            pieces, table = self._stored(layer)
            # vLLM's own code looks for one.
            layer.register_parameter("weight", torch.nn.Parameter(torch.empty(0), requires_grad=False))
        else:
            weight = online.take_weight(layer)
            if weight is None:
                return
            pieces, table = self._rounded(weight), torch.tensor(self.format.table, device=weight.device)
        packed, scales = [], []
        for codes, scale in pieces:
            packed.append(lut_gemm.pack(codes))
            scales.append(lut_gemm.pack_scales(scale))
        image = self.format.int8_table() if self.a8 else None
        by_panels = torch.cat(scales)
        if image:
            table, by_panels = table.new_tensor(image.values), by_panels * image.scale
        # As buffers: torch.compile then takes them for inputs, not for constants to copy.
        layer.register_buffer("lut_indices", in_huge_pages(torch.cat(packed)), persistent=False)
        layer.register_buffer("lut_scales", by_panels, persistent=False)
        layer.register_buffer("lut_table", table.to(torch.float32).view(1, 1, 16), persistent=False)
        report = self.report
        report.weights = self.n * self.k
        report.bits = 4 + 8 * by_panels.nbytes / report.weights
        report.kernel = f"lut_gemm {library.backend_for('lut_gemm')}"
        if image and not image.exact:
            report.kernel += " (table rounded to int8)"
        REPORTS.finish(report)

    def _rounded(self, weight: torch.Tensor) -> Iterator[Piece]:
        for rows in weight.split(_rows(self.k)):
            quantized = rtn(rows, self.format, self.group_size)
            yield quantized.codes, quantized.scales

    def _stored(self, layer: torch.nn.Module) -> tuple[Iterator[Piece], torch.Tensor]:
        """Take indices, scales and the one table of a layer as `lutserve quantize` stored it."""
        packed, scales, tables = (layer.get_parameter(name).data for name in _STORED)
        for name in _STORED:
            delattr(layer, name)
        if not torch.equal(tables, tables[:1].expand_as(tables)):
            raise UserError(
                f"{self.report.prefix} is one fused layer but its parts have different tables, and the GEMM "
                "takes one; quantise all parts of a fused layer to one format"
            )
        if self.a8 and not torch.allclose(tables[0], tables.new_tensor(self.format.table), rtol=1e-6):
            raise UserError(
                f"{self.report.prefix}: stored table is not {self.format.name}'s; serve without +a8"
            )
        size = _rows(self.k)
        pairs = zip(packed.split(size), scales.split(size), strict=True)
        return ((unpack(rows, self.k), scale) for rows, scale in pairs), tables[0]

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x @ W^T + bias, [..., N], for x [..., K]."""
        if self.a4:
            # The published W4A4 is this: values rounded to the format, products in the model's precision.
            x = quantize_activations(x, self.format, self.group_size).to(x.dtype)
        out: torch.Tensor = lut_gemm.lut_gemm(
            x.reshape(1, -1, x.shape[-1]),
            layer.lut_indices,
            layer.lut_table,
            layer.lut_scales,
            None,
            self.group_size,
            self.n,
            bias,
            self.a8,
        )
        return out.view(*x.shape[:-1], self.n)


def linear_method(method: Method, group: Group, report: LayerReport) -> CodebookLinearMethod:
    """Return the vLLM linear method of one layer (called through the registry in `lutserve.methods`)."""
    return CodebookLinearMethod(method, group, report)
