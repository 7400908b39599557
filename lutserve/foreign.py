"""4-bit folders that other tools made, read for comparison: compressed-tensors, AWQ and GPTQ.

vLLM serves them without our help. Integers are packed as their authors' format says, eight to an int32,
lowest bits first, and a weight is (code - zero point) * scale of its group:

    compressed-tensors (pack-quantized)  weight_packed [N, K / 8], weight_scale [N, G], weight_zero_point
                                         [N / 8, G] (without it 8), weight_g_idx [K]
    GPTQ                                 qweight [K / 8, N], scales [G, N], qzeros [G, N / 8] (one less, but
                                         in its version 2), g_idx [K]
    AWQ (gemm)                           qweight [K, N / 8], scales [G, N], qzeros [G, N / 8], the columns of
                                         a word in the order 0 2 4 6 1 3 5 7
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutserve.checkpoint import PACKED, LayerFacts, StoredModel
from lutserve.errors import UserError

#: which nibble of a word, from the lowest, each of its eight columns is in AWQ
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
#: (tensors of a layer by the last part of their names, scheme) -> codes [N, K], zeros and scales [N, G]
_Reader = Callable[[dict[str, Tensor], dict[str, Any]], tuple[Tensor, Tensor, Tensor]]


class Foreign(StoredModel):
    """A folder in one of the forms above; UserError if it is none, or its integers have not 4 bits."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        stored = self.config.get("quantization_config") or {}
        self.kind = str(stored.get("quant_method"))
        if self.kind not in _READERS:
            what = f"quantised by {self.kind}" if stored else "not quantised"
            raise UserError(f"{folder} is {what}; folders of lutserve, {', '.join(_READERS)} can be read")
        self._read, key = _READERS[self.kind]
        self.schemes = [_scheme(scheme) for scheme in _schemes(stored)]
        for scheme in self.schemes:
            if scheme["bits"] != 4:
                raise UserError(f"{folder} is {self.kind} in the form {scheme}; only 4-bit integers are read")
        if len({scheme["group_size"] for scheme in self.schemes}) > 1:
            raise UserError(f"{folder} has groups of several sizes; folders with one size are read")
        self.layers = self.layers_with(key)
        if not self.layers:
            raise UserError(f"{folder} says {self.kind} but holds no {key}")

    def weight(self, name: str) -> Tensor:
        """The weight of a layer as it is served, fp32 [N, K]; UserError if its tensors do not fit."""
        parts = self._parts(name)
        try:
            codes, zeros, scales = self._read(parts, self.schemes[0])
            groups = parts.get("g_idx", parts.get("weight_g_idx"))
            if groups is None or (groups < 0).any():
                size = self.schemes[0]["group_size"]
                columns = torch.arange(codes.shape[1])
                groups = columns // size if size > 0 else torch.zeros_like(columns)
            zero = zeros.expand_as(scales).index_select(1, groups.long())
            return (codes - zero) * scales.float().index_select(1, groups.long())
        except (KeyError, IndexError, RuntimeError) as error:
            shapes = {key: list(tensor.shape) for key, tensor in parts.items()}
            raise UserError(
                f"{name} is no layer of a {self.kind} folder: {shapes} ({str(error).splitlines()[0]})"
            ) from None

    def facts(self) -> list[LayerFacts]:
        """Size of each quantised layer, in the order of the model."""
        found = []
        for name in self.layers:
            parts = self._parts(name)
            n, k = self.weight(name).shape
            found.append(LayerFacts(name, (n, k), sum(part.nbytes for part in parts.values()), None, None))
        return found

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        size = self.schemes[0]["group_size"]
        return f"int4 by {self.kind}, {'whole rows' if size < 1 else f'groups of {size}'}"

    @property
    def folded(self) -> bool:
        """Whether weights differ from the original's by factors of rows and columns."""
        return self.kind == "awq"

    def _parts(self, name: str) -> dict[str, Tensor]:
        names = [key for key in self.names if key.rpartition(".")[0] == name and not key.endswith(".bias")]
        return {key.rpartition(".")[2]: self.tensor(key) for key in names}


def _schemes(stored: dict[str, Any]) -> list[dict[str, Any]]:
    """The weight schemes of a quantization_config."""
    if stored.get("quant_method") != "compressed-tensors":
        return [stored]
    form = {"format": stored.get("format", "unknown")}
    groups = stored.get("config_groups") or {}
    return [form | group | (group.get("weights") or {}) for group in groups.values()] or [form]


def _scheme(stored: dict[str, Any]) -> dict[str, Any]:
    """What of it says how to read the weights; bits 0 if they are not plain packed integers."""
    bits = stored.get("bits", stored.get("w_bit", stored.get("num_bits")))
    size = stored.get("group_size", stored.get("q_group_size"))
    form = stored.get("format") or stored.get("version") or stored.get("checkpoint_format") or "gptq"
    plain = str(form).lower() in ("pack-quantized", "gemm", "gptq", "gptq_v2")
    return {"bits": int(bits or 0) if plain else 0, "group_size": int(size or -1), "form": form}


def _nibbles(words: Tensor) -> Tensor:
    """The codes in int32 [R, C], lowest bits first, [R, 8 C]."""
    return (words.to(torch.int32)[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15).flatten(1)


def _compressed_tensors(parts: dict[str, Tensor], scheme: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    n, k = (int(size) for size in parts["weight_shape"])
    codes, zeros = _nibbles(parts[PACKED])[:, :k], parts.get("weight_zero_point")
    zero = torch.tensor([[8]]) if zeros is None else _nibbles(zeros.t()).t()[:n]
    return codes, zero, parts["weight_scale"]


def _gptq(parts: dict[str, Tensor], scheme: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    zeros = _nibbles(parts["qzeros"])
    if scheme["form"] != "gptq_v2":
        zeros = zeros + 1 & 15
    return _nibbles(parts["qweight"].t()), zeros.t(), parts["scales"].t()


def _awq(parts: dict[str, Tensor], scheme: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    def columns(words: Tensor) -> Tensor:
        return _nibbles(words).view(len(words), -1, 8)[:, :, _AWQ_PLACES].flatten(1).t()

    return columns(parts["qweight"]), columns(parts["qzeros"]), parts["scales"].t()


#: quant_method -> reader, and the tensor that every quantised layer has
_READERS: dict[str, tuple[_Reader, str]] = {
    "compressed-tensors": (_compressed_tensors, PACKED),
    "gptq": (_gptq, "qweight"),
    "awq": (_awq, "qweight"),
}
