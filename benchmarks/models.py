"""Models for benchmarks: speed does not depend on what the weights say, so they can be random.

`random_llama` writes a Llama of about 1.1 billion parameters (2.2 GB, half a minute on two cores);
`to_w8a8` writes the same weights in the form that vLLM's own int8 path serves. `outlier_heavy` gives a
trained model activations that are hard to quantise.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lutserve import env
from lutserve.errors import UserError

# One channel in so many is made 20 times larger by every norm, as trained models have them: without
# these the outlier columns of mix8 would cost nothing, which would flatter its speed.
_OUTLIER_EVERY = 256
_OUTLIER_GAIN = 20.0
_CONTEXT = 4096
#: channels of every norm that `outlier_heavy` makes larger, and how much; powers of two round nothing
_HEAVY_CHANNELS = 8
_HEAVY_GAINS = (32.0, 64.0)
#: norm -> the layers that read it
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def default_folder(name: str) -> Path:
    """Return where a benchmark model lives: below lutserve's cache folder."""
    return env.cache_dir() / "bench" / name


def random_llama(
    folder: Path,
    *,
    hidden: int = 2048,
    layers: int = 16,
    intermediate: int = 8192,
    heads: int = 32,
    kv_heads: int = 8,
    vocab: int = 32000,
    seed: int = 0,
) -> Path:
    """Write a random Llama in bfloat16 as a Hugging Face folder, and return the folder.

    Memory use is that of one layer. A folder that is already complete is left as it is.

    Raises:
        UserError: the folder holds something else, or there is no space for it.

    """
    outliers = max(1, hidden // _OUTLIER_EVERY)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": _CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "lutserve_bench": {"seed": seed, "outliers": outliers},
    }
    if _complete(folder, config):
        return folder
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        # Rows of unit gain keep activations at the size of their inputs.
        weight = torch.randn(rows, columns, generator=generator)
        return weight.mul_(gain * columns**-0.5).bfloat16()

    def norm(large: int = outliers) -> torch.Tensor:
        weight = torch.ones(hidden)
        weight[torch.randperm(hidden, generator=generator)[:large]] = _OUTLIER_GAIN
        return weight.bfloat16()

    kv = kv_heads * hidden // heads
    # Each branch adds to the residual: together they should not outgrow the embedding.
    branch = (2 * layers) ** -0.5

    def shards() -> Iterator[dict[str, torch.Tensor]]:
        yield {
            "model.embed_tokens.weight": matrix(vocab, hidden, hidden**0.5),
            "model.norm.weight": norm(large=0),
            "lm_head.weight": matrix(vocab, hidden),
        }
        for layer in range(layers):
            tensors = {
                "input_layernorm": norm(),
                "self_attn.q_proj": matrix(hidden, hidden),
                "self_attn.k_proj": matrix(kv, hidden),
                "self_attn.v_proj": matrix(kv, hidden),
                "self_attn.o_proj": matrix(hidden, hidden, branch),
                "post_attention_layernorm": norm(),
                "mlp.gate_proj": matrix(intermediate, hidden),
                "mlp.up_proj": matrix(intermediate, hidden),
                "mlp.down_proj": matrix(hidden, intermediate, branch),
            }
            yield {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in tensors.items()}

    with _building(folder) as building:
        _write_shards(building, shards())
        _write_tokenizer(building, vocab)
        _write_json(building / "config.json", config)
    return folder


def to_w8a8(folder: Path, out: Path) -> Path:
    """Write the model of `folder` as a compressed-tensors W8A8 int8 checkpoint, and return `out`.

    Symmetric int8 weights with one scale a row (largest magnitude / 127); activations are quantised a
    token at a time by whoever serves it. Embeddings, norms and lm_head stay as they are. A folder that
    is already complete is left as it is.

    Raises:
        UserError: `folder` is not one of `random_llama`, `out` holds something else, or there is no space.

    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise UserError(f"{folder} is no model written by random_llama: it has no {index.name}")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": w8a8_config()}
    if _complete(out, config):
        return out

    def shards() -> Iterator[dict[str, torch.Tensor]]:
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            with safe_open(folder / name, framework="pt") as shard:
                tensors: dict[str, torch.Tensor] = {}
                for key in shard.keys():  # noqa: SIM118  (no mapping: iterating it does not work)
                    tensors |= _quantized(key, shard.get_tensor(key))
                yield tensors

    with _building(out) as building:
        _write_shards(building, shards())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / name, building / name)
        _write_json(building / "config.json", config)
    return out


def outlier_heavy(folder: Path, out: Path) -> Path:
    """Write a Llama with outlier columns 32 to 64 times the others, which computes the same; return `out`.

    In every norm `_HEAVY_CHANNELS` random channels are multiplied, and the columns of the layers that read
    them divided, by a power of two: not one bit of the 16-bit function changes, but whoever quantises rows of
    activations with these columns in them loses five to six bits of the others.

    Args:
        folder: a Hugging Face folder of the Llama family with safetensors weights.
        out: the folder to make; one that is already complete is left as it is.

    Raises:
        UserError: `folder` has none of the norms, `out` holds something else, or there is no space.

    """
    config = json.loads((folder / "config.json").read_text())
    config["lutserve_bench"] = {"channels": _HEAVY_CHANNELS, "gains": _HEAVY_GAINS}
    config = json.loads(json.dumps(config))
    if _complete(out, config):
        return out
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    generator = torch.Generator().manual_seed(0)
    norms = [name for name in sorted(tensors) if name.split(".")[-2] in _READERS]
    if not norms:
        raise UserError(f"{folder} has no norms called {' or '.join(_READERS)}")
    for name in norms:
        stem, norm, _ = name.rsplit(".", 2)
        gain = torch.ones(len(tensors[name]), dtype=tensors[name].dtype)
        channels = torch.randperm(len(gain), generator=generator)[:_HEAVY_CHANNELS]
        gain[channels] = torch.tensor(_HEAVY_GAINS, dtype=gain.dtype).repeat(_HEAVY_CHANNELS)[: len(channels)]
        tensors[name] *= gain
        for reader in _READERS[norm]:
            tensors[f"{stem}.{reader}.weight"] /= gain

    with _building(out) as building:
        for file in folder.glob("*.json"):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, building / file.name)
        _write_shards(building, iter([tensors]))
        _write_json(building / "config.json", config)
    return out


def _quantized(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    if "_proj." not in name:
        return {name: weight}
    exact = weight.float()
    scale = exact.abs().amax(dim=1, keepdim=True) / 127
    scale[scale == 0] = 1.0
    codes = (exact / scale).round().to(torch.int8)
    return {name: codes, name.removesuffix("weight") + "weight_scale": scale}


def w8a8_config() -> dict[str, Any]:
    """Return the `quantization_config` of `to_w8a8`."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _complete(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the folder holds the model of this config; UserError if it holds something else."""
    if not folder.exists():
        return False
    path = folder / "config.json"
    if path.is_file() and json.loads(path.read_text()) == config:
        return True
    raise UserError(f"{folder} exists and is not this benchmark model; remove it or give another folder")


@contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that takes its final name only when everything is written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".") as temporary:
            building = Path(temporary) / folder.name
            building.mkdir()
            yield building
            if not folder.exists():
                building.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {folder} ({error}); set LUTSERVE_CACHE to a folder with space"
        ) from error


def _write_shards(folder: Path, shards: Iterator[dict[str, torch.Tensor]]) -> None:
    """Write one safetensors file a shard, and the index that names them."""
    places: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(shards):
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(folder: Path, vocab: int) -> None:
    """Write a tokenizer of `vocab` words "w3", "w4", ...

    Any sequence of tokens survives decoding and encoding, so that a random prompt of n tokens, which
    `vllm bench` sends as text, is n tokens at the server as well.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>"]
    words = [*special, *(f"w{number}" for number in range(len(special), vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": special[0],
        "bos_token": special[1],
        "eos_token": special[2],
        "clean_up_tokenization_spaces": False,
        "model_max_length": _CONTEXT,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
