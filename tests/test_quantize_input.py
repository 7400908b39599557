"""What `lutserve quantize` is given: model folders and calibration text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_llama

from lutserve.errors import UserError
from lutserve.quantizers import calibration
from lutserve.quantizers.pipeline import quantize
from lutserve.quantizers.settings import Settings
from lutserve.quantizers.skeleton import Skeleton
from lutserve.quantizers.source import Source


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", layers=3)


# --- models that cannot be quantised ------------------------------------------------------------------------


def folder_with(tmp_path, config, tensors=None):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors or {"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 64}, "mixture-of-experts"),
        ({"model_type": "gpt2", "n_layer": 1, "n_embd": 64, "n_head": 2}, "Conv1D"),
        ({"model_type": "vit"}, "is no causal language model"),
        ({"model_type": "nonesuch"}, "transformers cannot read"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "awq"}},
            r"quantised already \(awq\)",
        ),
    ],
)
def test_models_that_are_refused(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        Skeleton(Source(folder_with(tmp_path, config)))


def test_broken_folders(model, tmp_path):
    with pytest.raises(UserError, match="has no tensor"):
        quantize(
            folder_with(tmp_path, json.loads((model / "config.json").read_text())),
            tmp_path / "out",
            Settings("nf4"),
        )
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot read"):
        Source(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors or pytorch_model\.bin"):
        Source(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    with pytest.raises(UserError, match=r"lacks gone\.safetensors"):
        Source(tmp_path)


# --- calibration text ---------------------------------------------------------------------------------------


def test_windows_are_spread_over_the_text(model, tmp_path):
    text = "\n".join(f"The {i}th line of a text about rivers, mills and trains." for i in range(400))
    plain, packed, lines = tmp_path / "a.txt", tmp_path / "b.raw.gz", tmp_path / "c.jsonl"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    lines.write_text("".join(json.dumps({"text": line}) + "\n" for line in text.split("\n")))
    windows = calibration.windows(str(plain), model, 5, 32)
    assert len(windows) == 5 and all(w.shape == (32,) and w.dtype == torch.int64 for w in windows)
    assert len({tuple(w.tolist()) for w in windows}) == 5
    assert all(map(torch.equal, windows, calibration.windows(str(packed), model, 5, 32)))
    assert len(calibration.windows(str(lines), model, 5, 32)) == 5


def test_named_text_is_found_in_the_data_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("LUTSERVE_DATA", str(tmp_path))
    (tmp_path / "wikitext2_validation.raw.gz").write_bytes(
        gzip.compress(b"one two three four five six\n" * 50)
    )
    assert len(calibration.windows("wikitext2", model, 2, 16)) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "no calibration text 'nothing'; give a file"),
        ("short.txt", r"has \d+ tokens, 100 x 50 need 5000; give more text"),
        ("bad.jsonl", 'bad.jsonl, line 2: not a JSON object with a "text"'),
        ("bad.gz", "cannot read calibration text"),
        ("c4", "cannot read allenai/c4 from the hub|needs the package datasets"),
    ],
)
def test_calibration_errors(model, tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    for variable in ("LUTSERVE_DATA", "LUTSERVE_SHARED"):
        monkeypatch.delenv(variable, raising=False)
    Path("short.txt").write_text("not enough")
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"words": "not"}\n')
    Path("bad.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=message):
        calibration.windows(source, model, 100, 50)
