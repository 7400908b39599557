"""What a search simulates: products of every family of methods, and models whose operators are replaced."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import hf_reference
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from lutserve import formats
from lutserve.kernels import lut_gemm
from lutserve.kernels.axcore_reference import axcore_linear
from lutserve.layers.names import layer_of
from lutserve.quantizers import rtn
from lutserve.quantizers.axcore import axcore
from lutserve.recipe import Group
from lutserve.search import arithmetic
from lutserve.search.candidates import Candidate, TableCandidate
from lutserve.search.simulation import Simulation, batches


def data(m: int = 5, n: int = 64, k: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(m, k, generator=generator).bfloat16().float()
    return x, torch.randn(n, k, generator=generator).bfloat16().float()


def product(method: str, weight: Tensor, x: Tensor, group_size: int = 32) -> Tensor:
    return arithmetic.product(weight, Group(method=method, group_size=group_size))(x)


def scalar_int8(values: list[float]) -> list[float]:
    """Round to 127 steps of the largest magnitude, ties to even, and back; every step in fp32."""
    peak = np.float32(max(abs(v) for v in values))
    inverse, step = np.float32(127) / peak, peak / np.float32(127)
    return [float(np.float32(round(float(np.float32(v) * inverse))) * step) for v in values]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def test_int8_is_integers_by_rows() -> None:
    x, weight = data()
    want = [[dot(scalar_int8(r), scalar_int8(w)) for w in weight.tolist()] for r in x.tolist()]
    assert product("int8", weight, x).tolist() == [pytest.approx(row, rel=1e-4, abs=1e-4) for row in want]


def test_a_format_alone_rounds_the_weight() -> None:
    x, weight = data()
    assert torch.equal(product("nf4", weight, x), x @ rtn(weight, "nf4", 32).dequantize().T)
    assert torch.equal(product("none", weight, x), x @ weight.T)


@pytest.mark.parametrize("method", ["int4+a8", "nf4+a8"])
def test_a8_is_the_served_operator(method: str) -> None:
    x, weight = data(k=80)  # the last group is short
    book = formats.get(method.partition("+")[0])
    image, rounded = book.int8_table(), rtn(weight, book, 32)
    table = torch.tensor(image.values, dtype=torch.float32).view(1, 1, 16)
    packed, scales = lut_gemm.pack(rounded.codes), lut_gemm.pack_scales(rounded.scales * image.scale)
    served = lut_gemm.lut_gemm(x[None].bfloat16(), packed, table, scales, None, 32, 64, None, True)
    torch.testing.assert_close(product(method, weight, x), served.float(), rtol=1e-2, atol=0.05)
    effect = product(method, weight, x) - product(book.name, weight, x)
    assert effect.abs().mean() > 1e-3


def test_a4_rounds_activations_to_the_format() -> None:
    x, weight = data(m=2, n=64, k=32)
    values = formats.get("nf4").values
    rows = []
    for row in x.tolist():
        scale = max(abs(v) for v in row) / max(values)
        rows.append([scale * min(values, key=lambda v, t=v_: abs(v - t / scale)) for v_ in row])
    want = torch.tensor(rows) @ rtn(weight, "nf4", 32).dequantize().T
    torch.testing.assert_close(product("nf4+a4", weight, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["mix8", "llm-int8", "mix4"])
def test_outlier_columns_stay_in_16_bit(method: str) -> None:
    x, weight = data(m=64, k=256)
    x = x.clamp(-4, 4)
    x[:, 7] = x[:, 7] * 100 + 300  # in every row, so it is worth a place among mix8's columns
    got = product(method, weight, x)
    rest = x.index_fill(1, torch.tensor([7]), 0)
    inner = "int4+a8" if method == "mix4" else "int8"
    want = product(inner, weight.index_fill(1, torch.tensor([7]), 0) if inner == "none" else weight, rest)
    want = want + x[:, 7:8].bfloat16().float() * weight[:, 7]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)
    # Without the columns the rest of the row would be lost.
    plain = product("int8", weight, x) - x @ weight.T
    assert (got - x @ weight.T).square().mean() < 0.5 * plain.square().mean()


@pytest.mark.parametrize(("method", "compensation"), [("axcore", True), ("axcore-plus", "class")])
def test_axcore_is_products_by_addition(method: str, compensation: Any) -> None:
    x, weight = data()
    blocks = axcore(weight, 32, compensation=compensation)
    parts = blocks.codes, blocks.scales, blocks.types, 32
    strict = axcore_linear(x.half(), *parts, numerics="strict", compensation=compensation).float()
    got = product(method, weight, x)
    torch.testing.assert_close(got, strict, rtol=0.02, atol=0.25)
    assert (got - x @ blocks.dequantize().T).abs().mean() > 1e-3, "approximate products, not exact ones"
    # Beyond fp16 it saturates, it does not overflow.
    spike = torch.zeros(1, 96)
    spike[0, 0] = 1e6
    assert product(method, weight / 1000, spike).isfinite().all()


SITES = {
    "llama": ("silu", "softmax_exp", "rsqrt"),
    "qwen3": ("silu", "softmax_exp", "rsqrt"),
    "gemma": ("gelu", "softmax_exp"),
    "gpt2": ("gelu", "softmax_exp", "rsqrt"),
    "opt-gelu": ("gelu", "softmax_exp", "rsqrt"),
    "opt-relu": ("softmax_exp", "rsqrt"),
}


def chances(simulation: Simulation, windows: list[Tensor]) -> Tensor:
    return torch.cat([logs for logs, _ in simulation.log_probs(simulation.hidden_of(windows))])


@pytest.mark.parametrize("family", SITES)
def test_a_simulated_model_is_the_model(family: str, tmp_path: Path) -> None:
    """In fp32, on weights in 16 bit; with tables it is an independent implementation of them."""
    folder = families.write(tmp_path / family, family, torch.bfloat16)
    windows = [torch.tensor(ids) for ids in families.prompts(2, 24)]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="tables"
    ).eval()
    with torch.no_grad():
        exact = model(torch.stack(windows)).logits.log_softmax(-1).flatten(0, 1)
    plain = Simulation(folder)
    assert all(op.weight.dtype == torch.bfloat16 for ops in plain.operators.values() for op in ops)
    # Gemma multiplies its embeddings by a number that it rounds to 16 bit.
    close = {"rtol": 0, "atol": 0.1 if family == "gemma" else 2e-4}
    torch.testing.assert_close(chances(plain, windows), exact, **close)
    simulation = Simulation(folder, SITES[family])
    base = chances(simulation, windows)
    torch.testing.assert_close(base, exact, **close)
    for site in SITES[family]:
        name = f"{simulation.arch.blocks}.1.{site}"
        with simulation.replaced({name: TableCandidate("nli-2").replacement}):
            got = chances(simulation, windows)
        stem = name.removesuffix(f".{site}")
        copy = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="tables"
        ).eval()
        hf_reference.use_tables(
            copy, lambda s, n, site=site, stem=stem: "nli-2" if (s, layer_of(n)) == (site, stem) else "exact"
        )
        with torch.no_grad():
            want = copy(torch.stack(windows)).logits.log_softmax(-1).flatten(0, 1)
        effect = (got - base).abs().mean()
        difference = (got - base) - (want - exact)
        assert difference.abs().mean() < 0.2 * effect and effect > 1e-5, site


def test_windows_go_through_together(tmp_path: Path) -> None:
    simulation = Simulation(families.write(tmp_path / "llama", "llama"))
    windows = [torch.tensor(ids) for ids in families.prompts(3, 24)]
    assert [len(batch) for batch in batches(windows)] == [3]
    alone = torch.cat([simulation.hidden_of([window]) for window in windows])
    torch.testing.assert_close(simulation.hidden_of(windows), alone, rtol=1e-4, atol=1e-4)
    reference = simulation.hidden_of(windows)
    assert simulation.kl(windows, reference) == 0
    with simulation.replaced({name: Candidate("int4", 32).replacement for name in simulation.sites}):
        assert simulation.kl(windows, reference) > 1e-3
    assert simulation.kl(windows, reference) == 0, "replacements are undone"
