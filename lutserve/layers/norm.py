"""RMSNorm, Gemma's RMSNorm and LayerNorm with `1 / sqrt` by a table (`kernels.norm`).

Each class is vLLM's own until its site finds a table; an exact site stays vLLM's, bit for bit. The table
is of float16 whatever the model's dtype, because the mean square it is asked about is fp32.
"""

from __future__ import annotations

import torch
from torch import nn

from lutserve.compat import CustomOp, GemmaRMSNorm, LayerNorm, RMSNorm, op_registry_oot
from lutserve.errors import UserError
from lutserve.kernels import norm
from lutserve.layers import names
from lutserve.layers.sites import TableSite, wanted

Normed = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class _Tabled(CustomOp):
    """Mixin of a norm that has a site."""

    def _place(self) -> None:
        if wanted("rsqrt"):
            self.table_site = TableSite("rsqrt", "rsqrt", self._use_table, torch.float16)

    def _use_table(self) -> None:
        self._forward_method = self.forward_table

    def _rms(self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None) -> Normed:
        table, eps = self.table_site.table, self.variance_epsilon
        if residual is None:
            out: torch.Tensor = norm.rms_norm(x, weight, table, eps)
            return out
        y, total = norm.add_rms_norm(x, residual, weight, table, eps)
        return y, total


class LutRMSNorm(_Tabled, RMSNorm):
    """x / rms(x) * weight for x [..., hidden]; with a residual also x + residual, which is what it norms."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        var_hidden_size: int | None = None,
        has_weight: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, var_hidden_size, has_weight, dtype)
        self._place()

    def _use_table(self) -> None:
        if self.variance_size_override is not None:
            raise UserError("this model's RMSNorm averages over a part of its row; use --lut exact for rsqrt")
        super()._use_table()

    def forward_table(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
        """Norm by the table, with vLLM's roundings."""
        return self._rms(x, residual, self.weight.data if self.has_weight else None)


class LutGemmaRMSNorm(_Tabled, GemmaRMSNorm):
    """x / rms(x) * (1 + weight), rounded once; shapes as `LutRMSNorm`."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps)
        self._place()

    def _use_table(self) -> None:
        super()._use_table()
        self.register_buffer("gain", self.weight.data.float() + 1.0, persistent=False)

    def forward_table(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
        """Norm by the table, with vLLM's roundings."""
        return self._rms(x, residual, self.gain)


class LutLayerNorm(_Tabled, LayerNorm):
    """(x - mean) / std * weight + bias for x [..., hidden]."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, elementwise_affine, bias, dtype)
        self._place()

    def forward_table(self, x: torch.Tensor) -> torch.Tensor:
        """Norm by the table; one rounding, at the end."""
        weight = None if self.weight is None else self.weight.data
        bias = None if self.bias is None else self.bias.data
        out: torch.Tensor = norm.layer_norm(x, weight, bias, self.table_site.table, self.eps)
        return out


def _replace(module: nn.Module) -> nn.Module | None:
    """Replace torch's own LayerNorm, which some models of vLLM use."""
    if type(module) is not nn.LayerNorm or not wanted("rsqrt") or len(module.normalized_shape) != 1:
        return None
    affine = module.weight is not None
    dtype = module.weight.dtype if affine else None
    ours: nn.Module = LayerNorm(
        module.normalized_shape[0], module.eps, affine, module.bias is not None, dtype
    )
    return ours


def register() -> None:
    """Let vLLM build our classes wherever it would build its own; idempotent."""
    ours = {"RMSNorm": LutRMSNorm, "GemmaRMSNorm": LutGemmaRMSNorm, "LayerNorm": LutLayerNorm}
    for name, cls in ours.items():
        if name not in op_registry_oot:
            CustomOp.register_oot(cls, name=name)
    names.replace_with(_replace)
