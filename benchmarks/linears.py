"""One linear layer at a time, 16-bit and 4-bit: ours against vLLM, torch, bitsandbytes and OpenVINO.

    python -m lutserve.benchmarks.linears [--quick] [-o out/linears] [--threads 1]

All layers of a case hold the same weights, up to their own rounding, and are timed in alternation. Short
inputs meet several copies of the layer in turn, so that no weight stays in the caches. Every result is
checked first against fp32 with the weights that the layer holds. Writes one JSON record, which also says
what could not run here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer

from lutserve import formats
from lutserve.benchmarks.kernels import Call, compare
from lutserve.benchmarks.record import Timings, report
from lutserve.compat import UnquantizedLinearMethod, vllm_ops
from lutserve.kernels import linear16, lut_gemm
from lutserve.kernels.pages import in_huge_pages
from lutserve.quantizers import rtn

GROUP = 128
SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))  # output by input columns
ROWS = (1, 4, 16, 64, 256, 1024)
#: bytes of 16-bit weight that short inputs meet in turn
_COLD = 1 << 26
#: relative (Frobenius) to fp32 with the same weights; int8 activations round by about 1 %
_TOLERANCE, _TOLERANCE_A8 = 1e-2, 3e-2

#: multiplies x [M, K] of its dtype
Layer = Callable[[torch.Tensor], torch.Tensor]


def _int4(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0..15 [n, k] (value code - 8) and scales [n, groups] that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    return codes, (torch.rand(n, k // GROUP, generator=generator) * 0.01 + 0.001).bfloat16().float()


def _values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (codes.float() - 8) * scales.repeat_interleave(GROUP, 1)


def _vllm(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> Layer:
    layer, method = torch.nn.Module(), UnquantizedLinearMethod()
    weight = torch.nn.Parameter(_values(codes, scales).to(dtype), requires_grad=False)
    layer.register_parameter("weight", weight)
    method.process_weights_after_loading(layer)
    return partial(method.apply, layer)


def _linear16(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> Layer:
    packed = in_huge_pages(linear16.pack(_values(codes, scales).to(dtype)))
    return lambda x: linear16.linear16(x, packed, len(codes), None)


def _lut(codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, a8: bool) -> Layer:
    packed, by_panels = in_huge_pages(lut_gemm.pack(codes)), lut_gemm.pack_scales(scales)
    book = table.float().view(1, 1, 16)
    return lambda x: lut_gemm.lut_gemm(x[None], packed, book, by_panels, None, GROUP, len(codes), None, a8)


def _lut_int4(codes: torch.Tensor, scales: torch.Tensor, a8: bool) -> Layer:
    return _lut(codes, scales, torch.arange(-8, 8), a8)


def _lut_nf4(codes: torch.Tensor, scales: torch.Tensor) -> Layer:
    quantized = rtn(_values(codes, scales), "nf4", GROUP)
    return _lut(quantized.codes, quantized.scales, torch.tensor(formats.get("nf4").table), False)


def _vllm_int4(codes: torch.Tensor, scales: torch.Tensor) -> Layer:
    """The kernel of AWQ and GPTQ layers in vLLM: blocks of 16 output columns, eight codes in an int32."""
    n, k = codes.shape
    _ = torch.ops._C.cpu_gemm_wna16  # AttributeError where this build has none
    shifts = torch.arange(0, 32, 4)
    words = (codes.T.reshape(k, n // 8, 8).long() << shifts).sum(-1).to(torch.int32)
    weight = words.view(k, -1, 2).permute(1, 0, 2).reshape(-1, k * 2).contiguous()
    hint = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    by_groups = scales.T.contiguous().bfloat16()
    return lambda x: vllm_ops.cpu_gemm_wna16(x, weight, by_groups, None, None, 8, hint)


def _torch_int4(codes: torch.Tensor, scales: torch.Tensor) -> Layer:
    weight = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).bfloat16().contiguous()
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, weight, GROUP, pairs)


def _bitsandbytes_nf4(codes: torch.Tensor, scales: torch.Tensor) -> Layer:
    functional = import_module("bitsandbytes.functional")
    matmul = import_module("bitsandbytes").matmul_4bit
    weight = _values(codes, scales).bfloat16()
    packed, state = functional.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
    return lambda x: matmul(x, packed.t(), state)


def _openvino_nf4(codes: torch.Tensor, scales: torch.Tensor) -> Layer:
    """OpenVINO's weight compression as a graph: NF4 constant, fp16 scales of groups, MatMul of fp32 rows."""
    ov, ops = import_module("openvino"), import_module("openvino.opset15")
    quantized = rtn(_values(codes, scales), "nf4", GROUP)
    (n, k), low, high = codes.shape, quantized.codes[:, 0::2], quantized.codes[:, 1::2]
    shape = ov.Shape([n, k // GROUP, GROUP])
    packed = (low | high << 4).contiguous().numpy()  # must outlive the Tensor that looks at it
    indices = ops.constant(ov.Tensor(packed, shape, ov.Type.nf4), shared_memory=False)
    by_groups = ops.constant(quantized.scales.half().unsqueeze(-1).numpy(), shared_memory=False)
    values = ops.multiply(ops.convert(indices, ov.Type.f16), by_groups)
    weight = ops.convert(ops.reshape(values, [n, k], False), ov.Type.f32)
    rows = ops.parameter([-1, k], ov.Type.f32)
    model = ov.Model([ops.matmul(rows, weight, False, True)], [rows])
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0])


_B, _H, _F = torch.bfloat16, torch.float16, torch.float32
#: name -> how a layer is made, the activations' dtype; vLLM's own is the baseline
PROVIDERS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Layer], torch.dtype]] = {
    "vllm bf16": (partial(_vllm, dtype=_B), _B),
    "linear16 bf16": (partial(_linear16, dtype=_B), _B),
    "vllm fp16": (partial(_vllm, dtype=_H), _H),
    "linear16 fp16": (partial(_linear16, dtype=_H), _H),
    "lut_gemm nf4": (_lut_nf4, _B),
    "lut_gemm int4+a8": (partial(_lut_int4, a8=True), _B),
    "vllm int4": (_vllm_int4, _B),
    "torch int4": (_torch_int4, _B),
    "bitsandbytes nf4": (_bitsandbytes_nf4, _B),
    "openvino nf4": (_openvino_nf4, _F),
}


def missing() -> dict[str, str]:
    """Return the providers that this machine cannot run, and why."""
    codes, scales = _int4(64, 2 * GROUP)
    reasons = {}
    for name, (make, dtype) in PROVIDERS.items():
        try:
            make(codes, scales)(torch.ones(1, 2 * GROUP, dtype=dtype))
        except (ImportError, AttributeError, RuntimeError) as error:
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return reasons


def cases(absent: dict[str, str], quick: bool) -> Iterator[tuple[str, Timings]]:
    """Yield the name and the timings of each comparison."""
    for n, k in SHAPES[:1] if quick else SHAPES:
        copies = _COLD // (2 * n * k)
        codes, scales = _int4(n, k)
        layers = {
            name: ([make(codes, scales) for _ in range(copies)], dtype)
            for name, (make, dtype) in PROVIDERS.items()
            if name not in absent
        }
        exact, nf4 = _values(codes, scales), rtn(_values(codes, scales), "nf4", GROUP).dequantize()
        for m in ROWS[:4] if quick else ROWS:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            calls: dict[str, Call] = {}
            for name, (some, dtype) in layers.items():
                rows = x.to(dtype)
                _check(name, some[0](rows), rows.float() @ (nf4 if "nf4" in name else exact).T)
                calls[name] = partial(_in_turn, some if m <= 4 else some[:1], rows)
            what = f"[{m}, {k}] x [{k}, {n}]"
            # NF4 holds other weights, so all that is asked here is that these are the same layer at all.
            yield f"{copies} x {what}" if m <= 4 and copies > 1 else what, compare(calls, 0.3)


def _check(name: str, out: torch.Tensor, exact: torch.Tensor) -> None:
    error = ((out.float() - exact).norm() / exact.norm()).item()
    allowed = _TOLERANCE_A8 if name.endswith("+a8") else _TOLERANCE
    if not error <= allowed:
        raise RuntimeError(f"{name} is off by {error:.2e}, allowed are {allowed:.0e}")


def _in_turn(layers: list[Layer], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        out = layer(x)
    return out


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the record.")] = Path(
        "out/linears"
    ),
    threads: Annotated[int, typer.Option(help="Threads to use.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One shape, up to 64 rows.")] = False,
) -> None:
    """Time everything, write the record, print the table."""
    absent = missing()
    note = "; ".join(f"not run: {name} ({reason})" for name, reason in absent.items())
    report("linears", cases(absent, quick), output, threads, note)


if __name__ == "__main__":
    typer.run(main)
