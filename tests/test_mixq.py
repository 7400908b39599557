"""The served mix8 arithmetic: operators against their reference, the layer against its properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from lutserve import luts
from lutserve.kernels import activation, library, mixq
from lutserve.kernels.reference import quantize_rows
from lutserve.methods import METHODS
from lutserve.quant_methods import mixq as method
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.quant_methods.mixq import KERNELS, MixqKernel
from lutserve.quantizers.outliers import PRIOR_ROWS, THRESHOLD, capacity
from lutserve.recipe import Group

DTYPES = [torch.float16, torch.bfloat16]
SHAPES = [(1, 576), (5, 100), (7, 2048), (33, 1536), (0, 64), (3, 33), (2, 1), (4, 31)]


@pytest.fixture(autouse=True)
def _not_in_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # Outside of a server there is no forward context, which the layer takes for vLLM's dummy run.
    monkeypatch.setattr(method, "in_dummy_run", lambda: False)
    library.load()


def places(k: int, columns: list[int], padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and keep bits of some outlier columns, built one bit at a time."""
    words = [0] * -(-k // 32)
    for column in range(k):
        if column not in columns:
            words[column // 32] |= 1 << column % 32
    keep = np.array(words, dtype=np.uint32).view(np.int32)
    return torch.tensor([*columns, *[-1] * padding], dtype=torch.int32), torch.from_numpy(keep)


def scalar_prepare(row: list[float], columns: list[int]) -> tuple[list[int], float]:
    """Codes and scale of one finite row in fp32 steps, by numpy scalars."""
    rest = [0.0 if k in columns else value for k, value in enumerate(row)]
    peak = np.float32(max(map(abs, rest), default=0))
    if peak <= 1e-30:
        return [0] * len(row), 0.0
    inverse = np.float32(127) / peak
    return [int(np.rint(np.float32(value) * inverse)) for value in rest], float(peak / np.float32(127))


def sample(m: int, k: int, dtype: torch.dtype, seed: int = 0, spread: float = 0.0) -> torch.Tensor:
    """Gaussian rows; `spread` is the standard deviation of the logarithm of their sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.exp(torch.randn(m, 1, generator=generator) * spread)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_prepare_equals_the_reference_and_the_scalar_rule(m: int, k: int, dtype: torch.dtype) -> None:
    x = sample(m, k, dtype, spread=3.0)
    if m > 2:
        x[1] = 0
        x[2, k // 2] = torch.finfo(dtype).max
    columns = sorted(torch.randperm(k)[: k // 8].tolist())
    index, keep = places(k, columns, padding=3)
    before = x.clone()
    ours, reference = mixq.prepare(x, index, keep), mixq._reference(x, index, keep)
    assert torch.equal(x.view(torch.int16), before.view(torch.int16))
    for ours_part, reference_part in zip(ours[:3], reference[:3], strict=True):
        assert ours_part.dtype == reference_part.dtype
        assert torch.equal(ours_part, reference_part)
    torch.testing.assert_close(ours[3:], reference[3:], rtol=1e-5, atol=0)
    for r in range(m):
        codes, scale = scalar_prepare(x[r].float().tolist(), columns)
        assert (ours[0][r].tolist(), ours[1][r].item()) == (codes, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_is_quantised_alike(dtype: torch.dtype) -> None:
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[torch.isfinite(patterns)]
    for rows in (finite[:, None], finite[: len(finite) // 16 * 16].view(16, -1)):
        index, keep = places(rows.shape[1], [])
        ours, reference = mixq.prepare(rows, index, keep), mixq._reference(rows, index, keep)
        assert torch.equal(ours[0], reference[0]) and torch.equal(ours[1], reference[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_reaches_the_result(dtype: torch.dtype, bad: float) -> None:
    x = sample(3, 70, dtype)
    x[1, 69] = bad
    scales = mixq.prepare(x, *places(70, []))[1][:, 0]
    assert not math.isfinite(scales[1].item())
    assert scales[[0, 2]].isfinite().all()
    assert mixq.prepare(x, *places(70, [69]))[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "s", "n"), [(1, 16, 64), (3, 5, 37), (8, 96, 130), (9, 16, 1), (4, 1, 257), (0, 16, 8)]
)
def test_add_outliers(m: int, s: int, n: int, dtype: torch.dtype) -> None:
    out, side, weight = sample(m, n, dtype, 1), sample(m, s, dtype, 2), sample(s, n, dtype, 3)
    exact = out.double() + side.double() @ weight.double()
    guarded = torch.full((m * n + 64,), math.nan, dtype=dtype)
    guarded[: m * n] = out.flatten()
    mixq.add_outliers(guarded[: m * n].view(m, n), side, weight)
    assert guarded[m * n :].isnan().all()
    size = out.double().abs() + side.double().abs() @ weight.double().abs()
    error = (guarded[: m * n].view(m, n).double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + size * 1e-6 + 1e-7).all()


def test_operators_are_sound_for_torch_compile() -> None:
    x = sample(3, 100, torch.bfloat16)
    torch.library.opcheck(mixq.prepare, (x, *places(100, [1, 5])))
    torch.library.opcheck(
        mixq.add_outliers,
        (sample(2, 40, torch.float16), sample(2, 16, torch.float16), sample(16, 40, torch.float16)),
    )


def test_wrong_arguments_are_refused() -> None:
    index, keep = places(64, [])
    for bad in (torch.zeros(2, 64), torch.zeros(64).half(), torch.zeros(2, 100).half()):
        with pytest.raises(RuntimeError, match="mixq_prepare"):
            mixq.prepare(bad, index, keep)


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


def weight_and_input(
    dtype: torch.dtype, outliers: dict[int, float], m: int = 12
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, x = (
        sample(96, 512, dtype, 4) * 0.05,
        torch.randn(m, 512, generator=torch.Generator().manual_seed(5)).to(dtype),
    )
    for column, value in outliers.items():
        x[:, column] = value
    return weight, x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [3, 12])
def test_outlier_columns_are_found_in_the_call_that_meets_them(dtype: torch.dtype, m: int) -> None:
    weight, x = weight_and_input(dtype, {7: 300.0, 200: -150.0}, m)
    exact = x.double() @ weight.double().T
    mix8, int8 = MixqKernel(weight, outliers=True), MixqKernel(weight, outliers=False)
    before = x.clone()
    error, plain = relative_error(mix8(x), exact), relative_error(int8(x), exact)
    assert torch.equal(x, before)
    assert {7, 200} <= set(mix8.slots.index.tolist())
    # The larger outlier hides the smaller one at first; both are found in this call.
    assert mix8.slots.misses >= 1 and int8.slots.misses == 0
    assert error < 0.015
    assert error < plain / 3
    # Known from now on: nothing changes, and a fresh layer with the same columns gives the same answer.
    misses = mix8.slots.misses
    again = mix8(x)
    assert mix8.slots.misses == misses
    assert relative_error(again, exact) == error


def test_a_layer_built_while_the_default_dtype_is_the_models() -> None:
    """As vLLM builds it: helper tensors must not silently become 16-bit."""
    weight, x = weight_and_input(torch.bfloat16, {7: 300.0})
    expected = MixqKernel(weight, outliers=True)(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        kernel = MixqKernel(weight, outliers=True)
        out = kernel(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert kernel.slots.excess.dtype == torch.float32
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_outliers_mix8_is_int8_to_the_bit(dtype: torch.dtype) -> None:
    weight, x = weight_and_input(dtype, {})
    assert torch.equal(MixqKernel(weight, outliers=True)(x), MixqKernel(weight, outliers=False)(x))


def test_slots_hold_the_quantised_weight_rounded_once() -> None:
    weight, x = weight_and_input(torch.float16, {3: 400.0})
    kernel = MixqKernel(weight, outliers=True)
    kernel(x)
    place = kernel.slots.index.tolist().index(3)
    codes, scales = quantize_rows(weight)
    assert torch.equal(kernel.slots.weight[place], (codes[:, 3] * scales).half())
    assert not kernel.slots.weight[kernel.slots.index < 0].any()


def test_capacity_keeps_the_columns_that_pay_most() -> None:
    weight = sample(16, 512, torch.bfloat16)
    kernel = MixqKernel(weight, outliers=True)
    limit = capacity(512)
    # One row an outlier column, all above the threshold: as many weak ones as strong ones.
    x = torch.ones(2 * limit, 512, dtype=torch.bfloat16)
    diagonal = torch.arange(2 * limit)
    x[diagonal, diagonal] = torch.cat(
        [torch.linspace(25, 30, limit), torch.linspace(100, 200, limit)]
    ).bfloat16()
    kernel(x.repeat(10, 1))
    assert kernel.slots.count == limit
    kept = torch.zeros(512, dtype=torch.bool)
    kept[kernel.slots.index[kernel.slots.index >= 0].long()] = True
    assert kept.nonzero()[:, 0].tolist() == list(range(limit, 2 * limit))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 5])
def test_bias_is_added_once(m: int, dtype: torch.dtype) -> None:
    weight, x = weight_and_input(dtype, {3: 200.0}, m)
    bias = torch.linspace(-500, 500, 96).to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    assert relative_error(MixqKernel(weight, outliers=True)(x, bias), exact) < 0.01


def test_dummy_runs_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weight_and_input(torch.bfloat16, {3: 200.0})
    kernel = MixqKernel(weight, outliers=True)
    monkeypatch.setattr(method, "in_dummy_run", lambda: True)
    kernel(x)
    assert (kernel.slots.count, kernel.slots.misses) == (0, 0)


def test_a_chance_value_fills_no_slot_but_a_frequent_one_does() -> None:
    weight, x = sample(16, 2048, torch.bfloat16), torch.ones(64, 2048, dtype=torch.bfloat16)
    x[0, 5] = 11.5
    x[:, 9] = 13.0
    kernel = MixqKernel(weight, outliers=True)
    kernel(x)
    assert [column for column in kernel.slots.index.tolist() if column >= 0] == [9]


def test_learning_grows_rarer_while_nothing_changes() -> None:
    weight, x = sample(16, 2048, torch.bfloat16), torch.ones(1, 2048, dtype=torch.bfloat16)
    x[0, 5] = 10.3125
    kernel = MixqKernel(weight, outliers=True)
    for _ in range(200):
        kernel(x)
    seen = kernel.slots.rows - PRIOR_ROWS
    assert kernel.slots.misses == 200
    assert 3 < seen < 20


@given(st.integers(1, 5000))
def test_capacity_bounds(k: int) -> None:
    assert 0 < capacity(k) <= min(k, 128)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(17, 300), st.floats(1e-6, 1e6))
def test_any_scale_gives_a_finite_answer_near_the_exact_one(seed: int, m: int, k: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, k, generator=generator).bfloat16()
    x = (torch.randn(m, k, generator=generator) * factor).bfloat16()
    exact = x.double() @ weight.double().T
    out = MixqKernel(weight, outliers=True)(x)
    assert out.isfinite().all()
    assert relative_error(out, exact) < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_extreme_rows(dtype: torch.dtype) -> None:
    weight = sample(32, 64, dtype) * 0.01
    x = torch.zeros(4, 64, dtype=dtype)
    x[1], x[2, 0], x[3] = 1e-6, 60000.0, 30.0
    out = MixqKernel(weight, outliers=True)(x)
    assert out.isfinite().all()
    assert not out[0].any()


def test_the_layer_under_torch_compile_equals_eager() -> None:
    weight, x = weight_and_input(torch.bfloat16, {9: 250.0})
    report = REPORTS.layers["compiled"] = LayerReport("compiled", "mix8")
    layer = torch.nn.Module()
    layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    linear = method.linear_method(METHODS["mix8"], Group(method="mix8"), report)
    try:
        linear.process_weights_after_loading(layer)
        eager = linear.apply(layer, x[None])
        compiled = torch.compile(lambda t: linear.apply(layer, t * 1), fullgraph=True)(x[None])
    finally:
        del REPORTS.layers["compiled"], KERNELS["compiled"]
    assert layer.weight.numel() == 0 and report.weights == weight.numel() and report.done
    assert eager.shape == (1, 12, 96)
    assert torch.equal(compiled, eager)


def test_threshold_is_where_the_design_puts_it() -> None:
    """A value at the threshold stays in the int8 part, one above it does not."""
    weight = sample(8, 2048, torch.bfloat16)
    x = torch.ones(100, 2048, dtype=torch.bfloat16)
    for value, found in ((THRESHOLD * 0.9, 0), (THRESHOLD * 1.25, 1)):
        x[:, 0] = value
        kernel = MixqKernel(weight, outliers=True)
        kernel(x)
        assert kernel.slots.count == found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_gate_and_prepare_equals_its_two_parts_in_bits(m: int, k: int, dtype: torch.dtype) -> None:
    """Any patterns, NaN, infinities and subnormals among them, through a table of any entries."""
    numbers = np.random.default_rng(m * k)
    table = torch.from_numpy(numbers.permutation(65536).astype(np.uint16).view(np.int16)).view(dtype)
    table[~table.isfinite()] = 0
    patterns = numbers.integers(0, 65536, (m, 2 * k), dtype=np.uint16).view(np.int16)
    x = torch.from_numpy(patterns).view(dtype)
    if m > 2:
        x[2, k:] = 0.0
    index, keep = places(k, sorted(numbers.permutation(k)[: k // 8].tolist()), padding=2)
    product = activation.act_and_mul(x, table)
    expected = (product, *mixq.prepare(product, index, keep))
    for name, found in (
        ("kernel", mixq.gate_and_prepare(x, table, index, keep)),
        ("strided", mixq.gate_and_prepare(torch.cat([x, x], 1)[:, : 2 * k], table, index, keep)),
    ):
        for ours, two in zip(found, expected, strict=True):
            assert ours.dtype == two.dtype and ours.shape == two.shape, name
            assert torch.equal(ours.contiguous().view(torch.int8), two.contiguous().view(torch.int8)), name
    # The reference from finite inputs, as its NaNs may have other payloads.
    finite = torch.where(x.isfinite() & (x.abs() < 100), x, 1)
    table = luts.lut_table("silu", "nli-4", dtype)
    ours = mixq.gate_and_prepare(finite, table, index, keep)
    reference = mixq._gate_reference(finite, table, index, keep)
    for a, b in zip(ours[:4], reference[:4], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(ours[4:], reference[4:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gate_is_quantised_as_by_two_operators(dtype: torch.dtype) -> None:
    gates = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    up = sample(64, 1024, dtype, 3)
    table = luts.lut_table("silu", "nli-4", dtype)
    index, keep = places(1024, [3, 500])
    found = mixq.gate_and_prepare(torch.cat([gates, up], 1), table, index, keep)
    product = activation.act_and_mul(torch.cat([gates, up], 1), table)
    for ours, two in zip(found, (product, *mixq.prepare(product, index, keep)), strict=True):
        assert torch.equal(ours.contiguous().view(torch.int8), two.contiguous().view(torch.int8))


def test_gate_and_prepare_is_sound_and_refuses_what_does_not_fit() -> None:
    x, table = sample(3, 200, torch.bfloat16), luts.lut_table("silu", "nli-4", torch.bfloat16)
    index, keep = places(100, [1, 5])
    torch.library.opcheck(mixq.gate_and_prepare, (x, table, index, keep))
    for bad in ((x[:, :199], table), (x, table.half()), (x.float(), table), (x[0], table), (x, table[:5])):
        with pytest.raises(RuntimeError):
            mixq.gate_and_prepare(*bad, index, keep)
    with pytest.raises(RuntimeError, match="keep"):
        mixq.gate_and_prepare(x, table, index, places(200, [])[1])


def test_a_layer_uses_what_was_prepared_and_nothing_else() -> None:
    weight, x = weight_and_input(torch.bfloat16, {7: 300.0})
    gated = torch.cat([x, sample(12, 512, torch.bfloat16, 6)], 1)
    table = luts.lut_table("silu", "nli-4", torch.bfloat16)
    ahead, plain = MixqKernel(weight, outliers=True), MixqKernel(weight, outliers=True)
    for _ in range(2):  # with and without learning
        product = ahead.gate(gated, table)
        assert torch.equal(product, activation.act_and_mul(gated, table))
        assert torch.equal(ahead(product), plain(product)) and ahead.ahead is None
        # An input that is not the one that was prepared is prepared itself.
        ahead.gate(gated, table)
        assert torch.equal(ahead(x), plain(x))
    assert ahead.slots.count == plain.slots.count > 0
