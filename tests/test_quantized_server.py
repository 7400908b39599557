"""A folder made by `lutserve quantize` gives the tokens of the same method applied while loading."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import SMALL, client

from lutserve.checkpoint import TYPE, Checkpoint, layer_tensors
from lutserve.cli import app
from lutserve.quantizers.axcore import axcore
from lutserve.server.client import Server, running_server

pytestmark = pytest.mark.slow


def completions(server: Server) -> list[tuple[list[str], list[float]]]:
    """Tokens and their log-probabilities after some prompts."""
    found = []
    for prompt in ("The river", "def area(", "A mill stood here for three hundred years; its wheel"):
        answer = client(server).completions.create(
            model="m", prompt=prompt, max_tokens=24, temperature=0, logprobs=1
        )
        chances = answer.choices[0].logprobs
        assert chances
        found.append((chances.tokens, chances.token_logprobs))
    return found


def test_plain_vllm_serves_the_folder_as_if_quantised_online(tiny: Path, tmp_path: Path) -> None:
    method = ["--method", "nf4", "--group-size", "32"]
    app(["quantize", str(tiny), *method, "-o", str(tmp_path / "nf4")], standalone_mode=False)
    common = ["--served-model-name", "m", "--dtype", "bfloat16", "--enforce-eager", *SMALL]
    online = ["--model", str(tiny), *method, *common]
    with running_server(online, log=tmp_path / "online.log") as server:
        expected = completions(server)
    program = [sys.executable, "-m", "lutserve.server.vllm_cli", "serve"]
    stored = [str(tmp_path / "nf4"), *common]
    with running_server(stored, log=tmp_path / "stored.log", program=program) as server:
        assert completions(server) == expected
    for log in ("online.log", "stored.log"):
        assert "lutserve: qkv_proj x2: method nf4" in (tmp_path / log).read_text()


def test_plain_vllm_serves_axcore_with_stored_formats(tiny: Path, tmp_path: Path) -> None:
    folder, model = tmp_path / "axcore", shutil.copytree(tiny, tmp_path / "model")
    original = load_file(model / "model.safetensors")
    for name in (name for name in original if name.endswith(("k_proj.weight", "up_proj.weight"))):
        # What E1M2 is best for, in a part of a fused layer that is not its first.
        original[name] = (torch.rand_like(original[name].float()) * 0.1 - 0.05).to(original[name].dtype)
    save_file(original, model / "model.safetensors", metadata={"format": "pt"})
    calibration = ["--calibration", "pydoc", "--samples", "2", "--sequence-length", "64"]
    app(
        ["quantize", str(model), "--method", "axcore", *calibration, "-o", str(folder)], standalone_mode=False
    )
    # The formats that are chosen while loading, so that both ways must agree.
    stored = Checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in stored.layers:
        tensors |= layer_tensors(name, axcore(original[f"{name}.weight"], 64))
    assert {tensors[f"{name}.{TYPE}"].unique().tolist()[0] for name in stored.layers} == {1, 2}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    common = ["--served-model-name", "m", "--dtype", "bfloat16", "--enforce-eager", *SMALL]
    online = ["--model", str(model), "--method", "axcore", *common]
    with running_server(online, log=tmp_path / "online.log") as server:
        expected = completions(server)
    program = [sys.executable, "-m", "lutserve.server.vllm_cli", "serve"]
    with running_server([str(folder), *common], log=tmp_path / "stored.log", program=program) as server:
        assert completions(server) == expected
    assert "lutserve: qkv_proj x2: method axcore" in (tmp_path / "stored.log").read_text()
