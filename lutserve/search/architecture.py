"""What a model is made of, from its `config.json` alone: its fused linear layers and their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lutserve.errors import UserError


@dataclass(frozen=True)
class Site:
    """A fused linear layer of every decoder block, as vLLM has it.

    name: below the block, e.g. ``self_attn.qkv_proj``. shards: the checkpoint's names of its parts, below the
    block. out, columns: the weight's size. bias: whether it has one. row_parallel: whether tensor parallelism
    cuts its columns instead of its outputs. cuts: outputs of each of several parts that vLLM tells apart.
    """

    name: str
    shards: tuple[str, ...]
    out: int
    columns: int
    bias: bool = False
    row_parallel: bool = False
    cuts: tuple[int, ...] = ()

    @property
    def weights(self) -> int:
        """Elements of the weight, which are also its MACs a token."""
        return self.out * self.columns

    @property
    def parts(self) -> tuple[int, ...]:
        """Outputs of each part."""
        return self.cuts or (self.out,)


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder-only model.

    blocks: name of the list of decoder blocks. activation: silu, gelu, or "" where no table is read.
    norms: parameters of all norms. block_norms: norms evaluated a token and block, those of heads included.
    positions: learnt position embeddings, rows. windows: keys that each block attends to at most, or None.
    """

    family: str
    blocks: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tie: bool
    sites: tuple[Site, ...]
    activation: str
    norms: int
    block_norms: int = 2
    positions: int = 0
    windows: tuple[int | None, ...] = ()

    @property
    def linear_weights(self) -> int:
        """Elements of all fused linear layers."""
        return self.layers * sum(site.weights for site in self.sites)

    @property
    def biases(self) -> int:
        """Elements of their biases."""
        return self.layers * sum(site.out for site in self.sites if site.bias)

    @property
    def embedding(self) -> int:
        """Elements of the embeddings of tokens and positions."""
        return (self.vocab + self.positions) * self.hidden

    @property
    def head(self) -> int:
        """Elements of the output layer, whether it is a parameter of its own or the embedding."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All elements, a tied output layer counted once."""
        own_head = 0 if self.tie else self.head
        return self.linear_weights + self.biases + self.norms + self.embedding + own_head

    def prefix(self, layer: int, site: Site) -> str:
        """Name of a fused layer in vLLM, e.g. ``model.layers.3.self_attn.qkv_proj``."""
        return f"{self.blocks}.{layer}.{site.name}"


def of(config: Mapping[str, Any]) -> Architecture:
    """Read a `config.json`; UserError for a model that is not of a known family, or lacks a size."""
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise UserError(f"model_type {family!r} is not supported here; allowed: {', '.join(_FAMILIES)}")
    try:
        return _FAMILIES[family](config)
    except KeyError as error:
        raise UserError(f"config.json of a {family} model has no {error}") from None


def fused(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name of the fused layer of every part that a checkpoint has, and the names of all parts of it.

    UserError as `of`.
    """
    arch = of(config)
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for layer in range(arch.layers):
        for site in arch.sites:
            parts = tuple(f"{arch.blocks}.{layer}.{shard}" for shard in site.shards)
            found |= dict.fromkeys(parts, (arch.prefix(layer, site), parts))
    return found


def _llama(config: Mapping[str, Any]) -> Architecture:
    family = config["model_type"]
    hidden, layers, heads = (
        int(config[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    kv_heads = int(config.get("num_key_value_heads") or heads)
    d, inner = int(config.get("head_dim") or hidden // heads), int(config["intermediate_size"])
    attention_bias = bool(config.get("attention_bias", family == "qwen2"))
    mlp_bias = bool(config.get("mlp_bias", False))
    head_norms = family == "qwen3"
    qkv, gate = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    return Architecture(
        family=family,
        blocks="model.layers",
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=d,
        intermediate=inner,
        vocab=int(config["vocab_size"]),
        tie=bool(config.get("tie_word_embeddings", family == "gemma")),
        sites=(
            Site(
                "self_attn.qkv_proj",
                _below("self_attn", qkv),
                (heads + 2 * kv_heads) * d,
                hidden,
                attention_bias,
                cuts=(heads * d, kv_heads * d, kv_heads * d),
            ),
            # Qwen2 has biases at q, k and v only.
            Site(
                "self_attn.o_proj",
                ("self_attn.o_proj",),
                hidden,
                heads * d,
                attention_bias and family != "qwen2",
                True,
            ),
            Site("mlp.gate_up_proj", _below("mlp", gate), 2 * inner, hidden, mlp_bias, cuts=(inner, inner)),
            Site("mlp.down_proj", ("mlp.down_proj",), hidden, inner, mlp_bias, True),
        ),
        activation="gelu" if family == "gemma" else "silu",
        norms=(2 * layers + 1) * hidden + (2 * layers * d if head_norms else 0),
        block_norms=2 + (heads + kv_heads if head_norms else 0),
        windows=_windows(config, layers),
    )


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The sliding window of each block."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types") or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _gpt2(config: Mapping[str, Any]) -> Architecture:
    hidden, layers, heads = (int(config[key]) for key in ("n_embd", "n_layer", "n_head"))
    inner = int(config.get("n_inner") or 4 * hidden)
    return Architecture(
        family="gpt2",
        blocks="transformer.h",
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=inner,
        vocab=int(config["vocab_size"]),
        tie=bool(config.get("tie_word_embeddings", True)),
        sites=(
            Site("attn.c_attn", ("attn.c_attn",), 3 * hidden, hidden, True, cuts=(hidden,) * 3),
            Site("attn.c_proj", ("attn.c_proj",), hidden, hidden, True, True),
            Site("mlp.c_fc", ("mlp.c_fc",), inner, hidden, True),
            Site("mlp.c_proj", ("mlp.c_proj",), hidden, inner, True, True),
        ),
        activation=_activation(config.get("activation_function", "gelu_new")),
        norms=(2 * layers + 1) * 2 * hidden,
        positions=int(config["n_positions"]),
        windows=(None,) * layers,
    )


def _opt(config: Mapping[str, Any]) -> Architecture:
    hidden, layers, heads = (
        int(config[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    if config.get("word_embed_proj_dim", hidden) != hidden or not config.get("do_layer_norm_before", True):
        raise UserError(
            "OPT with projected embeddings or norms behind the layers (opt-350m) is not supported"
        )
    inner, bias = int(config["ffn_dim"]), bool(config.get("enable_bias", True))
    qkv = _below("self_attn", ("q_proj", "k_proj", "v_proj"))
    return Architecture(
        family="opt",
        blocks="model.decoder.layers",
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=inner,
        vocab=int(config["vocab_size"]),
        tie=bool(config.get("tie_word_embeddings", True)),
        sites=(
            Site("self_attn.qkv_proj", qkv, 3 * hidden, hidden, bias, cuts=(hidden,) * 3),
            Site("self_attn.out_proj", ("self_attn.out_proj",), hidden, hidden, bias, True),
            Site("fc1", ("fc1",), inner, hidden, bias),
            Site("fc2", ("fc2",), hidden, inner, bias, True),
        ),
        activation=_activation(config.get("activation_function", "relu")),
        norms=(2 * layers + 1) * 2 * hidden,
        # The first two rows are for padding.
        positions=int(config["max_position_embeddings"]) + 2,
        windows=(None,) * layers,
    )


def _below(stem: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{stem}.{name}" for name in names)


def _activation(name: str) -> str:
    """The table that an activation function of transformers reads."""
    return "gelu" if "gelu" in name else "silu" if name in ("silu", "swish") else ""


_FAMILIES: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _llama),
    "gpt2": _gpt2,
    "opt": _opt,
}
