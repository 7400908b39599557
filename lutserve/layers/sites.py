"""A nonlinear site of a model: which table it uses, found when the model is complete.

A layer that may use a table holds a `TableSite`. vLLM calls `process_weights_after_loading` of every
module that has a `quant_method`; then the site knows its name, asks the recipe, and gives its layer the
table. A layer whose site is exact is left as vLLM built it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lutserve import luts
from lutserve.compat import QuantizeMethodBase, current_recipe
from lutserve.kernels import library
from lutserve.layers import names, saturation
from lutserve.recipe import Site


@dataclass(frozen=True)
class SiteReport:
    """What one site of the model in this process uses."""

    site: Site
    #: the module, e.g. ``model.layers.0.mlp.act_fn``
    module: str
    function: str
    spec: str
    #: `luts.table_id` of the table
    table: str


#: module and site -> what it uses; exact sites are absent
REPORTS: dict[tuple[str, str], SiteReport] = {}


def wanted(site: Site) -> bool:
    """Whether the recipe of the model being built may give the site a table in some layer."""
    recipe = current_recipe()
    return recipe is not None and recipe.may_use(site)


class TableSite(nn.Module):
    """One use of a table by one layer; a submodule of that layer, without parameters.

    Attributes:
        table: [65536] of `dtype`, there once the site is resolved and not exact.
        counter: saturations, there if they are counted at this site.

    """

    table: torch.Tensor
    counter: saturation.Counter | None

    def __init__(
        self,
        site: Site,
        function: str,
        use: Callable[[], None],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Prepare a site of the model being built.

        Args:
            site: its name in a recipe.
            function: key of `luts.FUNCTIONS`.
            use: called once the table is there.
            dtype: of the table; default the model's, which is torch's default while vLLM builds it.

        """
        super().__init__()
        self.site, self.function, self.use = site, function, use
        self.dtype = dtype or torch.get_default_dtype()
        # While vLLM builds a model torch's default device is the model's.
        self.device = torch.get_default_device()
        self.recipe = current_recipe()
        self.module = ""
        self.counter = None
        self.quant_method = _Resolve()

    def resolve(self, module: str = "") -> bool:
        """Look up and attach the table; whether there is one. vLLM's name of the layer may be given."""
        self.module = self.module or module or names.name_of(self).rpartition(".")[0]
        spec = "exact"
        if self.recipe is not None:
            spec = self.recipe.lut_for(self.site, names.layer_of(self.module), self.module)
        if spec == "exact":
            return False
        if not hasattr(self, "table"):
            self._attach(spec)
        self.use()
        return True

    def _attach(self, spec: str) -> None:
        library.load()
        table = luts.lut_table(self.function, spec, self.dtype).to(self.device)
        self.register_buffer("table", table, persistent=False)
        identity = luts.table_id(self.function, spec, self.dtype)
        REPORTS[self.module, self.site] = SiteReport(self.site, self.module, self.function, spec, identity)
        if self.recipe and self.recipe.count_saturations:
            self.counter = saturation.counter(self.module, self.site, self.function, spec)
            if self.counter is not None:
                self.counter.to(self.device)


class _Resolve(QuantizeMethodBase):
    """What vLLM calls once the weights are loaded."""

    requires_device_loading = False
    supports_pre_processed_weights = True

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        """Nothing: a site has no weights."""

    def apply(self, layer: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        """Not used: the layer calls its operator itself."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Let the site find its table."""
        layer.resolve()  # type: ignore[operator]
