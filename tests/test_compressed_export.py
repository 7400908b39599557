"""`lutserve quantize --layout compressed-tensors`: folders that vLLM serves without lutserve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from recipes import PLAN, recipe_of
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from lutserve.cli import app
from lutserve.comparison import open_folder
from lutserve.errors import UserError
from lutserve.quantizers import rtn
from lutserve.quantizers.compressed import export
from lutserve.recipe import parse

MIXED = [["int4@32", "int8", "none", "int4@64"], ["int8", "int4@32", "int8", "none"]]
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("model") / "tiny", layers=2, dtype="float16")


def quantize(model: Path, out: Path, *arguments: str) -> Result:
    layout = ["--layout", "compressed-tensors", "-o", str(out)]
    return CliRunner().invoke(app, ["quantize", str(model), *arguments, *layout])


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


@pytest.mark.parametrize("size", [32, -1])
def test_int4_is_rounding_to_nearest(model: Path, tmp_path: Path, size: int) -> None:
    out = tmp_path / "out"
    done = quantize(
        model, out, "--method", "int4", "--group-size", str(size), "--ignore", "lm_head,down_proj"
    )
    assert done.exit_code == 0, done.exception
    # The reader of other tools' folders knows the form by itself.
    foreign, original = open_folder(out), load_file(model / "model.safetensors")
    assert len(foreign.layers) == 6 * 2
    for name in foreign.layers:
        rounded = rtn(original.pop(f"{name}.weight"), "int4", size)
        rounded.scales.copy_(rounded.scales.half())
        assert torch.equal(foreign.weight(name), rounded.dequantize())
    for name, tensor in original.items():
        assert torch.equal(foreign.tensor(name), tensor)
    assert config_of(out)["format"] == "pack-quantized"
    assert config_of(out)["ignore"] == ["lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(2))]


def test_int8_is_within_half_a_step(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = quantize(model, out, "--method", "int8")
    assert done.exit_code == 0, done.exception
    original, stored = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    layers = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
    assert len(layers) == 7 * 2
    for name in layers:
        codes, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
        weight = original[f"{name}.weight"].float()
        assert codes.dtype == torch.int8 and scale.shape == (len(weight), 1) and scale.dtype == torch.float16
        assert codes.abs().amax(1).min() == 127
        # Half a step, and what rounding the scale to fp16 adds.
        error = (codes * scale.float() - weight).abs()
        assert (error <= (0.5 + 127 * 2**-11 + 0.01) * scale.float()).all()


def test_vllm_finds_the_scheme_of_every_layer(model: Path, tmp_path: Path) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    export(model, tmp_path / "out", recipe_of(MIXED))
    config = CompressedTensorsConfig.from_config(config_of(tmp_path / "out"))
    config.packed_modules_mapping = FUSED
    sites = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    for block, row in enumerate(MIXED):
        for site, name in zip(sites, row, strict=True):
            found = config.get_scheme_dict(torch.nn.Linear(1, 1), f"model.layers.{block}.{site}")
            if name == "none":
                assert found is None
                continue
            assert found is not None
            method, _, size = name.partition("@")
            weights, activations = found["weights"], found["input_activations"]
            assert (weights.num_bits, weights.symmetric) == (int(method[3:]), True)
            assert weights.group_size == (int(size) if size else None)
            if method == "int8":
                assert config._is_dynamic_token_w8a8(weights, activations)
                assert found["format"] == "int-quantized"
            else:
                assert config._is_wNa16_group_channel(weights, activations)
                assert found["format"] == "pack-quantized"
    with pytest.raises(UserError, match="only 4-bit"):
        open_folder(tmp_path / "out")
    export(model, tmp_path / "sizes", recipe_of([["int4@32", "int4@64", "none", "none"]] * 2))
    with pytest.raises(UserError, match="groups of several sizes"):
        open_folder(tmp_path / "sizes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "gguf"], "--layout gguf; allowed: lutserve, compressed-tensors"),
        (["--algo", "gptq"], "leave --algo out"),
        (["--mse"], "leave --mse out"),
        (["--alpha", "0.5"], "leave --alpha out"),
    ],
)
def test_options_that_do_not_go_with_it(
    model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    # The last --layout counts.
    out = ["-o", str(tmp_path / "out"), "--layout", "compressed-tensors", *arguments]
    done = CliRunner().invoke(app, ["quantize", str(model), "--method", "int4", *out])
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "nothing to export"),
        ({"luts": {"silu": "nli-4"}}, "weights only"),
        ({"kv_cache_scheme": "nf4"}, "weights only"),
        ({"config_groups": {"all": {"method": "int4", "group_size": 96}}}, "do not divide 128 columns"),
        ({"config_groups": {"all": {"method": "int4+a8"}}}, "does not know"),
        (recipe_of(PLAN).to_config(), "does not know"),
    ],
)
def test_what_it_cannot_hold(model: Path, tmp_path: Path, recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        export(model, tmp_path / "out", parse(recipe))
    assert list(tmp_path.iterdir()) == []


def test_models_it_cannot_take(model: Path, tmp_path: Path) -> None:
    every = parse({"config_groups": {"all": {"method": "int8"}}})
    gpt2 = tmp_path / "gpt2"
    shutil.copytree(model, gpt2)
    config = json.loads((gpt2 / "config.json").read_text()) | {"model_type": "gpt2"}
    (gpt2 / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="transposed"):
        export(gpt2, tmp_path / "out", every)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists"):
        export(model, tmp_path / "there", every)
