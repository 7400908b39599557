"""Turn a llama-architecture GGUF file into a plain Hugging Face folder.

The converter refuses what it does not know (another architecture, a field or tensor it has no
rule for, another pre-tokenizer): a model that loads and answers slightly wrong is worse than an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lutserve.errors import UserError

T = TypeVar("T")

# Every `llama.*` field there is a rule for below. Others (rope.scaling.*, expert_count,
# attention.sliding_window, ...) change what the model computes.
_LLAMA_FIELDS = {
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.vocab_size",
}
_PRE_TOKENIZERS = ("gpt-2", "smollm")
_NORMAL, _CONTROL = 1, 3  # values of tokenizer.ggml.token_type


def convert(
    source: Path,
    out: Path,
    dtype: Literal["float16", "bfloat16"] = "float16",
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write the model and tokenizer of `source` (GGUF) as a Hugging Face folder `out`.

    `out` must be missing or empty; it gets config.json, generation_config.json, model.safetensors (one
    file, `dtype`), tokenizer.json and tokenizer_config.json. All weights are in memory once.
    `progress` is told about every tenth of the tensors. Raises UserError, possibly after
    some files are written, for whatever the converter does not know or cannot represent.
    """
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{source} is not a readable GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, {tensor.name for tensor in reader.tensors}, dtype)
    tokenizer = _tokenizer(fields)

    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    weights = _weights(reader.tensors, config, getattr(torch, dtype), progress)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    special = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", special)
    _write_json(out / "tokenizer_config.json", _tokenizer_config(fields))
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which another user's server cannot read


def _field(fields: dict[str, Any], key: str, kind: type[T]) -> T:
    """Value of a field that must be there and of the type `kind`."""
    value = fields.get(key)
    if not isinstance(value, kind):
        found = "is missing" if value is None else f"is a {type(value).__name__}"
        raise UserError(f"GGUF field {key} {found}; this converter needs a {kind.__name__}")
    return value


def _config(fields: dict[str, Any], tensors: set[str], dtype: str) -> dict[str, Any]:
    """The Hugging Face config.json of a llama model, from GGUF fields and the names of its tensors."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"GGUF architecture {architecture!r}; this converter knows only 'llama'")
    unknown = sorted(key for key in fields if key.startswith("llama.") and key not in _LLAMA_FIELDS)
    if unknown:
        raise UserError(f"GGUF fields this converter has no rule for: {', '.join(unknown)}")
    hidden = _field(fields, "llama.embedding_length", int)
    heads = _field(fields, "llama.attention.head_count", int)
    if _field(fields, "llama.rope.dimension_count", int) * heads != hidden:
        raise UserError("GGUF model rotates only a part of each head, which this converter has no rule for")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _token_id(fields, "bos"),
        "eos_token_id": _token_id(fields, "eos"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": _field(fields, "llama.feed_forward_length", int),
        "max_position_embeddings": _field(fields, "llama.context_length", int),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": _field(fields, "llama.block_count", int),
        "num_key_value_heads": _field(fields, "llama.attention.head_count_kv", int),
        "pad_token_id": _token_id(fields, "padding"),
        "rms_norm_eps": _decimal(_field(fields, "llama.attention.layer_norm_rms_epsilon", float)),
        "rope_scaling": None,
        "rope_theta": _decimal(_field(fields, "llama.rope.freq_base", float)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": _field(fields, "llama.vocab_size", int),
    }


def _decimal(value: float) -> float:
    """The number somebody wrote, from its fp32 rounding: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _token_id(fields: dict[str, Any], name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    return _field(fields, key, int) if key in fields else None


def _layout(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF tensor name -> (Hugging Face name, shape), for every tensor the model has."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    block: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm": ("input_layernorm", (hidden,)),
        "attn_q": ("self_attn.q_proj", (hidden, hidden)),
        "attn_k": ("self_attn.k_proj", (kv, hidden)),
        "attn_v": ("self_attn.v_proj", (kv, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, hidden)),
        "ffn_norm": ("post_attention_layernorm", (hidden,)),
        "ffn_gate": ("mlp.gate_proj", (inner, hidden)),
        "ffn_up": ("mlp.up_proj", (inner, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, inner)),
    }
    layout: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        layout["output.weight"] = ("lm_head.weight", (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        for ours, (theirs, shape) in block.items():
            layout[f"blk.{layer}.{ours}.weight"] = (f"model.layers.{layer}.{theirs}.weight", shape)
    return layout


def _weights(
    tensors: list[Any],
    config: dict[str, Any],
    dtype: torch.dtype,
    progress: Callable[[str], None] | None,
) -> dict[str, torch.Tensor]:
    """Dequantized tensors under their Hugging Face names, rounded once to `dtype`."""
    layout = _layout(config)
    names = {tensor.name for tensor in tensors}
    for what, odd in (("has unknown", names - layout.keys()), ("lacks", layout.keys() - names)):
        if odd:
            raise UserError(f"the GGUF file {what} tensors: {', '.join(sorted(odd)[:5])}")
    weights = {}
    for done, tensor in enumerate(tensors, 1):
        name, shape = layout[tensor.name]
        found = tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the fastest one first
        if found != shape:
            raise UserError(f"GGUF tensor {tensor.name} has shape {found}; its fields say {shape}")
        try:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        except NotImplementedError as error:
            raise UserError(f"GGUF tensor {tensor.name}: {error}") from error
        if ".attn_q." in tensor.name:
            values = _unpermute(values, config["num_attention_heads"])
        elif ".attn_k." in tensor.name:
            values = _unpermute(values, config["num_key_value_heads"])
        weights[name] = torch.from_numpy(values).to(dtype).contiguous()
        if not weights[name].isfinite().all():
            raise UserError(f"GGUF tensor {tensor.name} does not fit {dtype}; use dtype='bfloat16'")
        if progress and done * 10 // len(tensors) > (done - 1) * 10 // len(tensors):
            progress(f"converted {done} of {len(tensors)} tensors")
    return weights


def _unpermute(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows [heads * d, k] from rotary pairs side by side (GGUF) to pairs d/2 apart (Hugging Face)."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that the fields describe."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise UserError(f"GGUF tokenizer {kind!r} with pre-tokenizer {pre!r}; known: 'gpt2' with {known}")
    for flag in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if fields.get(f"tokenizer.ggml.{flag}"):
            raise UserError(f"GGUF field tokenizer.ggml.{flag} is set, which this converter has no rule for")
    tokens = _field(fields, "tokenizer.ggml.tokens", list)
    types = _field(fields, "tokenizer.ggml.token_type", list)
    if not len(tokens) == len(types) == _field(fields, "llama.vocab_size", int):
        raise UserError(f"GGUF file lists {len(tokens)} tokens and {len(types)} token types, not vocab_size")
    if odd := set(types) - {_NORMAL, _CONTROL}:
        raise UserError(f"GGUF token types {sorted(odd)}; this converter knows {_NORMAL} and {_CONTROL}")
    merges = [tuple(merge.split(" ")) for merge in _field(fields, "tokenizer.ggml.merges", list)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":  # every digit is a token of its own
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    else:
        tokenizer.pre_tokenizer = bytes_
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == _CONTROL
        ]
    )
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        # The name that both transformers 4 and 5 load; 5 itself would write "TokenizersBackend".
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        index = _token_id(fields, ours)
        if index is not None:
            config[f"{theirs}_token"] = tokens[index]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = _field(fields, "tokenizer.chat_template", str)
    return config


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
