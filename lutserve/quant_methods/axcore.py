"""Approximate multiplication for vLLM ("AxCore", MICRO'25, and its ablations): 4-bit floats times activations
by integer addition, and the same for two 16-bit operands (`fpma`, `lmul`).

Weights come from a folder of `lutserve quantize`, or are rounded while a 16-bit checkpoint loads: there each
block takes the format that is expected to cost least, because no calibration data is at hand. Two numerics:

fast    in the model's dtype (bf16 with the constants of bf16), sums in fp32, exact scales:
        `lutserve::lut_gemm` over classes of products, or where the processor has no fast 16-bit products
        `lutserve::axcore_fast`, product by product.
strict  `lutserve::axcore_strict`: fp16 and the published order of sums, whatever the model's dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from lutserve.checkpoint import PACKED, SCALE, TYPE, unpack
from lutserve.compat import (
    GroupQuantScaleParameter,
    LinearMethodBase,
    PackedvLLMParameter,
    register_weight_loader_v2_supported_method,
)
from lutserve.errors import UserError
from lutserve.kernels import activation, axcore, axcore_fast, isa, library, lut_gemm
from lutserve.kernels.axcore_reference import BLOCK, TILE, activation_maps, product_tables
from lutserve.kernels.pages import in_huge_pages
from lutserve.luts import fpma, fpma_classes
from lutserve.luts.bits import Format
from lutserve.luts.fpma import ARITHMETICS
from lutserve.methods import Method
from lutserve.quant_methods import online
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.quantizers.axcore import axcore as quantize_blocks
from lutserve.quantizers.fp4 import Fp4Weight, quantize
from lutserve.recipe import Group

#: methods with a 16-bit weight, and their compensation
UNIFORM = {"fpma": fpma.uniform(), "lmul": fpma.L_MUL["float16"]}


def _to_half(x: torch.Tensor) -> torch.Tensor:
    """In fp16; what is beyond its range, infinity included, becomes its largest number, and NaN stays."""
    limit = torch.finfo(torch.float16).max
    return x if x.dtype == torch.float16 else x.clamp(-limit, limit).half()


def by_addition(dtype: Format) -> bool:
    """Whether products are computed by addition: where exact ones are no faster."""
    return dtype in isa.slow_16_bit()


class _Loading(LinearMethodBase, ABC):
    """What loads a 16-bit weight and lets it go once it is packed."""

    def __init__(self, method: Method, group: Group, report: LayerReport) -> None:
        self.method, self.group, self.report = method, group, report
        self.group_size = group.group_size
        self.uses_meta_device = not group.stored

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
        self.check(output_partition_sizes, input_size_per_partition, input_size)
        self.n, self.k, self.dtype = sum(output_partition_sizes), input_size_per_partition, params_dtype
        self.create(layer, extra["weight_loader"])

    def create(self, layer: torch.nn.Module, loader: Callable[..., None]) -> None:
        """Register what the checkpoint holds."""
        online.create_weight(layer, self.n, self.k, self.dtype, loader)

    def check(self, parts: list[int], k: int, whole: int) -> None:
        """UserError for shapes that the method cannot take."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack, and let the 16-bit weight go."""
        weight = online.take_weight(layer)
        if weight is not None:
            self.device = weight.device
            # The search for formats runs on the CPU.
            self.finish(layer, self.pack(weight.cpu()))

    def finish(self, layer: torch.nn.Module, buffers: dict[str, Any]) -> None:
        """Register what the kernel reads, and report."""
        # As buffers: torch.compile then takes them for inputs, not for constants to copy.
        for name, tensor in buffers.items():
            moved = None if tensor is None else tensor.to(self.device)
            layer.register_buffer(f"axcore_{name}", moved, persistent=False)
        report = self.report
        report.weights = self.n * self.k
        stored = (buffers[name] for name in ("weight", "scales", "types") if buffers.get(name) is not None)
        report.bits = 8 * sum(tensor.nbytes for tensor in stored) / report.weights
        REPORTS.finish(report)

    @abstractmethod
    def pack(self, weight: torch.Tensor) -> dict[str, Any]:
        """Return the buffers of a layer, and name its kernel."""


@register_weight_loader_v2_supported_method
class AxcoreLinearMethod(_Loading):
    """vLLM's side of a layer with 4-bit weights and approximate products."""

    def check(self, parts: list[int], k: int, whole: int) -> None:
        """UserError for groups or blocks that do not fit the layer, or that a tensor-parallel cut splits."""
        name, group = self.report.prefix, self.group_size
        if group == -1 and whole != k:
            raise UserError(f"{name}: -tp cuts groups of all {whole} input columns; choose --group-size")
        self.group_size = group = k if group == -1 else group
        if group % lut_gemm.OCTET or k % group:
            raise UserError(
                f"{name}: groups of {group} do not fit {k} input columns; choose a --group-size that divides "
                f"them and is a multiple of {lut_gemm.OCTET}"
            )
        if len(ARITHMETICS[self.method.name].formats) > 1 and any(part % BLOCK for part in parts):
            raise UserError(
                f"{name}: {' + '.join(map(str, parts))} output rows are no multiples of {BLOCK}, the rows of "
                f"a block of {self.method.name}; give this layer another method in a recipe"
            )

    def create(self, layer: torch.nn.Module, loader: Callable[..., None]) -> None:
        """Register what the checkpoint holds: a 16-bit weight, or codes, scales and formats."""
        if not self.group.stored:
            return super().create(layer, loader)
        groups, both = self.k // self.group_size, {"input_dim": 1, "output_dim": 0, "weight_loader": loader}
        codes = torch.empty(self.n, self.k // 2, dtype=torch.uint8)
        scales = torch.empty(self.n, groups, dtype=torch.float16)
        types = torch.empty(self.n // BLOCK, groups, dtype=torch.uint8)
        parameters = {
            PACKED: PackedvLLMParameter(data=codes, packed_dim=1, packed_factor=2, **both),
            SCALE: GroupQuantScaleParameter(data=scales, **both),
            # One row for 64 of the weight: to vLLM that is packing.
            TYPE: PackedvLLMParameter(data=types, packed_dim=0, packed_factor=BLOCK, **both),
        }
        for name, parameter in parameters.items():
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack, and let the loaded tensors go."""
        if not self.group.stored:
            return super().process_weights_after_loading(layer)
        codes, scales, types = (layer.get_parameter(name).data for name in (PACKED, SCALE, TYPE))
        self.device = codes.device
        codes, scales, types = codes.cpu(), scales.cpu(), types.cpu()
        for name in (PACKED, SCALE, TYPE):
            delattr(layer, name)
        if types.max() >= len(fpma.FP4):
            raise UserError(
                f"{self.report.prefix}: {TYPE} holds {int(types.max())}; 0 to {len(fpma.FP4) - 1} is allowed"
            )
        # vLLM's own code looks for one.
        layer.register_parameter("weight", torch.nn.Parameter(torch.empty(0), requires_grad=False))
        weight = Fp4Weight(unpack(codes, self.k), scales, types, self.group_size)
        self.finish(layer, self.pack_rounded(weight))

    def pack(self, weight: torch.Tensor) -> dict[str, Any]:
        """Round, choose formats, and pack."""
        arithmetic, dequant = ARITHMETICS[self.method.name], self.group.dequant
        if len(arithmetic.formats) > 1:
            chosen = arithmetic.compensation
            rounded = quantize_blocks(weight, self.group_size, dequant, compensation=chosen)
        else:
            rounded = quantize(weight, arithmetic.formats[0].name, self.group_size, dequant)
        return self.pack_rounded(rounded)

    def pack_rounded(self, rounded: Fp4Weight) -> dict[str, Any]:
        """Pack for the numerics of the group."""
        arithmetic = ARITHMETICS[self.method.name]
        typed = len(arithmetic.formats) > 1
        types = rounded.types.repeat_interleave(BLOCK // lut_gemm.COLUMNS, 0) if typed else None
        buffers = {"weight": in_huge_pages(lut_gemm.pack(rounded.codes)), "types": types}
        options = arithmetic.snc, arithmetic.compensation
        if self.group.numerics == "strict":
            self.report.kernel = f"axcore_strict {library.backend_for('axcore_strict')}"
            products = product_tables(arithmetic.formats, *options)
            return buffers | {"scales": axcore.pack_scales(rounded.scales), "products": products}
        formats = arithmetic.formats
        if types is not None:
            # Formats that no block of this layer has cost nothing.
            used, places = types.unique(return_inverse=True)
            formats = tuple(formats[kind] for kind in used.tolist())
            buffers["types"] = places.to(torch.uint8)
        dtype: Format = "float16" if self.dtype == torch.float16 else "bfloat16"
        buffers["scales"] = lut_gemm.pack_scales(rounded.scales)
        if self.device.type == "cpu" and by_addition(dtype):
            self.report.kernel = f"axcore_fast {library.backend_for('axcore_fast')}"
            return buffers | {"addends": torch.from_numpy(fpma_classes.addends(formats, *options, dtype))}
        self.report.kernel = f"lut_gemm {library.backend_for('lut_gemm')}"
        classes = fpma_classes.classes(formats, *options, dtype)
        return buffers | {
            "codebooks": torch.from_numpy(classes.codebooks),
            "maps": activation_maps(classes.shifts, dtype),
        }

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the layer's output, [..., N], for x [..., K]."""
        flat, group = x.reshape(-1, x.shape[-1]), self.group_size
        weight, scales, types = layer.axcore_weight, layer.axcore_scales, layer.axcore_types
        if self.group.numerics == "strict":
            fpma_dequant, bias = self.group.dequant == "fpma", None if bias is None else _to_half(bias)
            products = layer.axcore_products
            out: torch.Tensor = axcore.axcore_strict(
                _to_half(flat), weight, scales, types, products, group, self.n, fpma_dequant, bias
            )
        elif hasattr(layer, "axcore_addends"):
            addends = layer.axcore_addends
            out = axcore_fast.axcore_fast(flat, weight, addends, scales, types, group, self.n, bias)
        else:
            mapped = torch.stack(
                [activation.unary(flat, table) for table in layer.get_buffer("axcore_maps").unbind()]
            )
            books = layer.axcore_codebooks
            out = lut_gemm.lut_gemm(mapped, weight, books, scales, types, group, self.n, bias, False)
        return out.to(x.dtype).view(*x.shape[:-1], self.n)


class UniformLinearMethod(_Loading):
    """vLLM's side of a layer with 16-bit weights and FPMA products: fp16 in the published order."""

    def pack(self, weight: torch.Tensor) -> dict[str, Any]:
        """Pack the weight in fp16."""
        self.report.kernel = f"fpma_linear {library.backend_for('fpma_linear')}"
        return {"weight": in_huge_pages(axcore.pack_uniform(_to_half(weight)))}

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the layer's output, [..., N], for x [..., K]."""
        flat = _to_half(x.reshape(-1, x.shape[-1]))
        half = None if bias is None else _to_half(bias)
        out: torch.Tensor = axcore.fpma_linear(
            flat, layer.axcore_weight, UNIFORM[self.method.name], TILE, self.n, half
        )
        return out.to(x.dtype).view(*x.shape[:-1], self.n)


def linear_method(method: Method, group: Group, report: LayerReport) -> LinearMethodBase:
    """Return the vLLM linear method of one layer (called through the registry in `lutserve.methods`)."""
    return (UniformLinearMethod if method.name in UNIFORM else AxcoreLinearMethod)(method, group, report)
