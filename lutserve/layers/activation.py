"""Gated activations as one gather and one product: `table[bits(gate)] * up` (NLI, arXiv 2602.02988)."""

from __future__ import annotations

import torch

from lutserve import luts
from lutserve.compat import CustomOp, GeluAndMul, SiluAndMul, current_recipe, op_registry_oot
from lutserve.kernels import activation, library
from lutserve.recipe import Site

#: site -> id of the table in use, for the worker's report
TABLES: dict[str, str] = {}


def site_table(site: Site, function: str) -> torch.Tensor | None:
    """Return the table [65536] that the current recipe gives a site, or None where it is exact."""
    recipe = current_recipe()
    spec = recipe.lut_for(site) if recipe else "exact"
    if spec == "exact":
        return None
    # vLLM sets the default dtype to the model's while it builds the layers.
    dtype = torch.get_default_dtype()
    library.load()
    TABLES[site] = luts.table_id(function, spec, dtype)
    return luts.lut_table(function, spec, dtype)


class LutSiluAndMul(SiluAndMul):
    """silu(gate) * up; gate and up are the halves of x [..., 2d] in fp16 or bf16, the result is [..., d]."""

    def __init__(self, *, compile_native: bool = True) -> None:
        # Before super().__init__, which chooses and may compile the forward method.
        table = site_table("silu", "silu")
        super().__init__(compile_native=compile_native and table is None)
        if table is not None:
            self._forward_method = self.forward_table
            self.register_buffer("lut", table, persistent=False)

    def forward_table(self, x: torch.Tensor) -> torch.Tensor:
        """Gather and multiply."""
        out: torch.Tensor = activation.act_and_mul(x, self.lut)
        return out


class LutGeluAndMul(GeluAndMul):
    """gelu(gate) * up, erf or tanh form as the model has it; shapes as `LutSiluAndMul`."""

    def __init__(self, approximate: str = "none") -> None:
        table = site_table("gelu", "gelu_tanh" if approximate == "tanh" else "gelu")
        super().__init__(approximate=approximate)
        if table is not None:
            self._forward_method = self.forward_table
            self.register_buffer("lut", table, persistent=False)

    forward_table = LutSiluAndMul.forward_table


def register() -> None:
    """Let vLLM build our classes wherever it would build its own; idempotent."""
    for name, cls in (("SiluAndMul", LutSiluAndMul), ("GeluAndMul", LutGeluAndMul)):
        if name not in op_registry_oot:
            CustomOp.register_oot(cls, name=name)
