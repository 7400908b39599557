"""`lutserve quantize --recipe`: a format for every layer of one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from recipes import PLAN, SITES, candidate, recipe_of
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from lutserve import recipe as recipes
from lutserve.checkpoint import Checkpoint
from lutserve.cli import app
from lutserve.errors import UserError
from lutserve.quantizers import rtn

PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("model") / "tiny", layers=len(PLAN), dtype="float16")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_of(PLAN, {"silu": "nli-4"}).to_config()))
    return path


def quantize(model: Path, file: Path, out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        app, ["quantize", str(model), "--recipe", str(file), *arguments, "-o", str(out)]
    )


def test_every_layer_gets_its_format(model: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = quantize(model, file, out)
    assert done.exit_code == 0, done.exception
    made, weights = Checkpoint(out), load_file(model / "model.safetensors")
    stored = recipes.from_model(json.loads((out / "config.json").read_text()))
    assert stored is not None and stored.luts == {"silu": "nli-4"}
    packed = set()
    for block, row in enumerate(PLAN):
        for site, name in zip(SITES, row, strict=True):
            stem, _, leaf = f"model.layers.{block}.{site}".rpartition(".")
            wanted, served = candidate(name).group, stored.group_for(f"{stem}.{leaf}")
            assert (served.method, served.group_size) == (wanted.method, wanted.group_size)
            by_codebook = wanted.arithmetic.family == "codebook"
            assert served.stored == by_codebook
            for part in (f"{stem}.{part}" for part in PARTS.get(leaf, [leaf])):
                exact = weights[f"{part}.weight"]
                if by_codebook:
                    packed.add(part)
                    rounded = rtn(exact, wanted.codebook, wanted.group_size)
                    assert torch.equal(made.weight(part), rounded.dequantize())
                else:
                    assert torch.equal(made.tensor(f"{part}.weight"), exact)
    assert set(made.layers) == packed and len(packed) == 13
    assert made.title == "int4, int4+a8, nf4, sf4_5 by rtn, as a recipe says"
    card = (out / "README.md").read_text()
    assert "--recipe recipe.json --algo rtn" in card and card.count("Codebook: ") == 3


@pytest.mark.parametrize("algo", ["gptq", "awq"])
def test_calibrated_algorithms_take_each_layers_format(
    model: Path, file: Path, tmp_path: Path, algo: str
) -> None:
    options = ["--algo", algo, "--calibration", "pydoc", "--samples", "4", "--sequence-length", "64"]
    done = quantize(model, file, tmp_path / "mixed", *options)
    assert done.exit_code == 0, done.exception
    mixed = load_file(tmp_path / "mixed" / "model.safetensors")
    # The first block reads the same whatever the others are.
    for method, size, layer in [("int4", "32", "q_proj"), ("nf4", "64", "o_proj")]:
        alone = ["--method", method, "--group-size", size, *options, "-o", str(tmp_path / method)]
        done = CliRunner().invoke(app, ["quantize", str(model), *alone])
        assert done.exit_code == 0, done.exception
        uniform = load_file(tmp_path / method / "model.safetensors")
        names = [
            f"model.layers.0.self_attn.{layer}.weight_{part}" for part in ("packed", "scale", "codebook")
        ]
        for name in names:
            assert torch.equal(mixed[name], uniform[name]), name
    weights = load_file(model / "model.safetensors")
    rounded = rtn(weights["model.layers.0.self_attn.q_proj.weight"], "int4", 32)
    assert not torch.equal(
        Checkpoint(tmp_path / "mixed").weight("model.layers.0.self_attn.q_proj"), rounded.dequantize()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nf4"], "what --method says for all"),
        (["--group-size", "128"], "what --group-size says for all"),
        (["--bits", "4"], "what --bits says for all"),
        (["--enable_activation"], "what --enable_activation says for all"),
        (["--ignore", "down_proj"], "what --ignore says for all"),
        (["--full-range"], "--full-range is for integers alone"),
        (["--algo", "gptq", "--mse"], "--mse goes with rtn"),
    ],
)
def test_options_that_contradict_a_recipe(
    model: Path, file: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = quantize(model, file, tmp_path / "out", *arguments)
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert list(tmp_path.iterdir()) == [file], "nothing half written"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"q": {"targets": ["q_proj"], "method": "int4"}, "k": {"targets": ["k_proj"], "method": "nf4"}},
            "is one fused layer",
        ),
        ({"all": {"method": "int8"}}, "no 4-bit format"),
        ({}, "no 4-bit format"),
        ({"a": {"targets": ["nothing"], "method": "int4"}}, "the recipe names none"),
        (
            {"a": {"method": "int4"}, "b": {"method": "quik4", "stored": True}},
            "has quik4, which only --method",
        ),
        ({"a": {"method": "quik4"}}, "is made beforehand"),
    ],
)
def test_recipes_that_cannot_be_quantised(
    model: Path, tmp_path: Path, groups: dict[str, Any], message: str
) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"config_groups": groups}))
    done = quantize(model, file, tmp_path / "out")
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert not (tmp_path / "out").exists()
