"""Tiny random models for tests: made in well under a second, the same on every machine, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

HEAD_DIM = 32  # the smallest head that vLLM's CPU attention takes

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Only its byte pairs matter: there must be enough of them for a vocabulary of a few hundred tokens.
TEXT = """
The river rises in the hills north of the town, where the rain of one night can fill every stream by
morning. People who live along its banks know the sound of the water and keep their boats tied high.
In summer the same river is a thin line between white stones, and children cross it without wetting
their knees. A mill stood here for three hundred years; its wheel turned slowly, its owner counted the
sacks, and its roof sheltered travellers whenever the road was closed. When the railway came the mill
fell silent. What remains is a wall, a long garden, and an old pear tree that still bears fruit. The
station, too, has closed since then: grass grows between the rails, and the clock has stopped at nine.
Yet the market opens every Thursday, with bread, cheese, honey, onions and second-hand books, and the
square fills with voices as it did before. Visitors ask which way leads to the castle. There is none,
the baker answers, but there is a good view from the church tower, if you do not mind the steps.
def area(width, height): return width * height  # 12 * 345 = 4140
for name, value in sorted(table.items()): print(f"{name}: {value:.3f}")
"""


def tiny_llama(
    folder: Path,
    *,
    hidden_act: str = "silu",
    dtype: str = "bfloat16",
    hidden: int = 128,
    intermediate: int = 256,
    layers: int = 2,
    vocab: int = 512,
) -> Path:
    """Write a Llama Hugging Face folder (`hidden` / 32 heads, half as many kv heads) and return it."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": hidden_act}
    sizes = {"hidden": hidden, "intermediate": intermediate, "layers": layers, "vocab": vocab}
    return _write(folder, config | {"tie_word_embeddings": False}, dtype, **sizes)


def tiny_gemma(folder: Path, *, dtype: str = "bfloat16") -> Path:
    """Write a Gemma folder: GELU gate, zero-centred norm weights, tied and scaled embeddings."""
    act = "gelu_pytorch_tanh"
    config = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": act}
    config |= {"hidden_activation": act, "tie_word_embeddings": True}
    return _write(folder, config, dtype, hidden=128, intermediate=256, layers=2, vocab=512)


def tiny_gguf(file: Path, model: Path, *, fields: dict[str, Any] | None = None) -> Path:
    """Write the folder of `tiny_llama` as a GGUF file: Q4_1 for ffn_down, F16 for other matrices.

    `fields` replaces (or, with None, leaves out) fields; values are str, bool, int or float, and a
    list for tokenizer.ggml.token_type.
    """
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    values: dict[str, Any] = {
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": config["rope_theta"],
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.chat_template": CHAT_TEMPLATE,
    } | (fields or {})
    writer = gguf.GGUFWriter(file, values.pop("general.architecture", "llama"))
    writer.add_token_list(tokens)
    writer.add_token_types(values.pop("tokenizer.ggml.token_type"))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in values.items():
        if value is not None:
            add[type(value)](key, value)
    for name, tensor in load_file(model / "model.safetensors").items():
        array = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            array = _interleave(array)
        if "down_proj" in name:
            kind = gguf.GGMLQuantizationType.Q4_1
        else:
            kind = gguf.GGMLQuantizationType.F16 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face llama tensor."""
    for theirs, ours in {
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }.items():
        name = name.replace(theirs, ours)
    return name


def _interleave(rows: np.ndarray) -> np.ndarray:
    """Rotary pairs d/2 rows apart -> side by side, row by row (the slow, obvious way)."""
    out = np.empty_like(rows)
    for row in range(len(rows)):
        head, within = divmod(row, HEAD_DIM)
        half, pair = divmod(within, HEAD_DIM // 2)
        out[head * HEAD_DIM + 2 * pair + half] = rows[row]
    return out


def _write(
    folder: Path,
    config: dict[str, Any],
    dtype: str,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    vocab: int,
) -> Path:
    heads = hidden // HEAD_DIM
    config = config | {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": HEAD_DIM,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": 1024,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads // 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": dtype,
        "vocab_size": vocab,
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(getattr(torch, dtype)) for name, value in _weights(config).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(vocab).save(str(folder / "tokenizer.json"))
    _json(folder / "config.json", config)
    _json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    _json(folder / "tokenizer_config.json", tokenizer_config)
    return folder


def _weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random fp32 weights: gate inputs of about +-8, so that nonlinearities show, and peaked logits."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * HEAD_DIM
    centre = 0.0 if config["model_type"] == "gemma" else 1.0  # Gemma multiplies by 1 + weight
    # With tied embeddings a weak branch would leave the input token the likeliest output for ever.
    branch = 12.0 if config["tie_word_embeddings"] else 2.0

    def matrix(rows: int, columns: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    def norm() -> torch.Tensor:
        return centre + 0.1 * torch.randn(hidden, generator=generator)

    weights = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden, 2.0),
        "model.norm.weight": norm(),
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden, 2.0)
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm": norm(),
            "self_attn.q_proj": matrix(hidden, hidden, 1.5),
            "self_attn.k_proj": matrix(kv, hidden, 1.5),
            "self_attn.v_proj": matrix(kv, hidden, 1.0),
            "self_attn.o_proj": matrix(hidden, hidden, branch),
            "post_attention_layernorm": norm(),
            "mlp.gate_proj": matrix(inner, hidden, 2.0),
            "mlp.up_proj": matrix(inner, hidden, 1.0),
            "mlp.down_proj": matrix(hidden, inner, branch),
        }
        weights |= {f"model.layers.{layer}.{name}.weight": value for name, value in block.items()}
    return weights


def _tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE with exactly `vocab` tokens, trained on TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=1,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"TEXT gives {tokenizer.get_vocab_size()} tokens, not {vocab}; 259 to 679 work")
    return tokenizer


def _json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
