"""The methods that MixQ is compared with, as executable specifications in plain torch.

Sources: LLM.int8 (arXiv 2208.07339), QUIK (arXiv 2310.09259) as MixQ's repository ports it, EETQ's W8A16, and
the 4-bit GEMV that MixQ's later form decodes with.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lutserve.kernels.mixq_reference import SIGMA

#: nibble of an int32 of the GEMV's weight -> input column of its octet
GEMV_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class LlmInt8(NamedTuple):
    """Result fp16 [M, N], outlier columns int64 [S], codes int8 of x [M, K] and of the weight [N, K]."""

    out: Tensor
    columns: Tensor
    codes: Tensor
    weight_codes: Tensor


def llm_int8(x: Tensor, weight: Tensor) -> LlmInt8:
    """LLM.int8: columns where any |x| > 6 of this very call in 16 bit, with dequantised weights.

    Args:
        x: fp16 [M, K].
        weight: fp16 [N, K].

    """
    columns = (x.abs() > SIGMA).any(0).nonzero()[:, 0]
    rest = x.float().clone()
    rest[:, columns] = 0
    weight_codes, weight_scales = _absmax(weight.float())
    codes, scales = _absmax(rest)
    integer = (codes.double() @ weight_codes.double().T).float() * (scales * weight_scales.T)
    kept = (weight_codes[:, columns].float() * weight_scales).half()
    outliers = (x[:, columns].double() @ kept.double().T).float()
    return LlmInt8((integer.half().float() + outliers).half(), columns, codes, weight_codes)


def _absmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and fp32 scales [R, 1] of rows."""
    scales = x.abs().amax(1, keepdim=True) / 127
    return (x / torch.where(scales > 0, scales, 1.0)).round().to(torch.int8), scales


class Quik(NamedTuple):
    """Result fp16 [M, N]; codes int8 of the columns that are not kept, scales and offsets fp16."""

    out: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    weight_codes: Tensor
    weight_scales: Tensor
    sums: Tensor


def quik(x: Tensor, weight: Tensor, columns: Tensor) -> Quik:
    """QUIK-4B as MixQ's repository ports it: int4 weights by rounding, asymmetric int4 activations.

    Args:
        x: fp16 [M, K].
        weight: fp16 [N, K].
        columns: int64 [S], calibrated, kept in 16 bit on both sides.

    """
    keep = torch.ones(x.shape[1], dtype=torch.bool)
    keep[columns] = False
    rest, rest_weight = x[:, keep], weight[:, keep]
    # The scale sees all columns, the ones that stay in 16 bit as well.
    weight_scales = (weight.abs().amax(1).float() / 7).half()
    weight_codes = _half_quotient(rest_weight, weight_scales).clamp(-8, 7).to(torch.int8)
    sums = rest_weight.float().sum(1).half()
    zeros = rest.amin(1)
    spread = (rest.amax(1).float() - zeros.float()) / 15
    scales = spread.clamp_min(1e-6).half()
    codes = (_half_quotient(rest - zeros[:, None], scales) - 8).to(torch.int8)
    integer = (codes.double() @ weight_codes.double().T).float() * (
        scales.float()[:, None] * weight_scales.float()
    )
    shift = (8 * scales + zeros).float()[:, None] * sums.float()
    outliers = (x[:, columns].double() @ weight[:, columns].double().T).half().float()
    out = (integer + shift + outliers).half()
    return Quik(out, codes, scales, zeros, weight_codes, weight_scales, sums)


def _half_quotient(x: Tensor, scales: Tensor) -> Tensor:
    return (x.float() / scales.float()[:, None]).half().float().round()


def eetq(weight: Tensor) -> tuple[Tensor, Tensor]:
    """EETQ's weight-only int8: codes [N, K] and scales fp16 [N] = max|row| / 128 of an fp16 weight."""
    scales = weight.abs().amax(1).float() / 128
    return (weight.float() / scales[:, None]).round().clamp(-128, 127).to(torch.int8), scales.half()


def eetq_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """W8A16: fp16 [M, N] = half(x @ (codes * scales)^T) for x fp16 [M, K]."""
    exact = x.double() @ (codes.double() * scales.double()[:, None]).T
    # By numpy: torch rounds float64 to fp32 on its way, which makes ties of what are none.
    return torch.from_numpy(exact.numpy().astype(np.float16))


def int4_gemv_weight(weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The decode copy: codes uint8 [N, K] (8 stands for 0) and scales fp16 [N], 0 in `columns`.

    Args:
        weight: fp16 [N, K].
        columns: int64 [S], the columns that stay in 16 bit.

    """
    rest = weight.clone()
    rest[:, columns] = 0
    scales = (rest.abs().amax(1).float() * 2 / 15).half()
    return (_half_quotient(rest, scales) + 8).clamp(0, 15).to(torch.uint8), scales


def int4_gemv_words(codes: Tensor) -> Tensor:
    """Pack codes [N, K] as int32 [N, K / 8], nibble i of a word holding column GEMV_ORDER[i] of its octet."""
    octets = codes.view(len(codes), -1, 8)[..., GEMV_ORDER].long()
    words = (octets << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def int4_gemv(x: Tensor, codes: Tensor, scales: Tensor, columns: Tensor, kept: Tensor) -> Tensor:
    """Return x @ W^T in float64 [M, N] from `int4_gemv_weight` and the 16-bit columns `kept` [N, S]."""
    rest = x.double().clone()
    rest[:, columns] = 0
    dequantized = (codes.double() - 8) * scales.double()[:, None]
    return rest @ dequantized.T + x[:, columns].double() @ kept.double().T
