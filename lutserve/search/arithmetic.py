"""x W^T as a method computes it, on the weight and the activations of a simulated model.

What counts is the error that the method makes by design: the rounding of weights and activations, outlier
columns, approximate products. Sums are in fp32, and what is served rounds to 16 bit beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lutserve import formats
from lutserve.formats import Codebook
from lutserve.kernels import mixq
from lutserve.kernels.axcore_reference import axcore_linear
from lutserve.kernels.mixq_reference import SIGMA
from lutserve.kernels.reference import quantize_rows
from lutserve.luts import fpma
from lutserve.methods import Method
from lutserve.quantizers import quantize_activations, rtn
from lutserve.quantizers.axcore import axcore
from lutserve.quantizers.outliers import THRESHOLD, OutlierSlots
from lutserve.quantizers.weight import decode
from lutserve.recipe import Group

#: fp32 [M, K] -> fp32 [M, N]
Product = Callable[[Tensor], Tensor]
#: the methods of MixQ's family that are simulated
MIXQ = ("int8", "llm-int8", "mix8", "mix4")
#: AxCore's methods that are simulated, and the compensation of each
AXCORE: dict[str, fpma.Compensation] = {"axcore": True, "axcore-plus": "class"}


def simulated(method: Method) -> bool:
    """Whether there is a product of this method here."""
    return method.family == "codebook" or method.name in ("none", *MIXQ, *AXCORE)


def rounds_weights_only(method: Method) -> bool:
    """Whether the method is 16-bit activations times a rounded weight."""
    return method.name == "none" or (method.family == "codebook" and method.activations == 16)


def grouped(method: Method) -> bool:
    """Whether its weights have a scale for a group of columns."""
    return bool(method.format) or method.family == "axcore"


def rounded(weight: Tensor, group: Group) -> Tensor:
    """The weight [N, K] as the method holds it, fp32; for `rounds_weights_only`."""
    if group.method == "none":
        return weight.float()
    return rtn(weight, group.codebook, group.group_size).dequantize()


def product(weight: Tensor, group: Group) -> Product:
    """Prepare a weight [N, K], any floating dtype, for the method of a recipe's group.

    UserError where the weight does not fit the method.
    """
    method = group.arithmetic
    if rounds_weights_only(method):
        return _times(rounded(weight, group))
    if method.family == "axcore":
        return _axcore(weight, group)
    if method.family == "mixq":
        return _mixq(weight, group)
    book, size = group.codebook, group.group_size
    if method.activations == 4:
        times = _times(rounded(weight, group))
        return lambda x: times(quantize_activations(x, book, size))
    times = _times(_image(weight, book, size))
    return lambda x: times(_int8(x, size))


def _times(weight: Tensor) -> Product:
    return lambda x: x @ weight.T


def _image(weight: Tensor, book: Codebook, group_size: int) -> Tensor:
    """The weight with its codebook's values as the int8 GEMM has them."""
    quantized, image = rtn(weight, book, group_size), book.int8_table()
    table = Codebook(book.name, tuple(image.scale * value for value in image.values[: len(book.values)]))
    groups = quantized.scales.index_select(1, quantized.groups)
    return decode(quantized.codes, groups, None, table)


def _int8(x: Tensor, group_size: int) -> Tensor:
    """Activations [M, K] rounded to int8 by row and group of columns, and back."""
    k = x.shape[1]
    parts = []
    for part in x.split(k if group_size == -1 else group_size, 1):
        codes, scales = quantize_rows(part)
        parts.append(codes.float() * scales[:, None])
    return torch.cat(parts, 1)


def _mixq(weight: Tensor, group: Group) -> Product:
    """Integers but for the outlier columns, which are learnt from the calls as they are while serving."""
    method, size = group.arithmetic, group.group_size
    if method.format:
        times = _times(_image(weight, formats.get(method.format), size))
    else:
        size = -1
        codes, scales = quantize_rows(weight)
        times = _times(codes.float() * scales[:, None])
    exact = weight.bfloat16()
    slots = OutlierSlots(weight.shape[1], lambda columns: exact[:, columns].t())

    def multiply(x: Tensor) -> Tensor:
        x = x.bfloat16()
        if method.name == "llm-int8":
            slots.hold((x.abs() > SIGMA).any(0).nonzero()[:, 0])
        elif method.outliers:
            prepared = mixq.prepare(x, slots.index, slots.keep)
            if prepared[-1].item() > THRESHOLD and slots.wants():
                slots.learn(x, prepared, lambda: mixq.prepare(x, slots.index, slots.keep))
        rest = _int8(x.float().index_fill(1, slots.columns, 0), size)
        held = slots.index[slots.index >= 0].long()
        return times(rest) + x[:, held].float() @ exact[:, held].float().T

    return multiply


def _axcore(weight: Tensor, group: Group) -> Product:
    size = weight.shape[1] if group.group_size == -1 else group.group_size
    compensation = AXCORE[group.method]
    blocks = axcore(weight, size, compensation=compensation)
    limit = torch.finfo(torch.float16).max

    def multiply(x: Tensor) -> Tensor:
        parts = blocks.codes, blocks.scales, blocks.types, size
        half = x.clamp(-limit, limit).half()
        return axcore_linear(half, *parts, numerics="fast", compensation=compensation).float()

    return multiply
