"""How a layer that vLLM builds comes to its table, and that it is vLLM's own where the site is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from torch import nn

pytest.importorskip("vllm")

from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import activation as theirs
from vllm.model_executor.layers import layernorm
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from lutserve import luts, plugin
from lutserve.compat import RoutedExperts
from lutserve.errors import UserError
from lutserve.kernels import activation, norm
from lutserve.layers import moe, names, saturation, sites
from lutserve.recipe import parse
from lutserve.server.metrics import LutserveCollector

plugin.register()

DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    sites.REPORTS.clear()
    saturation.COUNTERS.clear()


@contextmanager
def building(tables: dict[str, str] | None, **more: Any) -> Iterator[None]:
    """What vLLM does around the construction of a model with these tables."""
    extra = {} if tables is None else {"lutserve": {"luts": tables, **more}}
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        eager = CompilationConfig(mode=CompilationMode.NONE, custom_ops=["all"])
        with set_current_vllm_config(VllmConfig(additional_config=extra, compilation_config=eager)):
            yield
    finally:
        torch.set_default_dtype(before)


def load(model: nn.Module) -> None:
    """What vLLM does after the weights are loaded."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)


class Layer(nn.Module):
    """A decoder layer's sites, in an order that no rule but the real name can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = layernorm.LayerNorm(32)
        self.mlp = nn.Module()
        self.mlp.act = theirs.get_act_fn("gelu_new")
        self.mlp.act_fn = theirs.SiluAndMul()
        self.norm = layernorm.RMSNorm(32)


class Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.final = layernorm.RMSNorm(32)
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])


def built(tables: dict[str, str] | None, **more: Any) -> Model:
    with building(tables, **more):
        root = nn.Module()
        root.model = Model()
        load(root)
    return root  # type: ignore[return-value]


def found() -> dict[str, str]:
    return {f"{report.module}.{report.site}": report.spec for report in sites.REPORTS.values()}


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DTYPE)


def test_every_layer_has_its_own_table() -> None:
    tables = {"layers.1.silu": "nli-16", "silu": "nli-4", "layers.2.gelu": "nli-2", "final.rsqrt": "nli-32"}
    root = built(tables | {"layers.0.rsqrt": "nli-4"})
    assert found() == {
        "model.layers.0.mlp.act_fn.silu": "nli-4",
        "model.layers.1.mlp.act_fn.silu": "nli-16",
        "model.layers.2.mlp.act_fn.silu": "nli-4",
        "model.layers.2.mlp.act.gelu": "nli-2",
        "model.final.rsqrt": "nli-32",
        "model.layers.0.ln_1.rsqrt": "nli-4",
        "model.layers.0.norm.rsqrt": "nli-4",
    }
    layers: Any = root.model.layers
    # vLLM keeps what get_act_fn made; three layers must nevertheless hold three.
    assert len({id(layer.mlp.act) for layer in layers}) == 3
    for layer, spec in zip(layers, ("nli-4", "nli-16", "nli-4"), strict=True):
        table = luts.lut_table("silu", spec, DTYPE)
        assert layer.mlp.act_fn.table_site.table.data_ptr() == table.data_ptr()  # shared, not copied
        assert torch.equal(layer.mlp.act_fn(x(4, 64)), activation.act_and_mul(x(4, 64), table))
    gelu = luts.lut_table("gelu_tanh", "nli-2", DTYPE)
    assert torch.equal(layers[2].mlp.act(x(4, 64)), activation.unary(x(4, 64), gelu))


def test_a_second_model_gets_its_own_recipe() -> None:
    first, second = built({"gelu": "nli-2"}), built({"gelu": "nli-32"})
    third = built(None)
    results = [model.model.layers[0].mlp.act(x(4, 64)) for model in (first, second, third)]  # type: ignore[union-attr,index]
    for result, spec in zip(results, ("nli-2", "nli-32"), strict=False):
        assert torch.equal(result, activation.unary(x(4, 64), luts.lut_table("gelu_tanh", spec, DTYPE)))
    assert torch.equal(results[2], theirs.NewGELU.forward_native(None, x(4, 64)))


@pytest.mark.parametrize("tables", [None, {}, {"silu": "exact"}, {"layers.7.silu": "nli-4"}])
def test_an_exact_site_is_vllms_own(tables: dict[str, str] | None) -> None:
    root = built(tables)
    layer: Any = root.model.layers[0]
    assert found() == {}
    wide, narrow = x(5, 64), x(5, 32)
    assert torch.equal(layer.mlp.act_fn(wide), theirs.SiluAndMul.forward_native(wide))
    assert torch.equal(layer.mlp.act(wide), theirs.NewGELU.forward_native(layer.mlp.act, wide))
    assert torch.equal(layer.norm(narrow), layernorm.RMSNorm.forward_native(layer.norm, narrow))
    assert torch.equal(layer.ln_1(narrow), layernorm.LayerNorm.forward_native(layer.ln_1, narrow))
    assert layer.norm._forward_method.__func__ is not type(layer.norm).forward_table


def classes() -> list[Any]:
    gate, plain = (4, 64), (4, 32)
    return [
        pytest.param(lambda: theirs.SiluAndMul(), "silu", "silu", gate, id="SiluAndMul"),
        pytest.param(lambda: theirs.GeluAndMul(), "gelu", "gelu", gate, id="GeluAndMul"),
        pytest.param(lambda: theirs.GeluAndMul("tanh"), "gelu", "gelu_tanh", gate, id="GeluAndMul-tanh"),
        pytest.param(lambda: theirs.get_act_fn("gelu"), "gelu", "gelu", plain, id="gelu"),
        pytest.param(lambda: theirs.get_act_fn("gelu_new"), "gelu", "gelu_tanh", plain, id="gelu_new"),
        pytest.param(lambda: theirs.get_act_fn("gelu_fast"), "gelu", "gelu_tanh", plain, id="gelu_fast"),
        pytest.param(
            lambda: theirs.get_act_fn("gelu_pytorch_tanh"), "gelu", "gelu_tanh", plain, id="gelu_pytorch_tanh"
        ),
        pytest.param(lambda: theirs.get_act_fn("quick_gelu"), "gelu", "swish", plain, id="quick_gelu"),
        pytest.param(lambda: theirs.get_act_fn("silu"), "silu", "silu", plain, id="silu"),
        pytest.param(lambda: theirs.GELUTanh(), "gelu", "gelu_tanh", plain, id="GELUTanh"),
    ]


@pytest.mark.parametrize(("make", "site", "function", "shape"), classes())
def test_every_activation(make: Any, site: str, function: str, shape: tuple[int, ...]) -> None:
    root: Any = nn.Module()
    with building({site: "nli-4"}):
        root.act = make()
        load(root)
    assert found() == {f"act.{site}": "nli-4"}
    table = luts.lut_table(function, "nli-4", DTYPE)
    op = activation.act_and_mul if shape[-1] == 64 else activation.unary
    assert torch.equal(root.act(x(*shape)), op(x(*shape), table))
    with building({site: "exact"}):
        root.plain = make()
        load(root)
    exact = root.plain(x(*shape)).float()
    # The right function, not only some table: within NLI's error of what vLLM computes.
    assert (root.act(x(*shape)).float() - exact).abs().max() < 0.06
    assert not torch.equal(root.act(x(*shape)).float(), exact)


def test_relu_stays_exact() -> None:
    root: Any = nn.Module()
    with building({"silu": "nli-4", "gelu": "nli-4"}):
        root.act = theirs.get_act_fn("relu")
    assert type(root.act) is nn.ReLU


def norms() -> list[Any]:
    return [
        pytest.param(lambda: layernorm.RMSNorm(96, eps=1e-5), id="RMSNorm"),
        pytest.param(lambda: layernorm.RMSNorm(96, has_weight=False), id="RMSNorm-bare"),
        pytest.param(lambda: layernorm.RMSNorm(96, dtype=torch.float32), id="RMSNorm-fp32"),
        pytest.param(lambda: layernorm.GemmaRMSNorm(96), id="GemmaRMSNorm"),
        pytest.param(lambda: layernorm.LayerNorm(96), id="LayerNorm"),
        pytest.param(lambda: layernorm.LayerNorm(96, dtype=torch.float32), id="LayerNorm-fp32"),
        pytest.param(lambda: layernorm.LayerNorm(96, elementwise_affine=False), id="LayerNorm-bare"),
        pytest.param(lambda: nn.LayerNorm(96), id="torch-LayerNorm"),
        pytest.param(lambda: nn.LayerNorm(96, bias=False), id="torch-LayerNorm-no-bias"),
    ]


@pytest.mark.parametrize("make", norms())
def test_every_norm(make: Any) -> None:
    """Against vLLM's own with the same weights, with and without a residual."""
    root: Any = nn.Module()
    with building({"rsqrt": "nli-32"}):
        root.norm = make()
    with building({"rsqrt": "exact"}):
        root.plain = make()
    for ours, exact in zip(root.norm.parameters(), root.plain.parameters(), strict=True):
        value = torch.randn(96, generator=torch.Generator().manual_seed(6))
        ours.data.copy_(value)
        exact.data.copy_(value)
    load(root)
    assert found() == {"norm.rsqrt": "nli-32"}
    rows = x(7, 3, 96) * 5
    calls = [(rows,), (rows, x(7, 3, 96).flip(0))] if "RMS" in type(root.norm).__name__ else [(rows,)]
    for call in calls:
        got, exact = root.norm(*call), root.plain(*(argument.clone() for argument in call))
        if len(call) == 2:
            assert torch.equal(got[1], exact[1])
            got, exact = got[0], exact[0]
        assert got.dtype == DTYPE and torch.allclose(got.float(), exact.float(), rtol=2**-7, atol=2**-7)
        assert not torch.equal(got, exact)


def test_gemmas_weights_are_read_after_loading() -> None:
    root: Any = nn.Module()
    with building({"rsqrt": "nli-4"}):
        root.norm = layernorm.GemmaRMSNorm(32)
        root.norm.weight.data.fill_(0.5)
        load(root)
        table = luts.lut_table("rsqrt", "nli-4", torch.float16)
        expected = norm.rms_norm(x(4, 32), torch.full((32,), 1.5, dtype=torch.float32), table, 1e-6)
        assert torch.equal(root.norm(x(4, 32)), expected)
        root.norm.weight.data.fill_(1.0)
        load(root)
        assert not torch.equal(root.norm(x(4, 32)), expected)


def test_a_norm_over_a_part_of_its_row_is_refused() -> None:
    root = nn.Module()
    with building({"rsqrt": "nli-4"}), pytest.raises(UserError, match="part of its row"):
        root.norm = layernorm.RMSNorm(64, var_hidden_size=32)
        load(root)


def test_layers_of_names() -> None:
    cases = {
        "model.layers.3.mlp.act_fn": "model.layers.3",
        "transformer.h.11.ln_1": "transformer.h.11",
        "model.layers.3": "model.layers.3",
        "model.layers.0.mlp.experts.7": "model.layers.0",
        "model.norm": "",
        "model.layer3.norm": "",
        "": "",
    }
    assert {name: names.layer_of(name) for name in cases} == cases


def test_nothing_is_watched_outside_of_vllm() -> None:
    root = nn.Module()
    root.act = nn.GELU()
    assert type(root.act) is nn.GELU and not names.is_held(root.act)
    with building(None):
        root.other = nn.GELU()
    assert type(root.other) is nn.GELU and names.name_of(root.other) == "other"


def test_saturations_are_counted_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saturation, "in_dummy_run", lambda: False)
    built({"silu": "nli-4", "rsqrt": "nli-4"})
    assert saturation.COUNTERS == {}
    root = built({"silu": "nli-4", "gelu": "nli-4", "rsqrt": "nli-4"}, count_saturations=True)
    assert saturation.totals() == {"silu": 0, "gelu": 0}
    layer: Any = root.model.layers[1]
    gate = torch.zeros(2, 64).to(DTYPE)
    gate[0, :4] = torch.tensor([-20.25, -20.5, -torch.inf, torch.nan])
    gate[1, 0] = torch.inf
    gate[1, 32:] = -1000  # up, which the table never sees
    layer.mlp.act_fn(gate)
    layer.mlp.act_fn(gate)
    assert saturation.totals() == {"silu": 6, "gelu": 0}
    layer.mlp.act(gate)
    assert saturation.totals() == {"silu": 6, "gelu": 2}


def test_warm_up_is_not_counted() -> None:
    root = built({"silu": "nli-4"}, count_saturations=True)
    root.model.layers[0].mlp.act_fn(torch.full((1, 64), -100.0).to(DTYPE))  # type: ignore[union-attr,index]
    assert saturation.totals() == {"silu": 0}


def test_counter_of_another_kind_is_refused() -> None:
    with pytest.raises(RuntimeError, match="int64"):
        saturation.count_outside(x(4), torch.zeros(1), -1.0, 1.0)


def test_metrics() -> None:
    collector = LutserveCollector()
    recipe = {
        "luts": {"layers.1.silu": "nli-16", "silu": "nli-4", "gelu": "nli-2"},
        "count_saturations": True,
    }
    collector.recipe = parse(recipe)
    collector.sites = [
        {"site": "silu", "module": f"model.layers.{i}.mlp.act_fn", "spec": spec, "table": table}
        for i, (spec, table) in enumerate((("nli-4", "aa"), ("nli-16", "bb"), ("nli-4", "aa")))
    ]
    collector.saturations = {"silu": 12}
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    info = [line for line in text.splitlines() if line.startswith("lutserve:recipe_info")]
    assert [line for line in info if 'site="silu"' in line] == [
        'lutserve:recipe_info{choice="nli-4",site="silu",table="aa"} 1.0',
        'lutserve:recipe_info{choice="nli-16",site="silu",table="bb"} 1.0',
    ]
    assert 'lutserve:recipe_info{choice="nli-2",site="gelu",table=""} 1.0' in info
    assert 'lutserve:lut_saturations_total{site="silu"} 12.0' in text
    collector.recipe = parse({"luts": {"silu": "nli-4"}})
    assert "saturations" not in generate_latest(registry).decode()


def test_experts_with_the_activation_inside_their_kernel_are_refused() -> None:
    experts: Any = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(experts)
    experts.layer_name, experts.quant_method = "model.layers.0.mlp.experts", object()
    for tables in ({"silu": "exact"}, {"rsqrt": "nli-4"}):
        with building(tables):
            moe.check(experts)
    with (
        building({"silu": "nli-4"}),
        pytest.raises(UserError, match=r"layers\.0\.mlp\.experts: .*fused kernel"),
    ):
        nn.Module().experts = experts
