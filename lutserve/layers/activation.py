"""Activations as one gather, gated ones with one product: `table[bits(x)]` and `table[bits(gate)] * up`.

Each class is vLLM's own until its site finds a table (`layers.sites`); an exact site stays vLLM's, bit for
bit. ReLU needs no table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lutserve.compat import (
    GELU,
    CustomOp,
    FastGELU,
    GeluAndMul,
    GELUTanh,
    NewGELU,
    QuickGELU,
    RoutedExperts,
    SiluAndMul,
    init_logger,
    op_registry_oot,
)
from lutserve.kernels import activation
from lutserve.layers import moe, names
from lutserve.layers.sites import TableSite, wanted
from lutserve.recipe import Site

logger = init_logger("vllm.lutserve")

#: activations of vLLM that compute silu or gelu in a form of their own, for which there is no operator
UNSERVED = frozenset(
    {
        *("GeluAndMulSparse", "MulAndSilu", "RMSNormGated", "SiluAndMulWithClamp", "SituAndMul"),
        *("SwigluOAIAndMul", "SwigluStepAndMul", "XIELU"),
    }
)


#: Linear layers that quantise their input, by name: (x, table) -> `act_and_mul` of them, of which the layer
#: keeps what it will want of it. `quant_methods` fill this in.
READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}


class _Tabled(CustomOp):
    """Mixin of an activation that has a site."""

    gated = False
    #: the linear layer beside this one that reads a gated activation
    reader = ""

    def _place(self, site: Site, function: str) -> None:
        if wanted(site):
            # A model is being built: what the last one's layers read is no more.
            READERS.clear()
            self.table_site = TableSite(site, function, self._use_table)

    def _use_table(self) -> None:
        if self.gated:
            self.reader = names.name_of(self).rpartition(".")[0] + ".down_proj"
        self._forward_method = self.forward_counted if self.table_site.counter else self.forward_table

    def forward_table(self, x: torch.Tensor) -> torch.Tensor:
        """Gather, and multiply where the activation is gated; together with its reader's quantisation."""
        # A compiled graph has no place for what the reader keeps.
        if x.dim() == 2 and self.reader in READERS and not torch.compiler.is_compiling():
            return READERS[self.reader](x, self.table_site.table)
        op = activation.act_and_mul if self.gated else activation.unary
        out: torch.Tensor = op(x, self.table_site.table)
        return out

    def forward_counted(self, x: torch.Tensor) -> torch.Tensor:
        """`forward_table` that also counts the inputs outside the table's range."""
        assert self.table_site.counter is not None
        self.table_site.counter(x[..., : x.shape[-1] // 2] if self.gated else x)
        return self.forward_table(x)

    def fresh(self) -> nn.Module:
        """Return a new module like this one."""
        return type(self)()


class LutSiluAndMul(_Tabled, SiluAndMul):
    """silu(gate) * up; gate and up are the halves of x [..., 2d] in fp16 or bf16, the result is [..., d]."""

    gated = True

    def __init__(self, *, compile_native: bool = True) -> None:
        super().__init__(compile_native=compile_native)
        self._place("silu", "silu")


class LutGeluAndMul(_Tabled, GeluAndMul):
    """gelu(gate) * up, erf or tanh form as the model has it; shapes as `LutSiluAndMul`."""

    gated = True

    def __init__(self, approximate: str = "none") -> None:
        super().__init__(approximate=approximate)
        self._place("gelu", "gelu_tanh" if approximate == "tanh" else "gelu")

    def fresh(self) -> nn.Module:
        """Return a new module of the same form."""
        return type(self)(self.approximate)


class LutGELU(_Tabled, GELU):
    """The erf GELU of x [...]."""

    def __init__(self) -> None:
        super().__init__()
        self._place("gelu", "gelu")


class _GeluTanh(_Tabled):
    """The three spellings of the tanh GELU."""

    def __init__(self) -> None:
        super().__init__()
        self._place("gelu", "gelu_tanh")


class LutGELUTanh(_GeluTanh, GELUTanh):
    """The tanh GELU as `gelu_pytorch_tanh`."""


class LutNewGELU(_GeluTanh, NewGELU):
    """The tanh GELU as `gelu_new` (GPT-2)."""


class LutFastGELU(_GeluTanh, FastGELU):
    """The tanh GELU as `gelu_fast`."""


class LutQuickGELU(_Tabled, QuickGELU):
    """x * sigmoid(1.702 x)."""

    def __init__(self) -> None:
        super().__init__()
        self._place("gelu", "swish")


class LutModule(_Tabled):
    """One of torch's own activations, which vLLM uses for some names, with a site."""

    name = "LutModule"

    def __init__(self, module: nn.Module, site: Site, function: str) -> None:
        super().__init__()
        self.arguments = (site, function)
        # In a tuple, because a submodule of torch's class would be replaced in its turn.
        self.exact = (module,)
        self._place(site, function)

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        """What torch's module computes."""
        out: torch.Tensor = self.exact[0](x)
        return out

    def fresh(self) -> nn.Module:
        """Return a new module around the same one of torch."""
        return type(self)(self.exact[0], *self.arguments)


def _replace(module: nn.Module) -> nn.Module | None:
    """Replace what must not stay as it is: torch's own activations, and modules that layers share."""
    if isinstance(module, _Tabled):
        # vLLM keeps activations by name and hands the same one to every layer, and to the next model.
        return module.fresh() if names.is_held(module) else None
    if type(module) is nn.GELU and wanted("gelu"):
        return LutModule(module, "gelu", "gelu_tanh" if module.approximate == "tanh" else "gelu")
    if type(module) is nn.SiLU and wanted("silu"):
        return LutModule(module, "silu", "silu")
    if isinstance(module, RoutedExperts):
        moe.check(module)
    elif type(module).__name__ in UNSERVED and (wanted("silu") or wanted("gelu")):
        logger.warning_once("lutserve has no table for %s, which stays exact", type(module).__name__)
    return None


def register() -> None:
    """Let vLLM build our classes wherever it would build its own; idempotent."""
    ours: dict[str, Any] = {
        "SiluAndMul": LutSiluAndMul,
        "GeluAndMul": LutGeluAndMul,
        "GELU": LutGELU,
        "GELUTanh": LutGELUTanh,
        "NewGELU": LutNewGELU,
        "FastGELU": LutFastGELU,
        "QuickGELU": LutQuickGELU,
        "UnquantizedFusedMoEMethod": moe.LutFusedMoEMethod,
    }
    for name, cls in ours.items():
        if name not in op_registry_oot:
            CustomOp.register_oot(cls, name=name)
    names.replace_with(_replace)
