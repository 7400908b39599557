"""The softmax of the published methods, to the bit, in plain torch: an executable specification.

NLI (arXiv 2602.02988) and its NN-LUT baseline (arXiv 2112.02191), as their published code evaluates models.
What is served (`kernels.attention`) differs on purpose: it keeps scores in fp32,
sums in fp32 unless asked for fp16, and divides once, after the product with the values.
"""

from __future__ import annotations

import torch

from lutserve.kernels.attention import look_up


def published_softmax(scores: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension with a table for the exponential.

    Args:
        scores: [..., keys] of the model's dtype D (float16, bfloat16 or float32), masked ones included: the
            most negative number of D or minus infinity.
        table: [65536], indexed by the bit pattern of an input of its own dtype. Float16 for NLI, whatever D
            is; D for NN-LUT, which does not round its input further.

    Returns:
        Probabilities of scores' shape and dtype: e = table[s - max], S = rn16(fl32(sum rn16(e))),
        p = rnD(fl32(e / S)).

    """
    difference = scores - scores.amax(-1, keepdim=True)
    e = look_up(table, difference)
    total = e.half().float().sum(-1, keepdim=True).half()
    return (e / total.float()).to(scores.dtype)
