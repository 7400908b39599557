"""Calibrated outlier columns: the file, the states that start from it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from servers import SMALL
from tiny import tiny_llama
from typer.testing import CliRunner

pytest.importorskip("vllm")

from lutserve import methods
from lutserve.cli import app
from lutserve.errors import UserError
from lutserve.kernels import library, mixq
from lutserve.quant_methods import int8_gemm
from lutserve.quant_methods import mixq as method
from lutserve.quant_methods.config import REPORTS, LayerReport
from lutserve.quant_methods.int4_gemm import W4A4, W4A8
from lutserve.quant_methods.mixq import KERNELS, W8A8, LlmInt8Kernel, MixqKernel
from lutserve.quantizers import columns, rtn
from lutserve.quantizers.calibrate import calibrate
from lutserve.quantizers.outliers import GAIN, OutlierSlots
from lutserve.recipe import Group, from_flags
from lutserve.server.client import http, running_server

N, K = 64, 320
PACKS = {
    "W8A8": W8A8.rounded,
    "W4A8": lambda weight, dropped: W4A8.rounded(weight, dropped, 64),
    "W4A8 rows": lambda weight, dropped: W4A8.rounded(weight, dropped, -1),
    "W4A4": W4A4.rounded,
}


@pytest.fixture(autouse=True)
def _exact_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    library.load()
    # Our own operator on every machine, and a forward pass that is no dummy run.
    monkeypatch.setattr(int8_gemm, "choose", int8_gemm.FusedGemm)
    monkeypatch.setattr(method, "in_dummy_run", lambda: False)


def case(
    seed: int = 0, m: int = 6, large: dict[int, float] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator).bfloat16() * 0.05
    x = torch.randn(m, K, generator=generator).bfloat16()
    for column, value in (large or {}).items():
        x[:, column] = value
    return weight, x


def gains(*chosen: int) -> torch.Tensor:
    gain = torch.zeros(K)
    gain[list(chosen)] = 10 * GAIN
    return gain


def error(out: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    exact = x.double() @ weight.double().T
    return ((out.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", PACKS)
def test_calibrated_columns_keep_the_checkpoints_weights(name: str) -> None:
    weight, x = case(large={7: 90.0, 200: -60.0})
    for static in (True, False):
        kernel = MixqKernel(weight, True, gains(7, 200), static, PACKS[name])
        assert kernel.slots.columns.tolist() == [7, 200]
        assert torch.equal(kernel.slots.weight[:2], weight[:, [7, 200]].T)
        before = x.clone()
        assert error(kernel(x), weight, x) < (0.01 if name == "W8A8" else 0.03)
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", PACKS)
def test_static_answers_do_not_depend_on_history(name: str) -> None:
    weight, x = case(large={7: 90.0})
    kernel = MixqKernel(weight, True, gains(7), True, PACKS[name])
    first = kernel(x)
    for column in (3, 100, 250):
        kernel(case(seed=column, large={column: 200.0})[1])
    assert kernel.slots.misses == 3 and kernel.slots.columns.tolist() == [7]
    assert torch.equal(kernel(x), first)


@pytest.mark.parametrize("name", PACKS)
def test_online_starts_from_the_calibration_and_goes_on_learning(name: str) -> None:
    weight, _ = case()
    kernel = MixqKernel(weight, True, gains(7), False, PACKS[name])
    x = case(seed=1, large={100: 200.0})[1]
    out = kernel(x)
    assert kernel.slots.columns.tolist() == [7, 100]
    # A fresh layer that holds the same columns gives the same answer from its first call on.
    fresh = MixqKernel(weight, True, gains(7), False, PACKS[name])
    fresh.slots.hold(torch.tensor([7, 100]))
    assert torch.equal(fresh(x), out) and fresh.slots.misses == 0


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, K - 1), min_size=1, max_size=40, unique=True), st.sampled_from(sorted(PACKS)))
def test_one_more_column_never_costs_accuracy(chosen: list[int], name: str) -> None:
    weight, x = case(large={5: 40.0, 77: 80.0})

    def layer(places: list[int]) -> float:
        kernel = MixqKernel(weight, True, gains(*places) if places else None, True, PACKS[name])
        assert kernel.slots.columns.tolist() == sorted(places)
        return error(kernel(x), weight, x)

    # Ordinary columns may move roundings about; the bound is their noise.
    assert layer(chosen) <= layer(chosen[1:]) * 1.15 + 2e-3


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(st.integers(0, K - 1), st.floats(30, 3000), max_size=6),
    st.sampled_from(sorted(PACKS)),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(0, 99),
)
def test_after_learning_a_layer_is_one_that_always_knew(
    large: dict[int, float], name: str, dtype: torch.dtype, seed: int
) -> None:
    weight, x = (tensor.to(dtype) for tensor in case(seed, large=large))
    kernel = MixqKernel(weight, True, None, False, PACKS[name])
    out = kernel(x)
    fresh = MixqKernel(weight, True, None, False, PACKS[name])
    fresh.slots.hold(kernel.slots.columns)
    # What is too weak for a place in the first call may still be there to learn from in a second.
    fresh.learning = False
    assert torch.equal(fresh(x), out) and torch.equal(fresh(x), out)
    assert kernel.slots.count <= len(large)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(PACKS)))
def test_no_finite_row_makes_a_nan(seed: int, name: str) -> None:
    """Any finite fp16 patterns: what overflows is infinite, and x stays as it is."""
    weight = case()[0].half()
    patterns = np.random.default_rng(seed).integers(0, 65536, (5, K), dtype=np.uint16).view(np.int16)
    x = torch.from_numpy(patterns).view(torch.float16)
    x[~x.isfinite()] = 65504.0
    x[1] *= 2.0**-14
    before = x.clone()
    out = MixqKernel(weight, True, gains(5, 77), False, PACKS[name])(x)
    assert not out.isnan().any() and torch.equal(x, before)


@pytest.mark.parametrize("name", PACKS)
def test_the_order_of_places_and_empty_ones_do_not_matter(name: str) -> None:
    weight, x = case(large={5: 40.0, 77: 80.0})
    kernel = MixqKernel(weight, True, gains(5, 77, 200), True, PACKS[name])
    out, slots = kernel(x).float(), kernel.slots
    order = torch.randperm(len(slots.index))
    slots.index, slots.weight = slots.index[order].contiguous(), slots.weight[order].contiguous()
    padded = torch.nn.functional.pad(slots.index, (0, 16), value=-1)
    assert torch.allclose(kernel(x).float(), out, rtol=2**-7, atol=1e-2)
    slots.index, slots.weight = padded, torch.nn.functional.pad(slots.weight, (0, 0, 0, 16))
    assert torch.allclose(kernel(x).float(), out, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_odd_rows(name: str, dtype: torch.dtype) -> None:
    weight = case()[0].to(dtype)
    kernel = MixqKernel(weight, True, gains(7), True, PACKS[name])
    x = torch.zeros(4, K, dtype=dtype)
    x[1], x[2, 3], x[3] = 1e-6, 60000.0, 30.0
    out = kernel(x)
    assert out.isfinite().all() and not out[0].any()
    assert kernel(x[:0]).shape == (0, N)
    bias = torch.linspace(-5, 5, N).to(dtype)
    assert torch.equal(kernel(x, bias)[0], bias)


@pytest.mark.parametrize(("n", "k", "group"), [(64, 320, 64), (1, 33, -1), (37, 100, 32), (5, 8, 128)])
def test_w4a8_equals_its_parts(n: int, k: int, group: int) -> None:
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(n, k, generator=generator).half()
    x = torch.randn(3, k, generator=generator).half()
    dropped = torch.tensor([1, k - 1])
    gemm = W4A8.rounded(weight, dropped, group)
    rest = weight.clone()
    rest[:, dropped] = 0
    expected = rtn(rest, "int4", group).dequantize()
    assert torch.equal(gemm.columns(torch.arange(k)).T, expected.half())
    assert gemm.bits >= 4 + 32 / k
    out = gemm._multiply(x, None, False)
    exact = x.double() @ expected.double().T
    assert ((out.double() - exact).norm() / exact.norm()).item() < 1e-3


def test_w4a4_follows_the_published_weights() -> None:
    from lutserve.kernels.reference import MixqLinear

    weight, x = (t.half() for t in case(large={7: 90.0}))
    published = MixqLinear(weight, bits=4, columns=torch.tensor([7]))
    kernel = MixqKernel(weight, True, gains(7), True, W4A4.rounded)
    assert torch.equal(kernel.gemm.codes, published.weight_codes)
    # Only the rounding of the activations' scale to fp16 differs.
    assert ((kernel(x) - published(x)).abs() <= 0.02 * published(x).abs() + 0.1).all()


def test_llm_int8_keeps_the_columns_of_the_call() -> None:
    weight, x = case(large={7: 90.0, 9: 6.125})
    kernel = LlmInt8Kernel(weight, False)
    assert error(kernel(x), weight, x) < 0.01
    assert kernel.slots.columns.tolist() == [7, 9]
    quiet = case(seed=3)[1].clamp(-6, 6)
    assert torch.equal(kernel(quiet), MixqKernel(weight, False)(quiet)) and kernel.slots.count == 0


@pytest.mark.parametrize(
    ("name", "pack", "chosen"),
    [("mix8_basic", W8A8, "ind"), ("mix8_static128", W8A8, "ind"), ("mix4_basic", W4A4, "fp_ind")],
)
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float16, 1.02), (torch.bfloat16, 1.5)])
def test_served_outputs_are_as_good_as_the_published_ones(
    shared: Path, name: str, pack: Any, chosen: str, dtype: torch.dtype, slack: float
) -> None:
    with np.load(shared / "golden/mixq" / f"{name}.npz") as arrays:
        known = {key: torch.from_numpy(arrays[key]) for key in arrays}
    weight, x = known["W"].to(dtype), known["X"].to(dtype)
    kernel = MixqKernel(weight, True, None, True, pack.rounded)
    kernel.slots.weight_rows = lambda places: weight[:, places].t()
    kernel.slots.hold(known[chosen].sort().values.long())
    published = known.get("out", known.get("out_sm80"))
    exact = known["exact"]
    limit = (published.double() - exact).norm() / exact.norm()
    assert (kernel(x).double() - exact).norm() / exact.norm() <= limit * slack
    if dtype == torch.float16 and pack is W8A8:
        codes = mixq.prepare(x, kernel.slots.index, kernel.slots.keep)[0]
        assert (codes.int() - known["q_x"].int()).abs().max() <= 1


def layer_of(
    name: str, group: dict[str, Any], leaf: str = "qkv_proj", parts: tuple[str, ...] = ()
) -> tuple[Any, MixqKernel]:
    """A layer as vLLM builds it, and its kernel."""
    report = LayerReport(f"model.layers.0.{leaf}", name, parts)
    linear = method.linear_method(methods.get(name), Group(method=name, **group), report)
    layer = torch.nn.Module()
    linear.input_size = K
    layer.register_parameter("weight", torch.nn.Parameter(case()[0], requires_grad=False))
    REPORTS.layers[report.prefix] = report
    try:
        linear.process_weights_after_loading(layer)
        return report, KERNELS[report.prefix]
    finally:
        REPORTS.layers.clear()
        KERNELS.clear()


def entry(name: str, *layers: str, chosen: tuple[int, ...] = (), k: int = K) -> columns.Columns:
    gain = torch.zeros(k)
    gain[list(chosen)] = 1.0
    return columns.Columns((name, *layers), torch.ones(k), gain)


def test_a_recipes_calibration_reaches_the_layer(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    inputs = [entry("model.layers.0.q_proj", "model.layers.0.k_proj", chosen=(3, 8))]
    columns.save(file, inputs, {"text": "none"})
    parts = ("model.layers.0.q_proj", "model.layers.0.k_proj")
    given = {"calibration": str(file), "outliers": "static"}
    _, kernel = layer_of("mix8", given, parts=parts)
    assert kernel.slots.columns.tolist() == [3, 8] and not kernel.learning
    report, kernel = layer_of("mix4", given | {"group_size": 64}, parts=parts)
    assert isinstance(kernel.gemm, W4A8) and kernel.gemm.group_size == 64 and report.bits < 5
    # What the calibrated columns hold is not in the 4-bit weight, so that the scales fit the others.
    assert not kernel.gemm.columns(torch.tensor([3, 8])).any()
    _, kernel = layer_of("mix4", given | {"outliers": "online"}, parts=parts)
    assert kernel.gemm.columns(torch.tensor([3, 8])).any() and kernel.slots.columns.tolist() == [3, 8]
    _, kernel = layer_of("mix4:a4", given, parts=parts)
    assert isinstance(kernel.gemm, W4A4)
    _, kernel = layer_of("int8", {})
    assert kernel.slots.count == 0 and not kernel.outliers
    with pytest.raises(UserError, match=r"has nothing for model.layers.0.other, which has 320 input"):
        layer_of("mix8", given, leaf="other")
    with pytest.raises(UserError, match=r"qkv_proj: group_size 12 is not a multiple of 8"):
        layer_of("mix4", {"group_size": 12})


def test_down_proj_has_8_bits_in_mix4() -> None:
    for leaf, kind in {"down_proj": W8A8, "o_proj": W4A8}.items():
        assert isinstance(layer_of("mix4", {}, leaf)[1].gemm, kind)


def test_a_device_takes_its_share_of_the_columns(tmp_path: Path) -> None:
    """As tensor parallelism cuts o_proj: this device has the second half of the input."""
    columns.save(tmp_path / "c.safetensors", [entry("o", chosen=(3, K + 8), k=2 * K)], {})
    report = REPORTS.layers["o"] = LayerReport("o", "mix8")
    group = Group(method="mix8", calibration=str(tmp_path / "c.safetensors"))
    linear, layer = method.linear_method(methods.get("mix8"), group, report), torch.nn.Module()
    layer.register_parameter("weight", torch.nn.Parameter(case()[0], requires_grad=False))
    layer.weight.tp_rank, linear.input_size = 1, 2 * K
    try:
        linear.process_weights_after_loading(layer)
        assert KERNELS["o"].slots.columns.tolist() == [8]
    finally:
        del REPORTS.layers["o"], KERNELS["o"]


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    columns.save(file, [entry("a", k=8)], {})
    with pytest.raises(UserError, match="has 8 columns for a, which has 16 input columns"):
        columns.Calibration(file).gain("a", (), 16)


def test_static_without_a_calibration_is_refused(tmp_path: Path) -> None:
    group = Group(method="mix8", outliers="static")
    with pytest.raises(UserError, match="static outlier columns need a calibration: `lutserve calibrate"):
        columns.calibration_of(group, str(tmp_path))
    columns.save(tmp_path / columns.FILE, [entry("a")], {})
    assert columns.calibration_of(group, str(tmp_path)) is not None
    assert columns.calibration_of(Group(method="int8"), str(tmp_path)) is None


@pytest.mark.parametrize("kind", ["missing", "text", "foreign", "cut", "shapes", "nan"])
def test_bad_files_are_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "c.safetensors"
    one = {"a.absmax": torch.ones(4), "a.gain": torch.ones(4)}
    schema = {"lutserve": json.dumps({"schema": columns.SCHEMA, "layers": {"a": ["a"]}})}
    if kind == "text":
        file.write_text("hello")
    elif kind == "foreign":
        save_file(one, file)
    elif kind == "cut":
        save_file({"a.gain": torch.ones(4)}, file, metadata=schema)
    elif kind == "shapes":
        save_file(one | {"a.gain": torch.ones(5)}, file, metadata=schema)
    elif kind == "nan":
        save_file(one | {"a.gain": torch.full((4,), torch.nan)}, file, metadata=schema)
    with pytest.raises(UserError, match="lutserve calibrate"):
        columns.Calibration(file)


def test_flags_make_the_recipe() -> None:
    made = from_flags(method="mix8", outliers="static", calibration="/c").config_groups["default"]
    assert (made.outliers, made.calibration) == ("static", "/c")
    again = from_flags(from_flags(method="mix4"), outliers="static").config_groups["default"]
    assert (again.method, again.outliers) == ("mix4", "static")
    for base, method_name in ((None, None), (None, "int8"), (None, "nf4")):
        with pytest.raises(UserError, match="need a --method with outlier columns: mix8, mix4"):
            from_flags(base, method_name, outliers="static")
    with pytest.raises(UserError, match="outliers='often'"):
        from_flags(method="mix8", outliers="often")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model whose columns 3 and 40 of every normed input are large, and its calibration."""
    folder = tiny_llama(tmp_path_factory.mktemp("model") / "tiny")
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[[3, 40]] *= 60
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = calibrate(folder, folder, text="pydoc", samples=4, length=32)
    return folder, file


def test_calibrate_finds_the_large_columns(calibrated: tuple[Path, Path]) -> None:
    folder, file = calibrated
    assert file == folder / columns.FILE and not list(file.parent.glob(".*"))
    calibration = columns.Calibration(file)
    assert calibration.facts["text"] == "pydoc"
    assert [len(e.layers) for e in calibration.inputs.values()] == [3, 1, 2, 1] * 2
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        found = calibration.inputs[f"model.layers.1.{name}"]
        slots = OutlierSlots(len(found.gain), lambda chosen: torch.empty(len(chosen), 0))
        slots.seed(found.gain)
        assert {3, 40} <= set(slots.columns.tolist())
        assert set(found.absmax.topk(2).indices.tolist()) == {3, 40}
    assert calibrate(folder, folder, text="pydoc", samples=4, length=32).read_bytes() == file.read_bytes()


def test_commands(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = calibrated
    out = tmp_path / "x.safetensors"
    flags = ["--calibration", "pydoc", "--samples", "2", "--sequence-length", "16"]
    done = CliRunner().invoke(app, ["calibrate", str(folder), "-o", str(out), *flags])
    assert done.exit_code == 0 and str(out) in done.output and out.is_file()
    shown = CliRunner().invoke(app, ["outliers", str(folder)])
    assert shown.exit_code == 0 and "model.layers.1.mlp.gate_proj" in shown.output
    refused = CliRunner().invoke(app, ["outliers", str(tmp_path)]).exception
    assert isinstance(refused, UserError) and "cannot read calibration" in str(refused)


def test_serve_refuses_static_columns_that_nobody_calibrated(tmp_path: Path) -> None:
    folder = str(tiny_llama(tmp_path / "plain"))
    command = [
        sys.executable,
        "-m",
        "lutserve.cli",
        "serve",
        folder,
        "--method",
        "mix8",
        "--outliers",
        "static",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("lutserve: error: static outlier columns need a calibration")


@pytest.mark.slow
def test_a_server_with_static_columns_answers_the_same_whatever_came_before(
    calibrated: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, file = calibrated
    args = ["--model", str(folder), "--method", "mix4", "--outliers", "static", *SMALL]
    with running_server(args, log=tmp_path / "log") as server, http(server.base_url) as web:

        def answer(prompt: str) -> str:
            request = {"model": server.model, "prompt": prompt, "max_tokens": 12, "temperature": 1, "seed": 5}
            return web.post("/v1/completions", json=request).raise_for_status().json()["choices"][0]["text"]

        before = answer("The river rises")
        for prompt in ("12 * 345", "def area(width, height)", "Yet the market opens"):
            answer(prompt)
        assert answer("The river rises") == before
        layers = {row["layer"]: row for row in web.get("/lutserve/layers").json()}
        shown = CliRunner().invoke(app, ["outliers", server.base_url])
    found = columns.Calibration(file).inputs["model.layers.1.mlp.gate_proj"].gain
    row = layers["model.layers.1.mlp.gate_up_proj"]
    assert {3, 40} <= set(row["outlier_slots"]) <= set(found.nonzero()[:, 0].tolist())
    assert row["outlier_columns"] == len(row["outlier_slots"]) and row["kernel"].startswith("lut_gemm")
    assert layers["model.layers.1.mlp.down_proj"]["kernel"].startswith("int8")
    assert shown.exit_code == 0 and "model.layers.1.mlp.gate_up_proj" in shown.output
