"""Tender's integers: the rule a second time by scalars, its properties, and the layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from test_codebook_method import _clean_reports, _one_device  # noqa: F401
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from lutserve import methods
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.quant_methods.tender import GROUPS, TenderLinearMethod
from lutserve.quantizers.tender import CHUNK, quantize_weight, round_activations


def scalar_chunk(rows: list[list[float]], bits: int, groups: int) -> list[list[float]]:
    """Channel by channel, from the largest threshold down."""
    most = 2 ** (bits - 1) - 1
    columns = [list(column) for column in zip(*rows, strict=True)]
    middles = [(max(column) + min(column)) / 2 for column in columns]
    sizes = [max(abs(x - m) for x in column) for column, m in zip(columns, middles, strict=True)]
    out = []
    for column, middle, size in zip(columns, middles, sizes, strict=True):
        threshold = max(sizes)
        for _ in range(groups - 1):
            if threshold / 2 >= size:
                threshold /= 2
        scale = threshold / most
        out.append([round((x - middle) / scale) * scale + middle if scale else middle for x in column])
    return [list(row) for row in zip(*out, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 9),
    st.sampled_from([(8, 4), (8, 8), (4, 8), (4, 14)]),
    st.integers(0, 999),
)
def test_activations_by_scalars(tokens: int, k: int, kind: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Quarters and powers of two: sums, differences and thresholds are exact.
    x = torch.randint(-64, 65, (tokens, k), generator=generator) / 4
    x *= 2.0 ** torch.randint(-6, 3, (k,), generator=generator)
    expected = torch.tensor(scalar_chunk(x.tolist(), *kind), dtype=torch.float64)
    found = round_activations(x, *kind)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    # A quotient next to a half may fall to either side in fp32.
    off, bound = (found.double() - expected).abs(), x.abs().amax() * 1e-6 + 1e-12
    assert (off <= x.abs().amax() * 2 / (2 ** (kind[0] - 1) - 1) + bound).all()
    assert (off <= bound).double().mean() > 0.9


@pytest.mark.parametrize("bits", [8, 4])
def test_weights(bits: int) -> None:
    weight = torch.randn(33, 70, generator=torch.Generator().manual_seed(0))
    weight[5] = 0
    codes, scales = quantize_weight(weight.bfloat16(), bits)
    most = 2 ** (bits - 1) - 1
    assert (
        codes.shape == weight.shape and scales.shape == (33, 1) and scales[5] == 0 and (codes[5] == 0).all()
    )
    assert (codes == codes.round()).all() and (codes.abs().amax(1) == most)[torch.arange(33) != 5].all()
    assert ((codes * scales - weight.bfloat16().float()).abs() <= scales / 2 * (1 + 1e-5)).all()


def test_chunks_do_not_meet_and_constant_channels_are_exact() -> None:
    x = torch.randn(2 * CHUNK + 3, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 7.25
    found = round_activations(x, 8, 4)
    assert torch.equal(found[CHUNK : 2 * CHUNK], round_activations(x[CHUNK : 2 * CHUNK], 8, 4))
    assert torch.equal(found[:, 3], x[:, 3])
    assert 0 < ((found - x).norm() / x.norm()).item() < 0.02
    x[1, 2] = torch.nan
    again = round_activations(x, 8, 4)
    assert again[:CHUNK].isnan().any() and torch.equal(again[CHUNK:], found[CHUNK:])
    assert round_activations(x[:0], 8, 4).shape == (0, 16)


def test_more_groups_keep_small_channels() -> None:
    """A channel 2^-7 as large as the largest loses all its bits in one group, few in eight."""
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0**-7])
    errors = [
        ((round_activations(x, 4, groups) - x)[:, 1].norm() / x[:, 1].norm()).item() for groups in (1, 8)
    ]
    assert errors[0] > 0.5 and errors[1] < 0.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "most"), [("tender8", 0.02), ("tender4", 0.3)])
def test_the_layer(name: str, most: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    report = REPORTS.layers["layer"] = LayerReport("layer", name)
    method = TenderLinearMethod(methods.get(name), report, "llama")
    layer = torch.nn.Module()
    layer.quant_method = method
    method.create_weights(layer, 64, [33, 7], 64, 40, dtype, weight_loader=default_weight_loader)
    weight = torch.randn(40, 64, generator=generator).to(dtype)
    layer.weight.weight_loader(layer.weight, weight)
    x, bias = torch.randn(2, 3, 64, generator=generator).to(dtype), torch.randn(40).to(dtype)
    out = method.apply(layer, x, bias)
    bits = methods.get(name).activations
    codes, scales = quantize_weight(weight, bits)
    rounded = round_activations(x.view(6, 64), bits, GROUPS[""][bits])
    exact = rounded.double() @ (codes * scales).double().T + bias.double()
    assert out.shape == (2, 3, 40) and out.dtype == dtype and report.done and layer.weight.numel() == 0
    assert ((out.view(6, 40).double() - exact).norm() / exact.norm()).item() < 5e-3
    wanted = x.view(6, 64).double() @ weight.double().T + bias.double()
    assert ((exact - wanted).norm() / wanted.norm()).item() < most
    assert report.bits == pytest.approx(bits + 32 / 64)
