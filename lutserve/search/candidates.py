"""What a unit may become: a linear layer's method with its group size, or a nonlinear site's table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch

from lutserve import luts, methods
from lutserve.errors import UserError
from lutserve.kernels.axcore_reference import BLOCK
from lutserve.quantizers.integers import EIGHT_BITS
from lutserve.recipe import Group
from lutserve.search import arithmetic, precision
from lutserve.search.architecture import Site
from lutserve.search.operators import Activation, Function, Linear, Norm, Softmax
from lutserve.search.precision import Precision

#: columns that our 4-bit kernels read at once
_OCTET = 8


@dataclass(frozen=True)
class Candidate:
    """A method for linear layers. name: how the user calls it, where the group size is given with it."""

    method: str
    group_size: int = 128
    label: str = ""

    def __post_init__(self) -> None:
        if not arithmetic.simulated(methods.get(self.method)):
            raise UserError(
                f"{self.method} cannot be a candidate: its products are not simulated; allowed: none, "
                f"{', '.join((*arithmetic.MIXQ, *arithmetic.AXCORE))} and every 4-bit format of "
                "`lutserve formats`, also with +a8 or +a4"
            )
        if self.group_size < 1 and self.group_size != -1:
            raise UserError(f"{self.name}: groups of {self.group_size}; allowed: 1 or more columns, or -1")

    @property
    def name(self) -> str:
        """What it is called in tables and scores."""
        return self.label or self.method

    @cached_property
    def group(self) -> Group:
        """The recipe's form of it."""
        return Group(method=self.method, group_size=self.group_size)

    @cached_property
    def precision(self) -> Precision:
        """Its bits."""
        return precision.of(self.group)

    @cached_property
    def key(self) -> str:
        """Name for stored scores, which changes with the format's values."""
        if not self._grouped:
            return self.method
        name = methods.get(self.method).format
        values = repr(self.group.codebook.values) if name else ""
        return f"{self.method}:{self.group_size}:{hashlib.sha256(values.encode()).hexdigest()[:8]}"

    @property
    def exact(self) -> bool:
        """Whether it changes nothing."""
        return self.method == "none"

    @property
    def rounds_weights_only(self) -> bool:
        """Whether its error is that of the weights alone."""
        return arithmetic.rounds_weights_only(methods.get(self.method))

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [N, K] as the method holds it, fp32; where `rounds_weights_only`."""
        return arithmetic.rounded(weight, self.group)

    def replacement(self, operator: Linear) -> Function:
        """A linear layer as the method computes it."""
        return operator.by(arithmetic.product(operator.weight, self.group))

    def fits(self, site: Site, tensor_parallel: int = 1) -> bool:
        """Whether a layer can take it, cut for this many devices."""
        if not self._grouped:
            return True
        family = methods.get(self.method).family
        if family == "mixq" and site.name.rpartition(".")[2] in EIGHT_BITS:
            return False  # there it is mix8
        cut = site.row_parallel and tensor_parallel > 1
        k, rest = divmod(site.columns, tensor_parallel) if cut else (site.columns, 0)
        if self.group_size != -1 and self.group_size % _OCTET and self.group_size < k:
            return False
        if family == "axcore" and (k % max(self.group_size, 1) or any(part % BLOCK for part in site.parts)):
            return False
        return not cut or not (rest or self.group_size == -1 or k % self.group_size or k % 2)

    @property
    def _grouped(self) -> bool:
        return arithmetic.grouped(methods.get(self.method))


@dataclass(frozen=True)
class TableCandidate:
    """A table for a nonlinear site: nli-N or nnlut:H."""

    name: str
    exact = False

    def __post_init__(self) -> None:
        luts.validate(self.name)
        if self.name == "exact":
            raise UserError("--luts exact: without --luts every site is exact; give tables to choose from")

    @property
    def key(self) -> str:
        """Name for stored scores."""
        return self.name

    def replacement(self, operator: Activation | Norm | Softmax) -> Function:
        """A site as it is with the table."""
        return operator.tabled(self.name)

    def entries(self, function: str) -> int:
        """Numbers that its table holds for a function: samples of an NLI table, cuts, slopes and biases."""
        return luts.entries(function, self.name)


Option: TypeAlias = Candidate | TableCandidate


def parse(names: str, group_size: int) -> list[Candidate]:
    """The candidates of a comma-separated list of METHOD or METHOD@GROUP_SIZE.

    UserError for none, one given twice, or a group size that is no number.
    """
    listed = _listed("--candidates", names)
    found = []
    for name in listed:
        method, at, size = name.partition("@")
        if at and not size.removeprefix("-").isdigit():
            raise UserError(f"--candidates {name}: allowed after @ is a group size, e.g. int4@32")
        found.append(Candidate(method, int(size) if at else group_size, name if at else ""))
    return found


def parse_tables(names: str) -> list[TableCandidate]:
    """The tables of a comma-separated list; UserError for none, or one given twice."""
    return [TableCandidate(name) for name in _listed("--luts", names)]


def _listed(option: str, names: str) -> list[str]:
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed or len(set(listed)) < len(listed):
        raise UserError(f"{option} {names!r}: give names, comma separated, each once")
    return listed


def allowed(site: Site, candidates: Sequence[Candidate], tensor_parallel: int) -> list[Candidate]:
    """Those that fit a layer; UserError if none does."""
    found = [candidate for candidate in candidates if candidate.fits(site, tensor_parallel)]
    if not found:
        raise UserError(
            f"{site.name}: {site.columns} columns on {tensor_parallel} devices fit none of the candidates; "
            "choose another group size or add int8 or none"
        )
    return found
