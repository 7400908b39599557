"""Quantise one decoder block: fold scales, round its linear layers, measure what that cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lutserve.errors import UserError
from lutserve.luts.fpma import ARITHMETICS
from lutserve.quantizers import awq, folding, integers
from lutserve.quantizers.axcore import axcore
from lutserve.quantizers.fp4 import Fp4Weight
from lutserve.quantizers.gptq import gptq
from lutserve.quantizers.integers import IntegerWeight
from lutserve.quantizers.quality import sqnr
from lutserve.quantizers.rtn import rtn
from lutserve.quantizers.settings import Settings
from lutserve.quantizers.smoothquant import smooth_scale
from lutserve.quantizers.statistics import Inputs
from lutserve.quantizers.weight import QuantizedWeight
from lutserve.recipe import Group


@dataclass(frozen=True, eq=False)
class Layer:
    """A quantised linear layer and its errors, in dB; `output` only where there was calibration."""

    weight: QuantizedWeight | IntegerWeight | Fp4Weight
    weight_sqnr: float
    output_sqnr: float | None
    group: Group

    def report(self) -> dict[str, Any]:
        """What is written about the layer; errors in hundredths of a dB."""
        errors = {"weight_sqnr_db": self.weight_sqnr, "output_sqnr_db": self.output_sqnr}
        known = {key: round(value, 2) for key, value in errors.items() if value is not None}
        facts = {"method": self.group.method, "group_size": self.group.group_size}
        return facts | {"columns": self.weight.codes.shape[1], **known}


@dataclass(eq=False)
class BlockQuantizer:
    """Takes one block at a time, filled with weights, and leaves it with folded (unquantised) ones.

    head_size: channels of an attention head, None if unknown.
    say: told, once for each kind of layer, what could not be done.
    """

    settings: Settings
    head_size: int | None
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self._folds: dict[tuple[str, ...], folding.Fold | None] = {}

    @torch.no_grad()
    def fold(
        self,
        block: nn.Module,
        linears: dict[str, nn.Linear],
        inputs: list[Inputs],
        sample: Tensor,
        arguments: dict[str, Any],
        dtypes: dict[str, torch.dtype],
        groups: Mapping[str, Group],
    ) -> None:
        """Scale input channels as SmoothQuant or AWQ wants, dividing in the module before.

        Args:
            block: filled with weights.
            linears: all its linear layers.
            inputs: what they read; rescaled along.
            sample: hidden states [1, L, H] to find the modules with.
            arguments: what else the block is called with.
            dtypes: how the parameters of the block are stored.
            groups: the format of every layer that is quantised; what only others read is left as it is.

        """
        steps: list[Callable[..., Tensor]] = [self._smooth] if self.settings.smoothing is not None else []
        steps += [self._awq] if self.settings.algo == "awq" else []
        for choose in steps:
            plans = []
            for entry in inputs:
                group = next((groups[name] for name in entry.layers if name in groups), None)
                if group is None:
                    continue
                fold = self._find(block, linears, entry, sample, arguments)
                if fold is not None:
                    weights = [linears[name].weight for name in entry.layers]
                    plans.append((entry, fold, choose(entry, fold, weights, group)))
            # After all are chosen: dividing a layer's rows changes the weights that its own choice was for.
            for entry, fold, scale in plans:
                real = fold.apply(block, fold.tie(scale), dtypes)
                for name in entry.layers:
                    linears[name].weight.mul_(real)
                entry.rescale(real)

    @torch.no_grad()
    def round(self, name: str, weight: Tensor, entry: Inputs | None, group: Group) -> Layer:
        """Quantise a (folded) weight [N, K]; `entry` is what the layer reads, if there was calibration."""
        settings, hessian = self.settings, entry.hessian if entry else None
        quantized: QuantizedWeight | IntegerWeight | Fp4Weight
        if settings.integers:
            absmax, leaf = entry.absmax if entry else None, name.rpartition(".")[2]
            quantized = integers.quantize(group.arithmetic, leaf, weight, absmax, hessian, settings.damping)
        elif settings.adaptive:
            assert entry is not None
            x, compensation = torch.cat(entry.kept), ARITHMETICS[group.method].compensation
            try:
                quantized = axcore(weight, group.group_size, x=x, compensation=compensation)
            except UserError as error:
                raise UserError(f"{name}: {error}; name it in --ignore") from None
        elif settings.algo == "gptq":
            assert hessian is not None
            quantized = gptq(
                weight,
                hessian,
                **_form(group),
                act_order=settings.act_order,
                static_groups=True,
                damping=settings.damping,
                block_size=settings.block_size,
            )
        elif settings.algo == "awq":
            assert hessian is not None
            ratio = awq.search_clip(
                weight, lambda rounded: awq.output_error(hessian, rounded - weight), **_form(group)
            )
            quantized = rtn(weight, **_form(group), quantile=ratio)
        else:
            quantized = rtn(weight, **_form(group), full_range=settings.full_range, mse=settings.mse)
        rounded = quantized.dequantize()
        output = None
        if hessian is not None:
            signal = awq.output_error(hessian, weight)
            noise = awq.output_error(hessian, rounded - weight)
            output = _decibel(signal, noise)
        return Layer(quantized, sqnr(weight, rounded), output, group)

    def _smooth(self, entry: Inputs, fold: folding.Fold, weights: list[Tensor], group: Group) -> Tensor:
        alpha = self.settings.smoothing
        assert alpha is not None
        return smooth_scale(entry.absmax, weights, alpha)

    def _awq(self, entry: Inputs, fold: folding.Fold, weights: list[Tensor], group: Group) -> Tensor:
        def loss(rounded: list[Tensor]) -> float:
            pairs = zip(rounded, weights, strict=True)
            return sum(awq.output_error(entry.hessian, new - old) for new, old in pairs)

        return awq.search_scale(weights, entry.absmean, loss, **_form(group), tie=fold.tie).scale

    def _find(
        self,
        block: nn.Module,
        linears: dict[str, nn.Linear],
        entry: Inputs,
        sample: Tensor,
        arguments: dict[str, Any],
    ) -> folding.Fold | None:
        key = tuple(entry.layers)
        known = key in self._folds
        hint = self._folds.get(key)
        fold = folding.find(block, linears, entry, sample, arguments, self.head_size, hint)
        self._folds[key] = fold
        if fold is None and not known:
            self.say(f"{', '.join(key)}: no norm or linear layer before can take a scale; left unscaled")
        return fold


def _form(group: Group) -> dict[str, Any]:
    return {"fmt": group.codebook, "group_size": group.group_size}


def reader(inputs: Collection[Inputs], name: str) -> Inputs | None:
    """The input that a layer reads."""
    return next((entry for entry in inputs if name in entry.layers), None)


def _decibel(signal: float, noise: float) -> float:
    return float(10 * torch.log10(torch.tensor(signal, dtype=torch.float64) / noise))
