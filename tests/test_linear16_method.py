"""Layers that stay 16 bit as vLLM builds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from lutserve.kernels import isa, library
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.quant_methods.linear16 import Head16Method, Linear16Method, Packed

N, K = 45, 72


@pytest.fixture(autouse=True)
def _slow_machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine whose vLLM is slow in fp16 alone, if it has our kernel at all."""
    if library.backend_for("linear16") in ("reference", "cpu/portable"):
        pytest.skip("linear16 is not served here")
    monkeypatch.setattr(isa, "slow_16_bit", lambda: ("float16",))
    yield
    REPORTS.layers.clear()


def packed(allowed: bool = True) -> Packed:
    report = REPORTS.layers["layer"] = LayerReport("layer", "none")
    return Packed(report, allowed)


def layer_of(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    layer = torch.nn.Module()
    weight = torch.randn(N, K, generator=generator).to(dtype)
    layer.register_parameter("weight", torch.nn.Parameter(weight.clone(), requires_grad=False))
    return layer, weight, torch.randn(2, 3, K, generator=generator).to(dtype)


def check(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert out.dtype == x.dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(x.dtype).eps, atol=1e-4)


def test_a_slow_dtype_is_ours_and_the_loaded_weight_goes() -> None:
    layer, weight, x = layer_of(torch.float16)
    linear = Linear16Method(packed())
    linear.process_weights_after_loading(layer)
    report = REPORTS.layers["layer"]
    assert report.done and report.weights == N * K and report.kernel.startswith("linear16 cpu/")
    assert layer.get_parameter("weight").numel() == 0
    bias = torch.randn(N).half()
    check(linear.apply(layer, x, bias), x, weight, bias)


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.bfloat16, True), (torch.float32, True), (torch.float16, False)]
)
@pytest.mark.parametrize("kind", [Linear16Method, Head16Method])
def test_the_rest_is_vllms(kind: Any, dtype: torch.dtype, allowed: bool) -> None:
    layer, weight, x = layer_of(dtype)
    linear = kind(packed(allowed))
    linear.process_weights_after_loading(layer)
    assert REPORTS.layers["layer"].done and REPORTS.layers["layer"].kernel == "vllm"
    check(linear.apply(layer, x.flatten(0, 1)), x.flatten(0, 1), weight)


def test_a_weight_that_vllm_reads_itself_stays() -> None:
    layer, weight, _ = layer_of(torch.float16)
    layer._cpu_skip_gemm_dispatch = True  # type: ignore[assignment]
    Linear16Method(packed()).process_weights_after_loading(layer)
    assert torch.equal(layer.get_parameter("weight"), weight)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_keeps_its_weight_only_for_the_embedding(tied: bool) -> None:
    layer, weight, x = layer_of(torch.float16)
    embedding, _, _ = layer_of(torch.float16)
    head = Head16Method(packed())
    if tied:
        assert head.tie_weights(layer, embedding) is layer
        assert layer.weight is embedding.weight
    head.process_weights_after_loading(layer)
    check(head.apply(layer, x), x, weight)
    assert layer.get_parameter("weight").numel() == (weight.numel() if tied else 0)
    assert torch.equal(embedding.get_parameter("weight"), weight)
