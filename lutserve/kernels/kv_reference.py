"""Attention as AxCore's authors evaluate a 4-bit cache (DOI 10.1145/3725843.3756094), whatever it costs.

Keys and values of one forward pass are quantised and decoded to fp16 at once: keys by token and 64 channels,
values by channel and 64 tokens, the last group of which is padded with zeros. (So values are scaled by tokens
that a row must not know yet, and a token that comes alone is scaled by itself.) Both products are FPMA of
fp16 numbers with C = 58, summed in fp16 in the order of channels and of tokens; the softmax is exact in fp32
and rounded to fp16.
"""

from __future__ import annotations

import torch

from lutserve.kernels import kv4
from lutserve.kernels.axcore import fpma_linear, pack_uniform
from lutserve.luts import fpma


def fake_quantise(
    x: torch.Tensor, bounds: torch.Tensor, divisor: float, values: torch.Tensor
) -> torch.Tensor:
    """Return fp16 x [..., n] by groups of 64 along its last dimension as it is after quantisation, fp16.

    bounds, divisor, values: of a coding, fp32 [15], a number, [16].
    """
    indices, scales = kv4.quantise(x, kv4.GROUP, bounds, divisor)
    wide = scales.float().repeat_interleave(kv4.GROUP, -1)[..., : x.shape[-1]]
    return torch.where(wide == 0, 0.0, values.float()[indices.long()] * wide).half()


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, before: bool
) -> torch.Tensor:
    """Causal attention of one request's last rows, fp16 [rows, heads, head size].

    query: fp16 [rows, heads, head size]. key, value: fp16 [tokens, kv heads, head size], decoded. scale: of
    the scores; `before`: the query is multiplied by it and rounded (OPT), and not the finished sums (LLaMA).
    """
    rows, tokens, size = len(query), len(key), query.shape[2]
    group, compensation = query.shape[1] // key.shape[1], fpma.uniform()
    q = (query.float() * scale).half() if before else query
    hidden = torch.arange(tokens) > torch.arange(tokens - rows, tokens)[:, None]
    out = torch.empty_like(query)
    for head in range(query.shape[1]):
        keys = pack_uniform(key[:, head // group])
        scores = fpma_linear(q[:, head].contiguous(), keys, compensation, size, tokens, None).float()
        scores = scores if before else (scores * scale).half().float()
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).half()
        values = pack_uniform(value[:, head // group].T)
        out[:, head] = fpma_linear(weights, values, compensation, tokens, size, None)
    return out
