"""What a search may change in a transformers model: linear layers, activations, norms and softmaxes.

An operator stands in a module's place. It computes exactly, or by the replacement that it is given; while
gradients are taken it shows them, with its inputs, to whoever observes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lutserve import luts
from lutserve.search.arithmetic import Product

#: inputs -> output
Function = Callable[..., Tensor]
#: class of an activation in transformers -> the function whose table it reads
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


class Operator:
    """Something whose output can be computed in several ways.

    exact: computes the model's own output. replacement: what computes instead, if anything does. observe:
    told the gradient of the output and the inputs, if anybody wants to know.
    """

    def __init__(self, exact: Function) -> None:
        self.exact = exact
        self.replacement: Function | None = None
        self.observe: Callable[[Tensor, tuple[Tensor, ...]], None] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output as it is to be now."""
        output = (self.replacement or self.exact)(*inputs)
        if self.observe and torch.is_grad_enabled():
            output = _Observed.apply(output, self.observe, *inputs)  # type: ignore[no-untyped-call]
        return output


class _Observed(torch.autograd.Function):
    """The identity, whose backward pass shows the gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, observe: Callable[..., None], *inputs: Tensor) -> Tensor:
        # Saved, and not held, so that checkpointing lets them go until they are needed.
        ctx.save_for_backward(*inputs)
        ctx.observe = observe
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs = ctx.saved_tensors  # read once: checkpointing gives each tensor a single time
        with torch.no_grad():
            ctx.observe(gradient, inputs)
        return gradient, None, *(None for _ in inputs)


class Linear(Operator):
    """A linear layer, in fp32 whatever its weight is; GPT-2 keeps weights the other way round."""

    def __init__(self, module: Any) -> None:
        super().__init__(self._exact)
        self.turned = type(module).__name__ == "Conv1D"
        self.parameter: Tensor = module.weight
        self.bias: Tensor | None = module.bias
        module.forward = self

    @property
    def weight(self) -> Tensor:
        """[N out, K in], as it is stored."""
        return self.parameter.T if self.turned else self.parameter

    def _exact(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.float(), self.bias)

    def by(self, product: Product) -> Function:
        """The layer with another product."""

        def multiply(x: Tensor) -> Tensor:
            out = product(x.flatten(0, -2)).view(*x.shape[:-1], -1)
            return out if self.bias is None else out + self.bias

        return multiply


class Activation(Operator):
    """A nonlinear function by itself."""

    def __init__(self, module: Any) -> None:
        super().__init__(module.forward)
        self.function = ACTIVATIONS[type(module).__name__]
        module.forward = self

    def tabled(self, spec: str) -> Function:
        """The function by a table."""
        return partial(gather, self.function, spec)


class Norm(Operator):
    """RMSNorm or LayerNorm with all that belongs to it."""

    def __init__(self, module: Any) -> None:
        super().__init__(module.forward)
        self.module = module
        self.centred = type(module).__name__ == "LayerNorm"
        self.eps: float = next(
            getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)
        )
        module.forward = self

    def tabled(self, spec: str) -> Function:
        """The norm with its 1 / sqrt(v) by a table of [1, 4), times a power of two."""

        def normalise(x: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True) if self.centred else x
            v = centred.square().mean(-1, keepdim=True) + self.eps
            exponent = (torch.frexp(v).exponent - 1).div(2, rounding_mode="floor")
            root = gather("rsqrt", spec, torch.ldexp(v, -2 * exponent))
            ratio = torch.ldexp(root, -exponent) * v.sqrt()
            bias = self.module.bias if self.centred else 0.0
            return (self.exact(x) - bias) * ratio + bias

        return normalise


class Softmax(Operator):
    """Attention: softmax(q k^T * scale + mask) v. Inputs q [B, H, L, D], k, v [B, H or fewer, L, D], mask."""

    def __init__(self, module: Any) -> None:
        super().__init__(self._exact)
        self.scale = 1.0
        module.lutserve_softmax = self

    def _exact(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self._scores(q, k, mask).softmax(-1) @ self._shared(q, v)

    def tabled(self, spec: str) -> Function:
        """Attention whose exponentials come from a table, and are summed in fp32."""

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            scores = self._scores(q, k, mask)
            exponentials = gather("softmax_exp", spec, scores - scores.amax(-1, keepdim=True))
            return exponentials / exponentials.sum(-1, keepdim=True) @ self._shared(q, v)

        return attend

    def _scores(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return q @ self._shared(q, k).transpose(-1, -2) * self.scale + mask

    @staticmethod
    def _shared(q: Tensor, heads: Tensor) -> Tensor:
        """Keys or values for every head of the queries."""
        return heads.repeat_interleave(q.shape[1] // heads.shape[1], 1)


def gather(function: str, spec: str, x: Tensor) -> Tensor:
    """A function by its fp16 table; x is rounded to fp16 first. fp32 in, fp32 out."""
    table = luts.lut_table(function, spec, torch.float16)
    return table[x.half().view(torch.int16).long() % 65536].float()


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention for transformers' AttentionInterface, by the module's Softmax."""
    softmax: Softmax = module.lutserve_softmax
    softmax.scale = scaling
    return softmax(query, key, value, mask).transpose(1, 2).contiguous(), None
