"""The random models that benchmarks serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lutserve.benchmarks import models
from lutserve.benchmarks.models import random_llama, to_w8a8
from lutserve.errors import UserError

SMALL = {"hidden": 128, "layers": 2, "intermediate": 256, "heads": 4, "kv_heads": 2, "vocab": 300}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("models") / "small", **SMALL)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    assert set(found) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


def test_the_default_has_1_1_billion_parameters() -> None:
    # Written out, not built: per layer q, o; k, v; gate, up, down.
    layer = 2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192
    assert 1.0e9 < 16 * layer + 2 * 32000 * 2048 < 1.2e9


def test_transformers_loads_it_and_its_activations_are_sane(small: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    with torch.no_grad():
        out = model(torch.arange(3, 67)[None], output_hidden_states=True)
    sizes = [float(state.std()) for state in out.hidden_states]
    assert all(0.5 < size < 10 for size in sizes), sizes
    assert 0.3 < float(out.logits.std()) < 3
    # Columns above 6.0 are what mix8 keeps in 16 bit: there must be some.
    normed = model.model.layers[0].input_layernorm(out.hidden_states[0])
    columns = (normed.abs().amax(dim=(0, 1)) > 6).sum()
    assert columns == 1


def test_the_tokenizer_survives_a_round_trip(small: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small)
    assert tokenizer.vocab_size == 300
    ids = [299, 3, 3, 150]
    assert tokenizer(tokenizer.decode(ids)).input_ids == ids


def test_a_complete_folder_is_left_and_a_foreign_one_is_refused(small: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in small.iterdir()}
    assert random_llama(small, **SMALL) == small
    assert {path.name: path.stat().st_mtime_ns for path in small.iterdir()} == before
    with pytest.raises(UserError, match="is not this benchmark model"):
        random_llama(small, **(SMALL | {"seed": 1}))
    with pytest.raises(UserError, match="is not this benchmark model"):
        random_llama(tmp_path)


def test_an_interrupted_build_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_write_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        random_llama(tmp_path / "model", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        random_llama(tmp_path / "file" / "model", **SMALL)


def test_the_same_seed_gives_the_same_weights(small: Path, tmp_path: Path) -> None:
    again = tensors(random_llama(tmp_path / "again", **SMALL))
    other = tensors(random_llama(tmp_path / "other", **SMALL, seed=1))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(again[name], tensors(small)[name])
    assert not torch.equal(other[name], again[name])


def test_w8a8_is_absmax_over_127_a_row(small: Path, tmp_path: Path) -> None:
    exact = tensors(small)
    quantized = tensors(to_w8a8(small, tmp_path / "w8a8"))
    linears = [name for name in exact if "_proj." in name]
    assert len(linears) == 7 * SMALL["layers"]
    for name in linears:
        codes = quantized.pop(name)
        scale = quantized.pop(name.replace(".weight", ".weight_scale"))
        assert codes.dtype == torch.int8
        assert scale.dtype == torch.float32
        assert scale.shape == (codes.shape[0], 1)
        assert torch.equal(scale[:, 0], exact[name].float().abs().amax(1) / 127)
        assert torch.all(codes.abs().amax(1) == 127)
        assert torch.all((codes * scale - exact[name].float()).abs() <= scale * 0.5001)
    assert set(quantized) == {name for name in exact if "_proj." not in name}
    assert all(torch.equal(quantized[name], exact[name]) for name in quantized)
    config = json.loads((tmp_path / "w8a8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert to_w8a8(small, tmp_path / "w8a8") == tmp_path / "w8a8"


def test_w8a8_of_a_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model written by random_llama"):
        to_w8a8(tmp_path, tmp_path / "out")


def test_compressed_tensors_accepts_the_config(small: Path, tmp_path: Path) -> None:
    compressed_tensors = pytest.importorskip("compressed_tensors.quantization")
    config = json.loads((to_w8a8(small, tmp_path / "w8a8") / "config.json").read_text())
    scheme = compressed_tensors.QuantizationConfig.model_validate(config["quantization_config"])
    group = scheme.config_groups["group_0"]
    assert group.weights.strategy == "channel"
    assert group.input_activations.dynamic is True


def test_outlier_heavy_computes_the_same_with_larger_columns(small: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    heavy = models.outlier_heavy(small, tmp_path / "heavy")
    ids, states = torch.arange(3, 67)[None], []
    with torch.no_grad():
        for folder in (small, heavy):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            out = model(ids, output_hidden_states=True)
            states.append((out.logits, model.model.layers[0].post_attention_layernorm(out.hidden_states[0])))
    (logits, plain), (same, large) = states
    assert torch.allclose(same, logits, rtol=1e-5, atol=1e-5)
    gain = (large.abs().amax((0, 1)) / plain.abs().amax((0, 1))).round().int().tolist()
    assert sorted(gain)[-8:] == [32] * 4 + [64] * 4 and gain.count(1) == len(gain) - 8
    assert models.outlier_heavy(small, heavy) == heavy
    with pytest.raises(UserError, match="is not this benchmark model"):
        models.outlier_heavy(small, small)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no norms called"):
        models.outlier_heavy(tmp_path, tmp_path / "out")
