"""MixQ's checkpoints: both published layouts and ours, from the tensors to the answers of a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import SMALL, client
from tiny import tiny_llama
from typer.testing import CliRunner

pytest.importorskip("vllm")

from lutserve import comparison, methods, mixq_layout
from lutserve.cli import app
from lutserve.errors import UserError
from lutserve.kernels import library
from lutserve.kernels.mixq_reference import pack_int4, quantize_rows_fp16, quantize_weight_int4
from lutserve.kernels.reference import quantize_rows
from lutserve.quant_methods import int8_gemm
from lutserve.quant_methods import mixq as method
from lutserve.quant_methods.int4_gemm import W4A4, W4A8
from lutserve.quant_methods.mixq import W8A8, PackedLinear
from lutserve.quant_methods.quik import QuikLinear
from lutserve.quantizers import integers
from lutserve.quantizers.outliers import OutlierSlots
from lutserve.quantizers.settings import Settings
from lutserve.recipe import from_flags
from lutserve.server.client import http, running_server

COLUMNS = 16
PROMPT = list(range(10, 74))


def chosen(k: int) -> torch.Tensor:
    """Outlier columns of an input of width k, in no order."""
    return torch.randperm(k, generator=torch.Generator().manual_seed(1))[:COLUMNS]


PLACES = {k: sorted(chosen(k).tolist()) for k in (128, 256)}


@pytest.fixture(autouse=True)
def _exact_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    library.load()
    monkeypatch.setattr(int8_gemm, "choose", int8_gemm.FusedGemm)
    monkeypatch.setattr(method, "in_dummy_run", lambda: False)


def published(folder: Path, out: Path, bits: int, later: bool) -> dict[str, torch.Tensor]:
    """Write the folder of a tiny model as MixQ's tools would; return the weights that it stands for."""
    tensors = load_file(folder / "model.safetensors")
    exact: dict[str, torch.Tensor] = {}
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if "_proj." not in name:
            stored[name] = exact[name] = tensor.half()
            continue
        stem, weight = name.removesuffix(".weight"), tensor.half()
        leaf = stem.rpartition(".")[2]
        small = bits == 8 or leaf == "down_proj" or (leaf == "o_proj" and not later)
        # q, k and v (gate and up) share an input, and so the columns.
        places = chosen(weight.shape[1])
        if small:
            codes, scale = quantize_rows_fp16(weight, 127)
            kept = later
            stored[f"{stem}.{'weight' if later else 'q_weight'}"] = codes
        else:
            codes, scale = quantize_weight_int4(weight, places)
            kept = True
            stored[f"{stem}.{'weight' if later else 'q_weight'}"] = pack_int4(codes)
        stored[f"{stem}.scale_col"] = scale[None].clone()
        exact[name] = codes * scale.float()[:, None]
        if kept:
            stored[f"{stem}.weight_cache"] = weight[:, places].contiguous()
            stored[f"{stem}.ind"] = places.int()
            exact[name][:, places] = weight[:, places].float()
        if later:
            stored[f"{stem}.q_weight"] = torch.zeros(weight.shape[1], weight.shape[0], dtype=torch.int8)
            stored[f"{stem}.q_scale_col"] = torch.zeros(1, weight.shape[0]).half()
    out.mkdir()
    for file in folder.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    save_file(stored, out / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    # A file without tensors lies beside the weights of some published folders.
    save_file({}, out / "model.safetensors", metadata={"format": "pt"})
    facts = {"w_bit": bits, "version": "MIX", "q_group_size": 128}
    (out / "quant_config.json").write_text(json.dumps(facts))
    return exact


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_layouts_are_recognised(tmp_path: Path, bits: int, later: bool) -> None:
    folder = tmp_path / "out"
    published(tiny_llama(tmp_path / "tiny"), folder, bits, later)
    recipe = mixq_layout.recipe_of(folder)
    assert recipe is not None
    group = recipe.config_groups["default"]
    assert (group.method, group.stored, group.outliers) == (f"mix{bits}", True, "online")
    found = mixq_layout.stored(folder, "model.layers.1.self_attn.q_proj")
    assert found.bits == bits and found.codes == ("weight" if later else "q_weight")
    assert found.columns == (COLUMNS if later or bits == 4 else 0)
    assert found.unused == (("q_weight", "q_scale_col") if later else ())
    assert mixq_layout.stored(folder, "model.layers.0.mlp.down_proj").bits == 8


@pytest.mark.parametrize(("bits", "later"), [(4, False), (4, True), (8, True)])
def test_folders_are_looked_into(tmp_path: Path, bits: int, later: bool) -> None:
    tiny, folder = tiny_llama(tmp_path / "tiny"), tmp_path / "out"
    exact = published(tiny, folder, bits, later)
    stored = comparison.open_folder(folder)
    names = [layer.name for layer in stored.facts()]
    assert len(names) == 14 and names[0] == "model.layers.0.mlp.down_proj"
    for name in names:
        assert torch.equal(stored.weight(name), exact[f"{name}.weight"].float())
    shown = CliRunner().invoke(app, ["quantize", "--inspect", str(folder), "--against", str(tiny)])
    assert shown.exit_code == 0 and "MixQ's own checkpoint: 14 layers" in shown.output


def test_what_is_not_served_is_one_line(tmp_path: Path) -> None:
    assert mixq_layout.recipe_of(tmp_path) is None
    config = tmp_path / "quant_config.json"
    config.write_text('{"w_bit": 4, "version": "GEMM"}')
    assert mixq_layout.recipe_of(tmp_path) is None  # AWQ's file has the same name
    for text, message in (
        ('{"w_bit": 4, "version": "QUIK"}', "lutserve quantize MODEL --method quik4"),
        ('{"w_bit": 3, "version": "MIX"}', "w_bit is 3; MixQ's checkpoints have 8 or 4"),
        ('{"w_bit": 8, "version": "MIX"}', "no weights in safetensors files"),
        ('{"version": "MIX"}', "w_bit is None"),
        ("[]", "must hold a JSON object"),
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=message) as refused:
            mixq_layout.recipe_of(tmp_path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a.weight": torch.zeros(4, 8)},
        {"a.weight": torch.zeros(4, 8, dtype=torch.int8)},
        {"a.q_weight": torch.zeros(8, 4, dtype=torch.int8), "a.scale_col": torch.ones(1, 4).half()},
        {
            "a.weight": torch.zeros(4, 8, dtype=torch.int8),
            "a.scale_col": torch.ones(1, 4).half(),
            "a.weight_cache": torch.zeros(4, 3).half(),
            "a.ind": torch.zeros(2, dtype=torch.int32),
        },
    ],
)
def test_foreign_tensors_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"a has |a\.weight_cache is"):
        mixq_layout.stored(tmp_path, "a")


def scores_of(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> list[float]:
    """Log-probabilities of PROMPT by transformers in fp32, with the folder's weights or others."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if tensors is not None:
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1]
    return logits.log_softmax(-1)[torch.arange(len(PROMPT) - 1), torch.tensor(PROMPT[1:])].tolist()


def answers(folder: Path, log: Path, *flags: str) -> tuple[list[float], dict[str, dict[str, Any]]]:
    """Log-probabilities of PROMPT from a real server, and its layers by name."""
    with running_server(["--model", str(folder), *SMALL, *flags], log=log) as server:
        found = client(server).completions.create(
            model=server.model, prompt=PROMPT, max_tokens=1, extra_body={"prompt_logprobs": 0}
        )
        choice = found.choices[0].model_dump()
        scores = [
            entry[str(token)]["logprob"]
            for token, entry in zip(PROMPT[1:], choice["prompt_logprobs"][1:], strict=True)
        ]
        with http(server.base_url) as web:
            rows = web.get("/lutserve/layers").raise_for_status().json()
    return scores, {row["layer"]: row for row in rows}


def distance(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "later", "parts"), [(4, False, 1), (8, True, 2)])
def test_a_published_folder_is_served(tmp_path: Path, bits: int, later: bool, parts: int) -> None:
    """The first release's in one process, the later one's by two tensor-parallel workers."""
    tiny, folder = tiny_llama(tmp_path / "tiny"), tmp_path / "out"
    exact = published(tiny, folder, bits, later)
    served, layers = answers(folder, tmp_path / "log", "--tensor-parallel-size", str(parts))
    row = layers["model.layers.1.self_attn.qkv_proj"]
    assert row["outlier_slots"] == PLACES[128] and row["method"] == f"mix{bits}"
    assert row["kernel"].startswith("lut_gemm" if bits == 4 else "int8")
    if later:
        # The first worker has the first half of these inputs, and of their columns.
        for name, k in {"self_attn.o_proj": 128, "mlp.down_proj": 256}.items():
            share = [place for place in PLACES[k] if place < k // 2]
            assert layers[f"model.layers.0.{name}"]["outlier_slots"] == share
    # The same weights in 16 bit: what is left is the rounding of the activations.
    assert distance(served, scores_of(tiny, exact)) < 0.1
    refused = CliRunner().invoke(app, ["serve", str(folder), "--method", "int8"]).exception
    assert isinstance(refused, UserError) and "serve it without --method" in str(refused)


def split(weight: integers.IntegerWeight, kind: str) -> PackedLinear:
    """A layer from a stored weight, as `mixq_stored` builds it."""
    columns, kept = weight.columns, weight.kept.t().half().contiguous()
    slots = OutlierSlots(weight.codes.shape[1], lambda wanted: kept[torch.searchsorted(columns, wanted)])
    slots.capacity = max(slots.capacity, len(weight.columns))
    slots.hold(weight.columns)
    if kind == "quik4":
        return QuikLinear(weight.codes, weight.scales, slots)
    gemm: Any = W8A8(weight.codes, weight.scales, torch.float16)
    if kind == "mix4":
        gemm = W4A8((weight.codes + 8).byte(), weight.scales[:, None], torch.float16, weight.codes.shape[1])
    elif kind == "mix4:a4":
        gemm = W4A4(weight.codes, weight.scales, torch.float16)
    return PackedLinear(gemm, slots, len(weight.codes), True, False)


def calibrated(k: int = 256, n: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, inputs with two outlier columns, and their correlated hessian."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(n, k, generator=generator) * 0.05
    x = torch.randn(512, k, generator=generator) @ (
        torch.eye(k) + 0.3 * torch.randn(k, k, generator=generator) / k**0.5
    )
    x[:, [5, 77]] *= 40
    return weight, x, x.t() @ x


@pytest.mark.parametrize(
    ("kind", "bound"), [("int8", 0.2), ("mix8", 0.01), ("mix4", 0.11), ("mix4:a4", 0.2), ("quik4", 0.2)]
)
def test_every_stored_method_computes_its_weight(kind: str, bound: float) -> None:
    weight, x, hessian = calibrated()
    name = kind.removesuffix(":a4")
    made = integers.quantize(methods.get(name), "q_proj", weight, x.abs().amax(0), hessian, 0.01)
    layer, x = split(made, kind), x[:40].half()
    if kind != "int8":
        assert {5, 77} <= set(made.columns.tolist())
        assert len(made.columns) == 256 // 4
    bias = torch.linspace(-3, 3, 48).half()
    before = x.clone()
    out, stands_for = layer(x, bias), x.double() @ made.dequantize().double().t() + bias.double()
    assert torch.equal(x, before)
    size = (stands_for - bias.double()).norm()
    exact = x.double() @ weight.double().t() + bias.double()
    assert (out.double() - exact).norm() / size < bound
    # What the checkpoint's weight stands for, up to the rounding of activations.
    assert (out.double() - stands_for).norm() / size < bound
    assert layer(x[:0], bias).shape == (0, 48)
    assert layer(torch.zeros_like(x), bias).isfinite().all()


def test_quik_follows_its_definition() -> None:
    """Scalar by scalar: codes from 0 to 15 between the least and the largest value that are not outliers."""
    weight, x, hessian = calibrated()
    made = integers.quantize(methods.get("quik4"), "q_proj", weight, x.abs().amax(0), hessian, 0.01)
    layer, row = split(made, "quik4"), x[3].half()
    columns = set(made.columns.tolist())
    rest = [float(v) for i, v in enumerate(row.tolist()) if i not in columns]
    low, step = min(rest), (max(rest) - min(rest)) / 15
    expected = []
    for n in range(48):
        total = 0.0
        for i, value in enumerate(row.tolist()):
            if i in columns:
                total += value * float(made.kept[n, made.columns.tolist().index(i)].half())
            else:
                rounded = round((value - low) / step) * step + low
                total += rounded * int(made.codes[n, i]) * float(made.scales[n])
        expected.append(total)
    inside = torch.tensor([i for i in range(256) if i not in columns])
    stored = (made.codes * made.scales[:, None])[:, inside].t().half()
    assert torch.equal(layer.gemm.columns(inside), stored)
    assert torch.allclose(layer(row[None])[0].double(), torch.tensor(expected).double(), rtol=2e-3, atol=2e-2)


def test_quik_makes_up_for_rounding_with_the_columns_it_keeps() -> None:
    weight, x, hessian = calibrated()
    columns = x.abs().amax(0).topk(64).indices.sort().values

    def error(made: integers.IntegerWeight) -> float:
        wrong = made.dequantize() - weight
        return float((wrong @ hessian * wrong).sum())

    by_gptq = integers.quik(weight, hessian, columns)
    plain = weight.clone()
    plain[:, columns] = 0
    codes, scales = quantize_rows(plain, 7)
    rounded = integers.IntegerWeight(codes, scales, 4, columns, weight[:, columns])
    assert error(by_gptq) < 0.7 * error(rounded)
    assert not torch.equal(by_gptq.kept, weight[:, columns])
    assert not by_gptq.codes[:, columns].any() and by_gptq.codes.abs().amax() <= 8
    # Without correlations there is nothing to make up for.
    alone = integers.quik(weight, torch.eye(256), columns, damping=0.0)
    assert torch.equal(alone.kept, weight[:, columns]) and torch.equal(alone.codes, codes)


def test_stored_tensors_are_the_published_ones() -> None:
    weight, x, _ = calibrated()
    made = integers.quantize(
        methods.get("mix4"), "up_proj", weight.half().float(), x.abs().amax(0), None, 0.01
    )
    codes, scale = quantize_weight_int4(weight.half(), made.columns)
    tensors = made.tensors("a", torch.float16)
    assert torch.equal(tensors["a.weight"], pack_int4(codes))
    assert torch.equal(tensors["a.scale_col"][0], scale.float())
    assert torch.equal(tensors["a.weight_cache"], weight.half()[:, made.columns])
    assert tensors["a.ind"].tolist() == made.columns.tolist()
    down = integers.quantize(methods.get("mix4"), "down_proj", weight, x.abs().amax(0), None, 0.01)
    assert down.bits == 8 and torch.equal(down.codes, quantize_rows(weight)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mix8", "algo": "gptq"}, "mix8 goes with --algo rtn, not gptq"),
        ({"method": "quik4"}, "quik4 goes with --algo gptq, not rtn"),
        ({"method": "int8", "algo": "awq"}, "int8 goes with --algo rtn or smoothquant"),
        ({"method": "int8", "mse": True}, "are for 4-bit formats, not for int8"),
        ({"method": "int8", "group_size": 64}, "one scale a row; leave --group-size out"),
        ({"method": "llm-int8"}, "give a 4-bit format or one of .*int8, mix8, mix4, quik4"),
    ],
)
def test_settings_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**options)


def test_quik4_needs_a_folder() -> None:
    with pytest.raises(UserError, match="quik4 is made beforehand: lutserve quantize MODEL --method quik4"):
        from_flags(method="quik4")


def quantized(tiny: Path, out: Path, *flags: str) -> Path:
    command = ["quantize", str(tiny), *flags, "-o", str(out), "--calibration", "pydoc"]
    done = CliRunner().invoke(app, [*command, "--samples", "8", "--sequence-length", "64"])
    assert done.exit_code == 0, done.output
    return out


def test_smoothquant_int8_folds_and_rounds(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "tiny")
    out = quantized(tiny, tmp_path / "out", "--method", "int8", "--algo", "smoothquant")
    config = json.loads((out / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["default"]
    assert (group["method"], group["stored"]) == ("int8", True)
    tensors, before = load_file(out / "model.safetensors"), load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    assert tensors[f"{name}.weight"].dtype == torch.int8
    assert not any(key.endswith((".ind", ".weight_cache")) for key in tensors)
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert not torch.equal(tensors[norm], before[norm])
    exact = {
        key: value * tensors[key.replace(".weight", ".scale_col")][0][:, None]
        if value.dtype == torch.int8
        else value
        for key, value in tensors.items()
        if not key.endswith(".scale_col")
    }
    # A norm that is not folded, or a weight that is not, changes it by nats.
    assert distance(scores_of(tiny, exact), scores_of(tiny)) < 0.15
    assert "--method int8 --algo smoothquant" in (out / "README.md").read_text()


@pytest.mark.slow
def test_quik4_is_made_and_served(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "tiny")
    out = quantized(tiny, tmp_path / "out", "--method", "quik4")
    served, layers = answers(out, tmp_path / "log")
    row = layers["model.layers.1.self_attn.qkv_proj"]
    assert row["kernel"].startswith("quik int8") and row["outlier_columns"] == 128 // 4
    assert layers["model.layers.1.mlp.down_proj"]["kernel"].startswith("int8")
    # Two random blocks at 4 bits: near the original, and not equal to it.
    assert 0.01 < distance(served, scores_of(tiny)) < 1.0
