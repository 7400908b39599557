"""Exact counts for a model: MACs, FLOPs, BOPs, bytes and table look-ups, from its `config.json`.

One MAC is two FLOPs. Biases, norms, rotary embeddings and the softmax are no MACs; their nonlinear functions
are counted apart, as look-ups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lutserve.recipe import Group, Recipe, parse
from lutserve.search import architecture, precision
from lutserve.search.architecture import Architecture, Site
from lutserve.search.precision import Precision

#: bits of what is not in the linear layers: embeddings, norms, output layer, KV cache, attention
_REST = 16
_SIZES = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "tie")

Choice = Callable[[int, Site], Precision]


def account(
    config: Mapping[str, Any],
    recipe: Recipe | Mapping[str, Any] | None = None,
    tokens: int | Sequence[int] = 2048,
    context: int | Sequence[int] = 1024,
) -> dict[str, Any]:
    """Count what a model costs.

    Args:
        config: the model's `config.json`.
        recipe: which method each layer takes; default 16 bit everywhere.
        tokens: lengths of a prompt, for `prefill`.
        context: keys that a decoded token attends to, itself included, for `decode`.

    Returns:
        arch, params: sizes. per_token_linear: MACs of linear layers and output layer. prefill, decode: by
        length. lut_sites: evaluations of nonlinear functions. recipe: bits, bytes and BOPs under the recipe,
        decode_bytes_batch1_ctx<context>_<16bit or recipe>: bytes moved for one token.

    Raises:
        UserError: a model or a method that is not known here.

    """
    arch = architecture.of(config)
    lengths, contexts = _listed(tokens), _listed(context)
    choice = chosen(arch, recipe)
    kind = "16bit" if recipe is None else "recipe"
    return {
        "arch": {name: getattr(arch, name) for name in _SIZES},
        "params": _params(arch),
        "per_token_linear": {"linear_macs": arch.linear_weights, "lm_head_macs": arch.head},
        "prefill": {str(length): _prefill(arch, length) for length in lengths},
        "decode": {str(keys): _decode(arch, keys) for keys in contexts},
        "lut_sites": {
            "per_layer_per_token": _activations(arch)
            | {"rsqrt": arch.block_norms, "softmax_reciprocal": arch.heads, "exp_per_key": arch.heads},
            **{f"decode_ctx_{keys}": _lookups(arch, 1, _attended(arch, keys)) for keys in contexts},
            **{f"prefill_{n}_causal": _lookups(arch, n, _causal(arch, n)) for n in lengths},
        },
        "recipe": stored(arch, choice)
        | {
            f"decode_bops_ctx{keys}_attn16_head16": linear_bops(arch, choice)
            + (_decode(arch, keys)["attention_macs"] + arch.head) * _REST * _REST
            for keys in contexts
        },
        **{f"decode_bytes_batch1_ctx{keys}_{kind}": _moved(arch, choice, keys) for keys in contexts},
    }


def chosen(arch: Architecture, recipe: Recipe | Mapping[str, Any] | None) -> Choice:
    """Which precision a recipe gives the site of a layer."""
    if recipe is None:
        return lambda layer, site: precision.of(Group(method="none"))
    known = recipe if isinstance(recipe, Recipe) else parse(recipe)

    def choice(layer: int, site: Site) -> Precision:
        shards = [f"{arch.blocks}.{layer}.{name}" for name in site.shards]
        return precision.of(known.group_for(arch.prefix(layer, site), shards))

    return choice


def stored(arch: Architecture, choice: Choice) -> dict[str, float]:
    """Bits of the linear layers, bytes of the model, BOPs of the linear layers a token."""
    bits = sum(choice(layer, site).bits(site.out, site.columns) for layer, site in _all(arch))
    rest = (arch.parameters - arch.linear_weights) * _REST
    return {
        "linear_weight_bits": bits,
        "effective_bits_per_weight": bits / arch.linear_weights,
        "model_bytes": -(-(bits + rest) // 8),
        "linear_bops_per_token": linear_bops(arch, choice),
    }


def linear_bops(arch: Architecture, choice: Choice) -> int:
    """Bit operations of the linear layers a token."""
    return sum(choice(layer, site).bops(site.out, site.columns) for layer, site in _all(arch))


def _all(arch: Architecture) -> list[tuple[int, Site]]:
    return [(layer, site) for layer in range(arch.layers) for site in arch.sites]


def _listed(lengths: int | Sequence[int]) -> Sequence[int]:
    return [lengths] if isinstance(lengths, int) else lengths


def _params(arch: Architecture) -> dict[str, Any]:
    sites = {site.name.rpartition(".")[2]: site.weights for site in arch.sites}
    if len(sites) < len(arch.sites):
        # GPT-2 calls both of its projections c_proj.
        sites = {site.name: site.weights for site in arch.sites}
    return {
        "per_layer_sites": sites,
        "per_layer_linear": sum(sites.values()),
        "all_layers_linear": arch.linear_weights,
        "norm": arch.norms,
        "bias": arch.biases,
        "embedding": arch.embedding,
        "lm_head_macs_per_token": arch.head,
        "total": arch.parameters,
    }


def _attended(arch: Architecture, keys: int) -> list[int]:
    """Keys that the last of `keys` tokens attends to, in each layer."""
    return [min(keys, window or keys) for window in arch.windows]


def _causal(arch: Architecture, length: int) -> list[int]:
    """Pairs of a token and a key that a prompt has, in each layer."""
    short = _attended(arch, length)
    return [window * (window + 1) // 2 + (length - window) * window for window in short]


def _attention(arch: Architecture, pairs: Sequence[int]) -> int:
    """MACs of scores and weighted sums; sharing keys between heads does not reduce them."""
    return 2 * arch.heads * arch.head_dim * sum(pairs)


def _prefill(arch: Architecture, length: int) -> dict[str, int]:
    linear, head = length * arch.linear_weights, arch.head
    causal = _attention(arch, _causal(arch, length))
    dense = _attention(arch, [length * length] * arch.layers)
    return {
        "linear_macs": linear,
        "attention_macs_causal": causal,
        "attention_macs_dense": dense,
        "lm_head_macs_all_positions": length * head,
        "lm_head_macs_last_only": head,
        "total_macs_causal_all_logits": linear + causal + length * head,
        "total_macs_dense_all_logits": linear + dense + length * head,
        "total_flops_causal_last_logit": 2 * (linear + causal + head),
    }


def _decode(arch: Architecture, keys: int) -> dict[str, int]:
    attention = _attention(arch, _attended(arch, keys))
    total = arch.linear_weights + attention + arch.head
    return {
        "linear_macs": arch.linear_weights,
        "attention_macs": attention,
        "lm_head_macs": arch.head,
        "total_macs": total,
        "total_flops": 2 * total,
    }


def _activations(arch: Architecture) -> dict[str, int]:
    return {arch.activation: arch.intermediate} if arch.activation else {}


def _lookups(arch: Architecture, tokens: int, pairs: Sequence[int]) -> dict[str, int]:
    return {name: tokens * arch.layers * count for name, count in _activations(arch).items()} | {
        "rsqrt": tokens * (arch.layers * arch.block_norms + 1),
        "reciprocal": tokens * arch.layers * arch.heads,
        "exp": arch.heads * sum(pairs),
    }


def _moved(arch: Architecture, choice: Choice, keys: int) -> dict[str, int]:
    """Bytes read and written to decode one token of one sequence."""
    entry = 2 * arch.kv_heads * arch.head_dim * _REST // 8
    weights = -(-int(stored(arch, choice)["linear_weight_bits"]) // 8)
    head, write = arch.head * _REST // 8, arch.layers * entry
    read = entry * sum(count - 1 for count in _attended(arch, keys))
    return {
        "linear_weights": weights,
        "lm_head": head,
        "kv_bytes_per_token": write,
        "kv_read": read,
        "kv_write": write,
        "total": weights + head + read + write,
    }
