"""What a layer may become: a method with its group size, and its effect on a weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lutserve import formats, methods
from lutserve.errors import UserError
from lutserve.kernels.reference import quantize_rows
from lutserve.quantizers import rtn
from lutserve.recipe import Group
from lutserve.search import precision
from lutserve.search.architecture import Site
from lutserve.search.precision import Precision

#: columns that our 4-bit kernels read at once
_OCTET = 8


@dataclass(frozen=True)
class Candidate:
    """A method whose error is that of its weights alone: none, int8, or a 4-bit format."""

    method: str
    group_size: int = 128

    def __post_init__(self) -> None:
        known = methods.get(self.method)
        simulated = self.method in ("none", "int8") or (
            known.family == "codebook" and known.activations == 16
        )
        if not simulated:
            raise UserError(
                f"{self.method} cannot be a candidate yet: its error depends on the activations; allowed: "
                "none, int8 and every 4-bit format of `lutserve formats`"
            )

    @property
    def group(self) -> Group:
        """The recipe's form of it."""
        return Group(method=self.method, group_size=self.group_size)

    @property
    def precision(self) -> Precision:
        """Its bits."""
        return precision.of(self.group)

    @cached_property
    def key(self) -> str:
        """Name for stored scores, which changes with the format's values."""
        if self._format is None:
            return self.method
        digest = hashlib.sha256(repr(formats.get(self._format).values).encode()).hexdigest()[:8]
        return f"{self.method}:{self.group_size}:{digest}"

    @property
    def _format(self) -> str | None:
        return methods.get(self.method).format or None

    def weight(self, weight: Tensor) -> Tensor:
        """The weight [N, K] fp32 as the method computes with it, fp32."""
        if self._format is not None:
            return rtn(weight, self._format, self.group_size).dequantize()
        if self.method == "none":
            return weight
        codes, scales = quantize_rows(weight)
        return codes.float() * scales[:, None]

    def fits(self, site: Site, tensor_parallel: int = 1) -> bool:
        """Whether a layer can take it, cut for this many devices."""
        if self._format is None:
            return True
        whole = site.columns
        cut = site.row_parallel and tensor_parallel > 1
        k, rest = divmod(whole, tensor_parallel) if cut else (whole, 0)
        if self.group_size != -1 and self.group_size % _OCTET and self.group_size < k:
            return False
        return not cut or not (rest or self.group_size == -1 or k % self.group_size or k % 2)


def parse(names: str, group_size: int) -> list[Candidate]:
    """The candidates of a comma-separated list of methods; UserError for none, or one given twice."""
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed or len(set(listed)) < len(listed):
        raise UserError(f"--candidates {names!r}: give methods, comma separated, each once")
    return [Candidate(name, group_size) for name in listed]


def allowed(site: Site, candidates: Sequence[Candidate], tensor_parallel: int) -> list[Candidate]:
    """Those that fit a layer; UserError if none does."""
    found = [candidate for candidate in candidates if candidate.fits(site, tensor_parallel)]
    if not found:
        raise UserError(
            f"{site.name}: {site.columns} columns on {tensor_parallel} devices fit none of the candidates; "
            "choose another group size or add int8 or none"
        )
    return found
