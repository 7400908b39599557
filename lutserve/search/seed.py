"""The published mixed-precision rule of llm-mixed-precision (TeraQuant) and its accounting, for comparison.

Its rule gives the blocks of least distortion one bit less than the others. Its accounting counts the
attention's weights three times, their MACs twice and the MLP not at all; all that is not quantised as 32 bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lutserve.errors import UserError
from lutserve.recipe import Recipe
from lutserve.search import architecture, cost


def block_bits(distortion: Sequence[float], target: int, percentile: float) -> list[int]:
    """Bits of each block: target - 1 for those of least distortion, target for the others.

    The closed form of the linear program that the published script hands to SLSQP, whose constraint never
    binds. SLSQP itself can differ in one block.

    Args:
        distortion: one number for each block.
        target: mean bits asked for.
        percentile: 95 or 75: 100 minus the share of blocks with one bit less.

    """
    gain = -np.asarray(distortion, dtype=np.float64)
    return [int(bits) for bits in np.where(gain > np.percentile(gain, percentile), target - 1, target)]


def account(
    config: Mapping[str, Any], recipe: Recipe | Mapping[str, Any] | None = None, tokens: int = 1024
) -> dict[str, float]:
    """Size and BOPs as the published tables count them, for models of the LLaMA layout.

    UserError for another layout, and where the layers of one block have different precisions.
    """
    arch = architecture.of(config)
    if arch.blocks != "model.layers":
        raise UserError(f"--accounting seed is known for models of the LLaMA layout, not for {arch.family}")
    choice = cost.chosen(arch, recipe)
    blocks = []
    for layer in range(arch.layers):
        pairs = {(p.weight, p.activation) for p in (choice(layer, site) for site in arch.sites)}
        if len(pairs) > 1:
            raise UserError(
                f"--accounting seed has one precision for a whole block, but block {layer} has {len(pairs)}"
            )
        blocks.append(pairs.pop())
    return totals(arch, [w for w, _ in blocks], [a for _, a in blocks], tokens)


def totals(
    arch: architecture.Architecture, weight: Sequence[int], activation: Sequence[int], tokens: int = 1024
) -> dict[str, float]:
    """The same from the bits of each block's weights and activations."""
    h, layers, vocab = arch.hidden, arch.layers, arch.vocab
    rest = 4 * (4 * h * layers + 2 * vocab * h + h)
    megabytes = (sum(weight) * 12 * h * h / 8 + rest) / 1e6
    block = 8 * h * h * tokens + 2 * h * tokens * tokens
    products = sum(w * a for w, a in zip(weight, activation, strict=True))
    giga = (products * block + 1024 * vocab * h * tokens) // 10**9
    return {
        "size_MB": megabytes,
        "size_GB_1024": megabytes / 1024,
        "GBOPs": giga,
        "TBOPs_1024": giga / 1024,
        "avg_bits": sum(weight) / layers,
    }
