"""The folder that `lutserve quantize` writes: names, packing, configuration, and how to read it back.

Of a quantised layer X the folder holds X.weight_packed uint8 [N, ceil(K / 2)] (byte j is the code of column
2j, plus 16 times that of column 2j + 1), X.weight_scale fp32 [N, ceil(K / g)] and X.weight_codebook fp32
[16]; a weight is weight_codebook[code] * weight_scale. A layer of AxCore has scales in fp16, and instead of a
codebook X.weight_type uint8 [ceil(N / 64), K / g], the 4-bit float of each block (`luts.fpma.FP4`); a code is
then 8 for the sign and the index of a magnitude. All else is as the original model has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutserve.errors import UserError
from lutserve.formats import Codebook
from lutserve.quantizers.fp4 import Fp4Weight
from lutserve.quantizers.weight import QuantizedWeight
from lutserve.recipe import read_json

PACKED, SCALE, CODEBOOK, TYPE = "weight_packed", "weight_scale", "weight_codebook", "weight_type"
#: how the folder was made, and for each layer its columns and measured errors
REPORT = "quantization_report.json"


@dataclass(frozen=True)
class LayerFacts:
    """One quantised layer of a folder: N out, K in, size, and its errors in dB where they were measured."""

    name: str
    shape: tuple[int, int]
    bytes: int
    weight_sqnr: float | None
    output_sqnr: float | None

    @property
    def bits(self) -> float:
        """Bits a weight, scales and codebook included."""
        return 8 * self.bytes / (self.shape[0] * self.shape[1])


def pack(codes: Tensor, zero: int) -> Tensor:
    """Pack codes uint8 [N, K] below 16 two to a byte, [N, ceil(K / 2)]; `zero` fills an odd last column."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=zero)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor, k: int) -> Tensor:
    """The inverse: codes uint8 [N, k]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :k].contiguous()


def layer_tensors(name: str, weight: QuantizedWeight | Fp4Weight) -> dict[str, Tensor]:
    """The three tensors that stand for a layer's weight.

    UserError for what the form cannot hold: zero points, and groups in another order than the columns.
    """
    if isinstance(weight, Fp4Weight):
        tensors = {PACKED: pack(weight.codes, 0), SCALE: weight.scales, TYPE: weight.types}
        return {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    if weight.zero_points is not None or weight.permutation is not None:
        what = "zero points" if weight.zero_points is not None else "permuted groups"
        raise UserError(f"{name} has {what}, which the checkpoint cannot hold; use scheme sym, static groups")
    return {
        f"{name}.{PACKED}": pack(weight.codes, weight.codebook.zero),
        f"{name}.{SCALE}": weight.scales,
        f"{name}.{CODEBOOK}": torch.tensor(weight.codebook.table, dtype=torch.float32),
    }


class StoredModel:
    """A Hugging Face folder, read tensor by tensor; UserError if it cannot be read."""

    #: names of the quantised layers, in the order of the model
    layers: list[str]

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.config = read_json(folder / "config.json")
        self._files: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                handle: Any = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"cannot read {file}: {error}") from None
            self._files |= dict.fromkeys(handle.keys(), handle)

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        value: Tensor = self._files[name].get_tensor(name)
        return value

    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(self.tensor(name).nbytes for name in self._files)

    def layers_with(self, part: str) -> list[str]:
        """The layers that have a tensor called `part`, in the order of the model."""
        found = (name.removesuffix(f".{part}") for name in self._files if name.endswith(f".{part}"))
        return sorted(found, key=_natural)


class Checkpoint(StoredModel):
    """A quantised folder; UserError if it is none."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.recipe = self.config.get("quantization_config") or {}
        if self.recipe.get("quant_method") != "lutserve":
            raise UserError(f"{folder} is not a model that lutserve quantised")
        self.layers = self.layers_with(PACKED)
        if not self.layers:
            raise UserError(f"{folder} holds no {PACKED}; it is quantised when it is loaded, not before")
        report = folder / REPORT
        self.report = read_json(report) if report.is_file() else {"settings": {}, "layers": {}}

    def layer(self, name: str) -> QuantizedWeight | Fp4Weight:
        """The quantised weight of a layer."""
        scales = self.tensor(f"{name}.{SCALE}")
        if f"{name}.{TYPE}" in self._files:
            packed = self.tensor(f"{name}.{PACKED}")
            k, group = self._columns(name, packed.shape[1], scales.shape[1])
            return Fp4Weight(unpack(packed, k), scales, self.tensor(f"{name}.{TYPE}"), group)
        values = [float(v) for v in self.tensor(f"{name}.{CODEBOOK}")]
        # A repeated last value is padding.
        codebook = Codebook(str(self._made(name)["method"]), tuple(dict.fromkeys(values)))
        packed = self.tensor(f"{name}.{PACKED}")
        k, group = self._columns(name, packed.shape[1], scales.shape[1])
        return QuantizedWeight(unpack(packed, k), scales, codebook, group)

    def weight(self, name: str) -> Tensor:
        """The weight of a layer as it is served, fp32 [N, K]."""
        return self.layer(name).dequantize()

    def dequantized(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors under the original model's names, quantised weights as fp32 [N, K]."""
        for name in self.layers:
            yield f"{name}.weight", self.weight(name)
        for name in self._files:
            if not name.endswith((PACKED, SCALE, CODEBOOK, TYPE)):
                yield name, self.tensor(name)

    def facts(self) -> list[LayerFacts]:
        """Size and error of each quantised layer, in the order of the model."""
        found = []
        for name in self.layers:
            last = TYPE if f"{name}.{TYPE}" in self._files else CODEBOOK
            parts = [self.tensor(f"{name}.{part}") for part in (PACKED, SCALE, last)]
            k, _ = self._columns(name, parts[0].shape[1], parts[1].shape[1])
            errors = self.report["layers"].get(name, {})
            found.append(
                LayerFacts(
                    name=name,
                    shape=(parts[0].shape[0], k),
                    bytes=sum(part.nbytes for part in parts),
                    weight_sqnr=errors.get("weight_sqnr_db"),
                    output_sqnr=errors.get("output_sqnr_db"),
                )
            )
        return found

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        algo, group = self.report["settings"].get("algo", "unknown"), self.group
        if self.report["settings"].get("layers"):
            kinds = sorted({str(self._made(name)["method"]) for name in self.layers})
            return f"{', '.join(kinds)} by {algo}, as a recipe says"
        return f"{group['method']} by {algo}, groups of {group['group_size']}"

    @property
    def folded(self) -> bool:
        """Whether weights differ from the original's by factors of rows and columns."""
        made = self.report["settings"]
        return made.get("algo") in ("awq", "smoothquant") or made.get("alpha") is not None

    @property
    def group(self) -> dict[str, Any]:
        """The recipe's group of the quantised layers: method, group_size, algo."""
        groups = self.recipe.get("config_groups") or {"": {}}
        return dict(next(iter(groups.values())))

    def _columns(self, name: str, packed: int, groups: int) -> tuple[int, int]:
        """Columns and group size of a layer from its packed columns and its groups."""
        # Packing hides whether the last of 2 * packed columns exists; the report knows.
        k = int(self.report["layers"].get(name, {}).get("columns", 2 * packed))
        return k, k if groups == 1 else int(self._made(name)["group_size"])

    def _made(self, name: str) -> dict[str, Any]:
        """Method and group size of a layer."""
        made: dict[str, Any] = self.report["layers"].get(name, {})
        return self.group | made


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in name.split(".")]
