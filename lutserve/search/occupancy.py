"""What a model occupies under each method: weights of the linear layers, the whole model, the KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from lutserve.methods import METHODS
from lutserve.search import architecture, cost

#: one of the 4-bit formats, which all take the same
FORMAT = "nf4"
#: what every checkpoint can be served with, and that format
_METHODS = (*(name for name, method in METHODS.items() if not method.offline), FORMAT)


def describe(
    config: Mapping[str, Any], methods: Iterable[str] = _METHODS, group_size: int | None = None
) -> dict[str, Any]:
    """Sizes of a model from its `config.json`.

    Args:
        config: the model's `config.json`.
        methods: names as `--method` has them.
        group_size: columns that share a scale in the 4-bit ones; default: each method's own.

    Returns:
        architecture: dimensions and linear layers. parameters: elements by kind. kv_bytes_per_token: of one
        sequence, in 16 bit. methods: bits a weight of the linear layers, their bytes and the model's, counted
        as `cost.account` does.

    Raises:
        UserError: a model, method or group size that cannot be.

    """
    arch = architecture.of(config)
    rows = []
    for name in methods:
        group: dict[str, Any] = {"targets": ["Linear"], "method": name}
        group |= {} if group_size is None else {"group_size": group_size}
        recipe = {"quant_method": "lutserve", "config_groups": {"all": group}}
        stored = cost.stored(arch, cost.chosen(arch, recipe))
        rows.append(
            {
                "method": name,
                "bits_per_weight": round(stored["effective_bits_per_weight"], 4),
                "linear_bytes": -(-int(stored["linear_weight_bits"]) // 8),
                "model_bytes": int(stored["model_bytes"]),
            }
        )
    counts = cost.account(config)
    return {
        "architecture": asdict(arch),
        "parameters": {
            "total": arch.parameters,
            "linear": arch.linear_weights,
            "embedding": arch.embedding,
            "head": 0 if arch.tie else arch.head,
            "biases": arch.biases,
            "norms": arch.norms,
        },
        "kv_bytes_per_token": counts["decode_bytes_batch1_ctx1024_16bit"]["kv_bytes_per_token"],
        "methods": rows,
    }
