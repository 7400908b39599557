"""lutserve.gguf: against the folder that a synthetic GGUF file was written from."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tiny import HEAD_DIM, gguf_name, tiny_gguf, tiny_llama
from tokenizers import Tokenizer

from lutserve.errors import UserError
from lutserve.gguf import convert

TEXT = "Visitors of 1984 ask <|im_end|> naïve questions,\n\tdef area(x): 你好"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("original"), dtype="float16")


@pytest.fixture(scope="module")
def source(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", original)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "new"
    convert(source, out)
    return out


def test_unquantized_weights_come_back_bit_for_bit(original: Path, converted: Path) -> None:
    expected, got = load_file(original / "model.safetensors"), load_file(converted / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == torch.float16
        if "down_proj" not in name:  # the quantized one
            assert torch.equal(got[name], tensor), name


def test_rotary_rows_are_moved_one_by_one(source: Path, converted: Path) -> None:
    """Scalar un-permutation of the raw F16 rows: GGUF row (head, pair, half) is row (head, half, pair)."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    got = load_file(converted / "model.safetensors")
    for site in ("q_proj", "k_proj"):
        name = f"model.layers.1.self_attn.{site}.weight"
        raw = tensors[gguf_name(name)].data.view(np.float16)
        assert not np.array_equal(raw, got[name].numpy())
        for row in range(len(raw)):
            head, within = row // HEAD_DIM * HEAD_DIM, row % HEAD_DIM
            moved = head + (within % 2) * HEAD_DIM // 2 + within // 2
            assert np.array_equal(got[name][moved].numpy(), raw[row])


def test_q4_1_by_hand(source: Path, converted: Path) -> None:
    """A block is fp16 scale, fp16 minimum, 16 bytes: low nibbles are values 0-15, high ones 16-31."""
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = next(t for t in GGUFReader(source).tensors if t.name == gguf_name(name))
    got = load_file(converted / "model.safetensors")[name]
    row = bytes(tensor.data[5])
    for block in range(got.shape[1] // 32):
        data = row[20 * block : 20 * block + 20]
        scale, minimum = np.frombuffer(data[:4], np.float16).astype(np.float32)
        codes = [byte & 15 for byte in data[4:]] + [byte >> 4 for byte in data[4:]]
        expected = (np.array(codes, np.float32) * scale + minimum).astype(np.float16)
        assert np.array_equal(got[5, 32 * block : 32 * block + 32].numpy(), expected)


def test_config(original: Path, converted: Path) -> None:
    expected = json.loads((original / "config.json").read_text())
    got = json.loads((converted / "config.json").read_text())
    del expected["pad_token_id"]  # the GGUF has none
    assert got.items() >= expected.items()
    assert got["rms_norm_eps"] == 1e-5, "the decimal number, not its fp32 rounding"
    assert got["pad_token_id"] is None


def test_tied_embeddings(original: Path, tmp_path: Path) -> None:
    weights = load_file(original / "model.safetensors")
    del weights["lm_head.weight"]
    folder = tmp_path / "tied"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((original / name).read_bytes())
    save_file(weights, folder / "model.safetensors")
    convert(tiny_gguf(tmp_path / "tied.gguf", folder), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    assert load_file(tmp_path / "out/model.safetensors").keys() == weights.keys()


def test_bfloat16(source: Path, converted: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    name = "model.layers.0.self_attn.q_proj.weight"
    got = load_file(tmp_path / "out/model.safetensors")[name]
    assert torch.equal(got, load_file(converted / "model.safetensors")[name].bfloat16())


def test_tokenizer(original: Path, converted: Path) -> None:
    expected = Tokenizer.from_file(str(original / "tokenizer.json"))
    got = Tokenizer.from_file(str(converted / "tokenizer.json"))
    ids = got.encode(TEXT).ids
    assert ids == expected.encode(TEXT).ids
    assert got.decode(ids, skip_special_tokens=False) == TEXT
    assert got.token_to_id("<|im_end|>") in ids, "a control token is one token"


def test_smollm_splits_digits(original: Path, converted: Path, tmp_path: Path) -> None:
    convert(
        tiny_gguf(tmp_path / "s.gguf", original, fields={"tokenizer.ggml.pre": "smollm"}), tmp_path / "out"
    )
    digits = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    merged = Tokenizer.from_file(str(converted / "tokenizer.json"))
    number = "12 * 345"  # tiny.TEXT has it, so that its digits merge
    assert digits.encode(number).tokens == ["1", "2", "Ġ*", "Ġ", "3", "4", "5"]
    assert merged.encode(number).tokens != digits.encode(number).tokens


def test_transformers_loads_the_folder(converted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.eos_token == "<|im_end|>"
    assert json.loads((converted / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n"
    model, loading = AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.dtype == torch.float16


def test_files_are_readable_by_all(converted: Path) -> None:
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in converted.iterdir()}
    assert set(modes.values()) == {0o644}
    assert set(modes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_progress(source: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    convert(source, tmp_path / "out", progress=lines.append)
    assert len(lines) == 10 and lines[-1] == "converted 21 of 21 tensors"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "qwen2"}, "'qwen2'.*'llama'"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "'llama-bpe'.*gpt-2, smollm"),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer None"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer 'llama'"),
        ({"tokenizer.ggml.add_bos_token": True}, "add_bos_token"),
        ({"llama.rope.scaling.type": "linear"}, r"no rule for: llama\.rope\.scaling\.type"),
        ({"llama.expert_count": 8}, r"llama\.expert_count"),
        ({"llama.rope.dimension_count": 16}, "part of each head"),
        ({"llama.attention.head_count_kv": None}, r"head_count_kv is missing.*int"),
        ({"llama.block_count": "2"}, r"block_count is a str.*int"),
        ({"llama.block_count": 1}, r"unknown tensors: blk\.1"),
        ({"llama.block_count": 3}, r"lacks tensors: blk\.2"),
        ({"llama.feed_forward_length": 512}, r"ffn_\w+\.weight has shape .*256.*say .*512"),
        ({"llama.vocab_size": 500}, "512 tokens"),
        ({"tokenizer.ggml.token_type": [3] * 3 + [4] + [1] * 508}, r"token types \[4\]"),
    ],
)
def test_refuses_what_it_does_not_know(
    original: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    source = tiny_gguf(tmp_path / "odd.gguf", original, fields=fields)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").exists()


def test_refuses_values_beyond_float16(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "big")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, folder / "model.safetensors")
    source = tiny_gguf(tmp_path / "big.gguf", folder)
    with pytest.raises(UserError, match=r"output_norm\.weight.*float16.*bfloat16"):
        convert(source, tmp_path / "half")
    convert(source, tmp_path / "out", "bfloat16")
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"][3] == 999424.0  # nearest bf16


def test_refuses_a_used_folder_and_other_files(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model-00001.safetensors").write_bytes(b"of another model")
    with pytest.raises(UserError, match="not empty"):
        convert(source, tmp_path)
    for content in (b"", b"not a model", source.read_bytes()[:20_000], source.read_bytes()[:-4000]):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.gguf is not a readable GGUF"):
            convert(tmp_path / "bad.gguf", tmp_path / "out")
    with pytest.raises(UserError, match=r"none\.gguf"):
        convert(tmp_path / "none.gguf", tmp_path / "out")
