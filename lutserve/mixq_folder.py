"""A folder in MixQ's layout (`mixq_layout`), looked into without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutserve.checkpoint import REPORT, LayerFacts, StoredModel, unpack
from lutserve.mixq_layout import KEPT, PLACES, SCALE, stored
from lutserve.quantizers.integers import IntegerWeight
from lutserve.recipe import read_json


class MixqFolder(StoredModel):
    """The quantised layers of a folder; UserError where one is not in the layout."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.layers = self.layers_with(SCALE)
        report = folder / REPORT
        self.report: dict[str, Any] = (
            read_json(report) if report.is_file() else {"settings": {}, "layers": {}}
        )

    def layer(self, name: str) -> IntegerWeight:
        """The integers, scales and outlier columns of a layer."""
        layout = stored(self.folder, name)
        codes = self.tensor(f"{name}.{layout.codes}")
        if layout.bits == 4:
            codes = (unpack(codes, 2 * codes.shape[1]) ^ 8).to(torch.int8) - 8
        scales = self.tensor(f"{name}.{SCALE}")[0].float()
        columns, kept = torch.empty(0, dtype=torch.int64), torch.empty(len(codes), 0)
        if layout.columns:
            columns, order = self.tensor(f"{name}.{PLACES}").long().sort()
            kept = self.tensor(f"{name}.{KEPT}")[:, order].float()
        return IntegerWeight(codes, scales, layout.bits, columns, kept)

    def weight(self, name: str) -> Tensor:
        """The weight that a layer stands for, fp32 [N, K]."""
        return self.layer(name).dequantize()

    def facts(self) -> list[LayerFacts]:
        """Size of each quantised layer, and its errors where measured, in the order of the model."""
        found = []
        for name in self.layers:
            layout, errors = stored(self.folder, name), self.report["layers"].get(name, {})
            parts = [layout.codes, SCALE, *((KEPT, PLACES) if layout.columns else ())]
            codes = self.tensor(f"{name}.{layout.codes}")
            found.append(
                LayerFacts(
                    name=name,
                    shape=(codes.shape[0], codes.shape[1] * (8 // layout.bits)),
                    bytes=sum(self.tensor(f"{name}.{part}").nbytes for part in parts),
                    weight_sqnr=errors.get("weight_sqnr_db"),
                    output_sqnr=errors.get("output_sqnr_db"),
                )
            )
        return found

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        made = self.report["settings"]
        return f"{made['method']} by {made['algo']}" if made else "MixQ's own checkpoint"

    @property
    def folded(self) -> bool:
        """Whether weights differ from the original's by factors of rows and columns."""
        made = self.report["settings"]
        return made.get("algo") == "smoothquant" or made.get("alpha") is not None
