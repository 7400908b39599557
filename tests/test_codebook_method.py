"""Codebook layers as vLLM builds them: quantised at load, or loaded as `lutserve quantize` stores them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from lutserve import formats, methods
from lutserve.checkpoint import layer_tensors
from lutserve.errors import UserError
from lutserve.kernels import library
from lutserve.quant_methods import codebook
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.quantizers import quantize_activations, rtn
from lutserve.recipe import Group

N, K = 48, 320


@pytest.fixture(autouse=True, scope="module")
def _one_device(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The parallel groups that vLLM's parameters ask for their rank, as a single worker has them."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    where = f"file://{tmp_path_factory.mktemp('gloo') / 'store'}"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, where, 0, backend="gloo")
        parallel_state.initialize_model_parallel(1)
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


@pytest.fixture(autouse=True)
def _clean_reports() -> Any:
    library.load()
    yield
    REPORTS.layers.clear()


def build(name: str, parts: list[int], k: int = K, whole: int | None = None, **group: Any) -> tuple[Any, Any]:
    """A layer of one method with parameters that are ready to be filled."""
    report = REPORTS.layers["layer"] = LayerReport("layer", name)
    linear = codebook.linear_method(methods.get(name), Group(method=name, **group), report)
    layer = torch.nn.Module()
    layer.quant_method = linear
    sizes = (k, parts, whole or k, sum(parts))
    linear.create_weights(layer, *sizes, torch.bfloat16, weight_loader=default_weight_loader)
    return layer, linear


def load(layer: Any, weight: torch.Tensor) -> None:
    """Load a 16-bit weight as vLLM does, which quantises it, and then processes all layers once more."""
    layer.weight.weight_loader(layer.weight, weight)
    assert layer.quant_method.report.done
    layer.quant_method.process_weights_after_loading(layer)


def weight_and_input(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, K, generator=generator).to(dtype), torch.randn(3, K, generator=generator).to(dtype)


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("group_size", [-1, 32, 128, 10_000])
@pytest.mark.parametrize("name", ["nf4", "sf4_5", "fp4_range", "apot4", "int4", "sf3_5"])
def test_a_16_bit_weight_is_rounded_to_nearest_at_load(name: str, group_size: int) -> None:
    weight, x = weight_and_input()
    layer, linear = build(name, [N], group_size=group_size)
    load(layer, weight)
    bias = torch.randn(N).bfloat16()
    out = linear.apply(layer, x[:, None], bias)
    assert out.shape == (3, 1, N) and layer.weight.numel() == 0
    exact = x.double() @ rtn(weight, name, group_size).dequantize().double().T + bias.double()
    # The table and the result are bf16.
    assert relative_error(out[:, 0], exact) < 4e-3
    groups = 1 if group_size in (-1, 10_000) else -(-K // group_size)
    assert linear.report.bits == pytest.approx(4 + 32 * groups * 64 / (N * K))
    assert linear.report.done and linear.report.weights == N * K


@pytest.mark.parametrize("name", ["fp4_basic", "nf4"])
def test_int8_activations(name: str) -> None:
    weight, x = weight_and_input()
    layer, linear = build(f"{name}+a8", [N], group_size=32)
    load(layer, weight)
    exact = x.double() @ rtn(weight, name, 32).dequantize().double().T
    assert relative_error(linear.apply(layer, x), exact) < 0.015
    # Said where the table itself is approximated, and only there.
    assert ("rounded to int8" in linear.report.kernel) == (name == "nf4")


def test_4_bit_activations() -> None:
    weight, x = weight_and_input()
    layer, linear = build("sf4_5+a4", [N], group_size=64)
    load(layer, weight)
    rounded = quantize_activations(x, "sf4_5", 64).double()
    exact = rounded @ rtn(weight, "sf4_5", 64).dequantize().double().T
    assert relative_error(linear.apply(layer, x), exact) < 5e-3
    assert relative_error(linear.apply(layer, x), x.double() @ weight.double().T) > 0.05


def stored(weight: torch.Tensor, name: str, group_size: int) -> dict[str, torch.Tensor]:
    """What a folder holds of one linear."""
    quantized = rtn(weight, name, group_size)
    codes = torch.nn.functional.pad(quantized.codes, (0, weight.shape[1] % 2))
    return {
        "weight_packed": codes[:, 0::2] | codes[:, 1::2] << 4,
        "weight_scale": quantized.scales,
        "weight_codebook": torch.tensor(formats.get(name).table),
    }


def test_a_stored_fused_layer_equals_its_parts() -> None:
    weight, x = weight_and_input()
    layer, linear = build("sf4_5", [32, 16], group_size=64, stored=True)
    begin = 0
    for shard, size in enumerate((32, 16)):
        part = stored(weight[begin : begin + size], "sf4_5", 64)
        for key, value in part.items():
            layer.get_parameter(key).load_merged_column_weight(
                value, shard_id=shard, shard_offset=begin, shard_size=size
            )
        begin += size
    linear.process_weights_after_loading(layer)
    exact = x.double() @ rtn(weight, "sf4_5", 64).dequantize().double().T
    assert relative_error(linear.apply(layer, x), exact) < 4e-3
    assert not {"weight_packed", "weight_scale", "weight_codebook"} & set(dict(layer.named_parameters()))


def test_a_stored_learned_codebook_needs_no_file() -> None:
    weight, x = weight_and_input()
    learned = formats.Codebook("mine", (-1.0, -0.3, 0.0, 0.2, 0.9))
    group = Group(method="mine", values=learned.values, group_size=64, stored=True)
    layer = torch.nn.Module()
    linear = codebook.linear_method(group.arithmetic, group, LayerReport("layer", "mine"))
    linear.create_weights(layer, K, [N], K, N, torch.bfloat16, weight_loader=None)
    quantized = rtn(weight, learned, 64)
    for name, tensor in layer_tensors("x", quantized).items():
        layer.get_parameter(name.removeprefix("x.")).load_column_parallel_weight(tensor)
    linear.process_weights_after_loading(layer)
    exact = x.double() @ quantized.dequantize().double().T
    assert relative_error(linear.apply(layer, x), exact) < 4e-3


def test_parts_with_different_tables_are_refused() -> None:
    layer, linear = build("nf4", [32, 16], stored=True)
    layer.weight_codebook.data.copy_(torch.stack([torch.arange(16.0), torch.arange(16.0) + 1]))
    with pytest.raises(UserError, match=r"different tables, .*; quantise all parts of a fused layer to one"):
        linear.process_weights_after_loading(layer)


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="group_size 12 is not a multiple of 8"):
        build("nf4", [N], group_size=12)
    with pytest.raises(
        UserError, match=r"320 input columns in 2 tensor-parallel parts of 160 cut a group of 128"
    ):
        build("nf4", [N], k=160, whole=320)
    with pytest.raises(UserError, match="cut a group of 320"):
        build("nf4", [N], k=160, whole=320, group_size=-1)
    build("nf4", [N], k=160, whole=320, group_size=32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nf5", "did you mean 'nf4'"),
        ("nf4+a3", "a4 or a8"),
        ("int6", "at most 4"),
    ],
)
def test_unknown_methods(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        methods.get(name)


def test_under_torch_compile() -> None:
    weight, x = weight_and_input()
    layer, linear = build("nf4", [N])
    load(layer, weight)
    compiled = torch.compile(lambda t: linear.apply(layer, t * 1), fullgraph=True)(x)
    assert torch.equal(compiled, linear.apply(layer, x))


def test_large_weights_are_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weight_and_input()
    whole, _ = build("nf4", [N], group_size=64)
    load(whole, weight)
    monkeypatch.setattr(codebook, "_PIECE", 1)
    pieces, linear = build("nf4", [N], group_size=64)
    load(pieces, weight)
    assert torch.equal(pieces.lut_indices, whole.lut_indices)
    assert torch.equal(pieces.lut_scales, whole.lut_scales)
    assert torch.equal(linear.apply(pieces, x), whole.quant_method.apply(whole, x))
