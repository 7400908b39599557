"""Approximate multiplication for vLLM ("AxCore", MICRO'25, and its ablations): 4-bit floats times activations
by integer addition, and the same for two 16-bit operands (`fpma`, `lmul`).

Weights are rounded while a 16-bit checkpoint loads. Each block takes the format that is expected to cost
least, because no calibration data is at hand. Two numerics:

fast    `lutserve::lut_gemm` over classes of products, in the model's dtype (bf16 with the constants of bf16),
        sums in fp32, exact scales.
strict  `lutserve::axcore_strict`: fp16 and the published order of sums, whatever the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lutserve.compat import LinearMethodBase
from lutserve.errors import UserError
from lutserve.kernels import activation, axcore, library, lut_gemm
from lutserve.kernels.axcore_reference import BLOCK, activation_maps, product_tables
from lutserve.kernels.pages import in_huge_pages
from lutserve.luts import fpma, fpma_classes
from lutserve.luts.bits import Format
from lutserve.methods import Method
from lutserve.quant_methods import online
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.quantizers.axcore import axcore as quantize_blocks
from lutserve.quantizers.fp4 import quantize
from lutserve.recipe import Group


@dataclass(frozen=True)
class Arithmetic:
    """Formats to choose from, and the options of `fpma.products`."""

    formats: tuple[fpma.Fp4, ...] = fpma.FP4
    snc: bool = True
    compensation: fpma.Compensation = True


_E2M1 = (fpma.get("e2m1"),)
ARITHMETICS = {
    "axcore": Arithmetic(),
    "axcore-plus": Arithmetic(compensation="class"),
    "mpfpma": Arithmetic(_E2M1, snc=False, compensation=False),
    "mpfpma-s": Arithmetic(_E2M1, compensation=False),
    "mpfpma-sc": Arithmetic(_E2M1),
}
#: methods with a 16-bit weight, and their compensation
UNIFORM = {"fpma": fpma.uniform(), "lmul": fpma.L_MUL["float16"]}


def _to_half(x: torch.Tensor) -> torch.Tensor:
    """In fp16; what is beyond its range, infinity included, becomes its largest number, and NaN stays."""
    limit = torch.finfo(torch.float16).max
    return x if x.dtype == torch.float16 else x.clamp(-limit, limit).half()


class _Loading(LinearMethodBase):
    """What loads a 16-bit weight and lets it go once it is packed."""

    uses_meta_device = True

    def __init__(self, method: Method, group: Group, report: LayerReport) -> None:
        self.method, self.group, self.report = method, group, report
        self.group_size = group.group_size

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
        n, k = sum(output_partition_sizes), input_size_per_partition
        online.create_weight(layer, n, k, params_dtype, extra["weight_loader"])

    def check(self, parts: list[int], k: int, whole: int) -> None:
        """UserError for shapes that the method cannot take."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack, and let the 16-bit weight go."""
        weight = online.take_weight(layer)
        if weight is None:
            return
        # The search for formats runs on the CPU.
        buffers = self.pack(weight.cpu())
        # As buffers: torch.compile then takes them for inputs, not for constants to copy.
        for name, tensor in buffers.items():
            moved = None if tensor is None else tensor.to(weight.device)
            layer.register_buffer(f"axcore_{name}", moved, persistent=False)
        self.n, report = len(weight), self.report
        report.weights = weight.numel()
        stored = (buffers[name] for name in ("weight", "scales", "types") if buffers.get(name) is not None)
        report.bits = 8 * sum(tensor.nbytes for tensor in stored) / report.weights
        REPORTS.finish(report)

    def pack(self, weight: torch.Tensor) -> dict[str, Any]:
        """Return the buffers of a layer, and name its kernel."""
        raise NotImplementedError


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

    def pack(self, weight: torch.Tensor) -> dict[str, Any]:
        """Round, choose formats, and pack for the numerics of the group."""
        arithmetic, dequant = ARITHMETICS[self.method.name], self.group.dequant
        typed = len(arithmetic.formats) > 1
        if typed:
            chosen = arithmetic.compensation
            rounded = quantize_blocks(weight, self.group_size, dequant, compensation=chosen)
        else:
            rounded = quantize(weight, arithmetic.formats[0].name, self.group_size, dequant)
        types = rounded.types.repeat_interleave(BLOCK // lut_gemm.COLUMNS, 0) if typed else None
        buffers = {"weight": in_huge_pages(lut_gemm.pack(rounded.codes)), "types": types}
        options = arithmetic.snc, arithmetic.compensation
        if self.group.numerics == "strict":
            self.report.kernel = f"axcore_strict {library.backend_for('axcore_strict')}"
            products = product_tables(arithmetic.formats, *options)
            return buffers | {"scales": axcore.pack_scales(rounded.scales), "products": products}
        self.report.kernel = f"lut_gemm {library.backend_for('lut_gemm')}"
        formats = arithmetic.formats
        if types is not None:
            # Formats that no block of this layer has cost nothing.
            used, places = types.unique(return_inverse=True)
            formats = tuple(formats[kind] for kind in used.tolist())
            buffers["types"] = places.to(torch.uint8)
        dtype: Format = "float16" if weight.dtype == torch.float16 else "bfloat16"
        classes = fpma_classes.classes(formats, *options, dtype)
        return buffers | {
            "scales": lut_gemm.pack_scales(rounded.scales),
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
            flat, layer.axcore_weight, UNIFORM[self.method.name], self.n, half
        )
        return out.to(x.dtype).view(*x.shape[:-1], self.n)


def linear_method(method: Method, group: Group, report: LayerReport) -> LinearMethodBase:
    """Return the vLLM linear method of one layer (called through the registry in `lutserve.methods`)."""
    return (UniformLinearMethod if method.name in UNIFORM else AxcoreLinearMethod)(method, group, report)
