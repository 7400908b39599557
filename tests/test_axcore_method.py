"""AxCore's methods as vLLM builds their layers, and one server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from servers import SMALL, client
from test_codebook_method import _clean_reports, _one_device  # noqa: F401
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from lutserve import methods
from lutserve.checkpoint import layer_tensors
from lutserve.errors import UserError
from lutserve.kernels.axcore_reference import axcore_linear, uniform
from lutserve.luts import fpma
from lutserve.quant_methods import axcore
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.quantizers.axcore import axcore as quantize_blocks
from lutserve.quantizers.fp4 import quantize
from lutserve.recipe import Group, from_flags
from lutserve.server.client import running_server

N, K = 128, 256
DTYPES = [torch.float16, torch.bfloat16]
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


def build(
    name: str, parts: list[int], dtype: torch.dtype, k: int = K, whole: int | None = None, **group: Any
):
    """A layer of one method with a weight that is ready to be filled."""
    report = REPORTS.layers["layer"] = LayerReport("layer", name)
    linear = axcore.linear_method(methods.get(name), Group(method=name, **group), report)
    layer = torch.nn.Module()
    layer.quant_method = linear
    sizes = (k, parts, whole or k, sum(parts))
    linear.create_weights(layer, *sizes, dtype, weight_loader=default_weight_loader)
    return layer, linear


def layer_of(name: str, dtype: torch.dtype, **group: Any) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """The same, filled with blocks of all three formats and packed; its weight and an input."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(N, K, generator=generator) * 0.05
    weight[:64, :64] = torch.rand(64, 64, generator=generator) - 0.5
    weight[64:, 64:128] *= (torch.randn(64, 64, generator=generator) * 4).exp2()
    x = torch.randn(5, K, generator=generator).to(dtype)
    layer, linear = build(name, [64, 64], dtype, **group)
    layer.weight.weight_loader(layer.weight, weight)
    assert linear.report.done
    linear.process_weights_after_loading(layer)
    return layer, linear, weight.to(dtype), x


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return ((out.double() - exact.double()).norm() / exact.double().norm()).item()


OPTIONS = {
    "axcore": (True, True),
    "axcore-plus": (True, "class"),
    "mpfpma": (False, False),
    "mpfpma-s": (True, False),
    "mpfpma-sc": (True, True),
}


@pytest.mark.parametrize("dequant", ["exact", "fpma"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_strict_layer_is_the_specification(name: str, dtype: torch.dtype, dequant: str) -> None:
    layer, linear, weight, x = layer_of(name, dtype, numerics="strict", dequant=dequant)
    snc, compensation = OPTIONS[name]
    if name.startswith("axcore"):
        rounded = quantize_blocks(weight, 64, dequant, compensation=compensation)  # type: ignore[arg-type]
        assert set(rounded.types.flatten().tolist()) == {0, 1, 2}
    else:
        rounded = quantize(weight, "e2m1", 64, dequant)  # type: ignore[arg-type]
    bias = torch.randn(N).to(dtype)
    tensors = rounded.codes, rounded.scales, rounded.types
    out = axcore_linear(x.half(), *tensors, 64, dequant, snc=snc, compensation=compensation)  # type: ignore[arg-type]
    found = linear.apply(layer, x[:, None], bias)
    assert found.shape == (5, 1, N) and found.dtype == dtype and layer.weight.numel() == 0
    assert torch.equal(found[:, 0], (out + bias.half()).to(dtype))
    # Codes, scales, and a byte for each block of 32 columns where blocks differ.
    typed = 8 / (32 * 64) if name.startswith("axcore") else 0
    assert linear.report.bits == pytest.approx(4 + 16 / 64 + typed)
    assert linear.report.kernel.startswith("axcore_strict") and linear.report.done


@pytest.fixture(params=["lut_gemm", "axcore_fast"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute fast products, whatever this machine prefers."""
    monkeypatch.setattr(axcore, "by_addition", lambda dtype: request.param == "axcore_fast")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_fast_layer_multiplies_the_same_and_sums_in_fp32(name: str, dtype: torch.dtype, fast: str) -> None:
    layer, linear, weight, x = layer_of(name, dtype)
    snc, compensation = OPTIONS[name]
    if name.startswith("axcore"):
        rounded = quantize_blocks(weight, 64, compensation=compensation)  # type: ignore[arg-type]
    else:
        rounded = quantize(weight, "e2m1", 64)
    kinds = rounded.types.repeat_interleave(64, 0).repeat_interleave(64, 1).long()
    form = "float16" if dtype == torch.float16 else "bfloat16"
    tables = [fpma.products(fmt.name, snc, compensation, dtype=form) for fmt in fpma.FP4]  # type: ignore[arg-type]
    products = torch.stack([torch.from_numpy(t.view("int16")).view(dtype) for t in tables]).double()
    patterns = x.view(torch.int16).long() & 0xFFFF
    scales = rounded.scales.double().repeat_interleave(64, 1)
    exact = torch.stack([(products[kinds, rounded.codes.long(), row] * scales).sum(1) for row in patterns])
    out = linear.apply(layer, x)
    assert out.dtype == dtype and error(out, exact) < ROUNDING[dtype] / 2
    # The products are approximate: the weight itself is further away, but not far.
    assert 10 * ROUNDING[dtype] < error(out, x.double() @ weight.double().T) < 0.25
    assert linear.report.kernel.startswith(fast)


@pytest.mark.parametrize("fast", ["lut_gemm"], indirect=True)
def test_formats_that_no_block_has_cost_nothing(fast: str) -> None:
    layer, _ = build("axcore", [64], torch.bfloat16)
    weight = torch.randn(64, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer.weight.weight_loader(layer.weight, weight)
    assert layer.axcore_codebooks.shape == (1, 2, 16) and len(layer.axcore_maps) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "compensation"), [("fpma", 58), ("lmul", 64)])
def test_16_bit_weights(name: str, compensation: int, dtype: torch.dtype) -> None:
    layer, linear, weight, x = layer_of(name, dtype)
    bias = torch.randn(N).to(dtype)
    expected = uniform(x.half(), weight.half(), compensation, bias.half()).to(dtype)
    assert torch.equal(linear.apply(layer, x, bias), expected)
    assert error(linear.apply(layer, x), x.double() @ weight.double().T) < 0.1
    assert linear.report.bits == 16


@pytest.mark.parametrize("numerics", ["fast", "strict"])
def test_activations_beyond_fp16_and_what_is_not_a_number(numerics: str, fast: str) -> None:
    layer, linear, _, x = layer_of("axcore", torch.bfloat16, numerics=numerics)
    clean = linear.apply(layer, x)
    x[1, 3], x[2, 3] = torch.nan, torch.inf
    out = linear.apply(layer, x)
    assert torch.equal(out[[0, 3, 4]], clean[[0, 3, 4]])
    assert out[1].isnan().any()
    # Strict products of the largest number overflow to any pattern, as published.
    assert numerics == "strict" or not out[2].isnan().any()


def test_shapes_that_do_not_fit_are_refused_before_weights_load() -> None:
    with pytest.raises(UserError, match="groups of 64 do not fit 96 input columns"):
        build("axcore", [64], torch.bfloat16, k=96)
    with pytest.raises(UserError, match="groups of 12 do not fit 96"):
        build("mpfpma", [64], torch.bfloat16, k=96, group_size=12)
    with pytest.raises(UserError, match=r"64 \+ 32 output rows are no multiples of 64"):
        build("axcore", [64, 32], torch.bfloat16)
    with pytest.raises(UserError, match="cuts groups of all 256 input columns"):
        build("axcore", [64], torch.bfloat16, k=128, whole=256, group_size=-1)
    build("mpfpma", [64, 33], torch.bfloat16, k=96, group_size=-1)
    build("fpma", [33], torch.bfloat16, k=100)


def test_a_weight_that_fp16_does_not_hold_is_refused() -> None:
    layer, _ = build("axcore", [64], torch.bfloat16)
    with pytest.raises(UserError, match="beyond the range of float16"):
        layer.weight.weight_loader(layer.weight, torch.full((64, K), 1e6).bfloat16())


def test_recipes() -> None:
    group = from_flags(method="axcore", numerics="strict").config_groups["default"]
    assert (group.group_size, group.numerics, group.dequant) == (64, "strict", "exact")
    assert from_flags(method="axcore", group_size="128").config_groups["default"].group_size == 128
    assert from_flags(method="nf4").config_groups["default"].group_size == 128
    with pytest.raises(UserError, match="numerics strict is for AxCore's methods, not for nf4"):
        from_flags(method="nf4", numerics="strict")
    with pytest.raises(UserError, match="--numerics strict needs --method"):
        from_flags(numerics="strict")
    with pytest.raises(UserError, match="numerics"):
        from_flags(method="axcore", numerics="exact")
    with pytest.raises(ValueError, match="dequant fpma needs numerics strict"):
        Group(method="axcore", dequant="fpma")
    with pytest.raises(ValueError, match="no stored form"):
        Group(method="mpfpma", stored=True)
    with pytest.raises(ValueError, match="quantised while they load"):
        Group(method="axcore", stored=True, numerics="strict", dequant="fpma")


@pytest.mark.parametrize("numerics", ["fast", "strict"])
@pytest.mark.parametrize("name", ["axcore", "axcore-plus"])
def test_a_stored_layer_is_the_one_rounded_while_loading(name: str, numerics: str) -> None:
    online, linear, weight, x = layer_of(name, torch.bfloat16, numerics=numerics)
    expected = linear.apply(online, x)
    rounded = quantize_blocks(weight, 64, compensation=OPTIONS[name][1])  # type: ignore[arg-type]
    layer, linear = build(name, [64, 64], torch.bfloat16, stored=True, numerics=numerics)
    for part, tensor in layer_tensors("layer", rounded).items():
        parameter = layer.get_parameter(part.removeprefix("layer."))
        assert parameter.shape == tensor.shape and parameter.dtype == tensor.dtype
        parameter.weight_loader(parameter, tensor)
    linear.process_weights_after_loading(layer)
    assert linear.report.done and list(layer.state_dict()) == ["weight"]
    assert torch.equal(linear.apply(layer, x), expected)


def test_a_stored_format_that_does_not_exist_is_refused() -> None:
    layer, linear = build("axcore", [64], torch.bfloat16, stored=True)
    layer.weight_type.data.fill_(3)
    with pytest.raises(UserError, match="weight_type holds 3; 0 to 2 is allowed"):
        linear.process_weights_after_loading(layer)


@pytest.mark.slow
def test_a_server_answers_the_same_alone_and_in_a_batch(tiny: Path, tmp_path: Path) -> None:
    prompts = ["The river rises in the hills", *(f"{i} plus {i + 1} is" for i in range(7))]
    arguments = ["--model", str(tiny), "--method", "axcore", "--numerics", "strict", *SMALL]
    with running_server(arguments, log=tmp_path / "log") as server:

        def ask(prompt: str) -> str:
            answer = client(server).completions.create(
                model=server.model, prompt=prompt, max_tokens=24, temperature=0
            )
            return answer.choices[0].text

        alone = ask(prompts[0])
        with ThreadPoolExecutor(len(prompts)) as pool:
            together = list(pool.map(ask, prompts))
    assert together[0] == alone and len(set(together)) > 1
    assert "axcore_strict" in (tmp_path / "log").read_text()
