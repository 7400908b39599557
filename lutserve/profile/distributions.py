"""Are a model's weights and layer inputs normal, or do they have the tails of Student's t?

Both distributions are fitted to every linear layer (arXiv 2405.03103, section 3): the heavier the tails (a
small nu), the more a t-shaped format such as sf4_5 pays. The paper shows random tokens to the model and does
not say which side of a layer it profiles; here it is the input, on a text unless told otherwise.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from statistics import fmean, median, pstdev
from typing import Any

import torch
from torch import Tensor

from lutserve.errors import UserError
from lutserve.profile import student
from lutserve.profile.source import load

SCHEMA = "lutserve-distributions-1"
#: nu of a nearly normal sample is arbitrary, so that means are taken of at most this
NU_CAP = 100.0

#: told each row and the numbers behind it, fp32
Show = Callable[[dict[str, Any], Tensor], None]


def profile(
    model: str,
    text: str | None,
    *,
    window: int = 2048,
    windows: int = 4,
    dtype: str = "bfloat16",
    blocks: Iterable[int] | None = None,
    sample: int = 100_000,
    done: Callable[[int, int], None] = lambda done, total: None,
    show: Show = lambda row, numbers: None,
) -> dict[str, Any]:
    """Fit every linear layer's weight and input; the output layer is left out.

    Args:
        model: Hugging Face folder or id.
        text: what the model reads, see `source.load`; None for random tokens.
        window: tokens in a window.
        windows: how many.
        dtype: bfloat16, float16 or float32.
        blocks: numbers of the decoder blocks to look at; default: all.
        sample: numbers drawn from each tensor, the same ones every time.
        done: called with (steps done, steps in all).
        show: called with every row.

    Returns:
        {"schema", "model", "dtype", "window", "windows", "sample", "rows": [...], "summary": [...]}. A row
        has kind (weight or input), type (the layer's name in its block), layers (those that read an input),
        count and sampled (numbers), zeros (share of the sample), odd (infinities and NaNs in it), and fit:
        the fields of `student.Fit` with ks_delta, or None where all numbers are the same. A summary's entry
        is over all rows of a kind and type, type "all" for a kind.

    Raises:
        UserError: the model cannot be loaded, has no linear layer there, or the text has not one window.

    """
    network, parts = load(model, text, window, windows, dtype)
    wanted = None if blocks is None else set(blocks)
    layers = dict(_linears(network, wanted))
    if not layers:
        raise UserError(f"{model} has no linear layer in blocks {sorted(wanted or ())}")
    inputs = _Inputs(layers, -(-sample // len(parts)))
    steps = len(parts) + len(layers)

    with torch.inference_mode():
        for number, part in enumerate(parts, 1):
            network.base_model(part[None], use_cache=False)
            done(number, steps)
    rows: list[dict[str, Any]] = []
    for number, (name, module) in enumerate(layers.items(), 1):
        weight = module.weight.detach()
        found = [("weight", [name], weight.numel(), _drawn(weight, sample, name))]
        if name in inputs.samples:
            numbers = torch.cat(inputs.samples[name])
            found.append(("input", inputs.readers[name], inputs.counts[name], numbers))
        for kind, names, count, numbers in found:
            row = _row(kind, names, count, numbers)
            show(row, numbers)
            rows.append(row)
        done(len(parts) + number, steps)
    return {
        "schema": SCHEMA,
        "model": model,
        "dtype": dtype,
        "window": window,
        "windows": len(parts),
        "sample": sample,
        "rows": rows,
        "summary": summary(rows),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the layers of a kind and type, in the order in which they come.

    fits: layers that have one (no point mass); nu_mean, nu_spread (standard deviation) with nu capped at
    NU_CAP, nu_median, ks_delta_mean, and t_better: the share of layers with ks_delta > 0. None without fits.
    """
    kinds = ("weight", "input")
    keys = dict.fromkeys((row["kind"], row["type"]) for kind in kinds for row in rows if row["kind"] == kind)
    entries = []
    for kind, name in [*keys, *((kind, "all") for kind in kinds)]:
        chosen = [row["fit"] for row in rows if row["kind"] == kind and name in ("all", row["type"])]
        fits = [fit for fit in chosen if fit and not fit["point_mass"]]
        entry: dict[str, Any] = {"kind": kind, "type": name, "layers": len(chosen), "fits": len(fits)}
        nus = [min(fit["nu"], NU_CAP) for fit in fits]
        deltas = [fit["ks_delta"] for fit in fits]
        entry |= dict.fromkeys(("nu_mean", "nu_spread", "nu_median", "ks_delta_mean", "t_better"))
        if fits:
            entry |= {"nu_mean": fmean(nus), "nu_spread": pstdev(nus), "nu_median": median(nus)}
            entry |= {"ks_delta_mean": fmean(deltas), "t_better": fmean(delta > 0 for delta in deltas)}
        entries.append(entry)
    return entries


class _Inputs:
    """Draws numbers from what enters each layer; layers that read the same tensor share a sample.

    samples, counts, readers: by the first reader's name.
    """

    def __init__(self, layers: dict[str, Any], share: int) -> None:
        self.share = share
        self.samples: dict[str, list[Tensor]] = {}
        self.counts: dict[str, int] = {}
        self.readers: dict[str, list[str]] = {}
        # Held, so that its address is not used for another one.
        self._last: tuple[Tensor, str] | None = None
        for name, module in layers.items():
            module.register_forward_pre_hook(partial(self._see, name))

    def _see(self, name: str, module: Any, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        if self._last is None or self._last[0] is not x:
            self._last = x, name
            # An expert may get no token.
            if x.numel():
                drawn = self.samples.setdefault(name, [])
                drawn.append(_drawn(x, self.share, f"{name} {len(drawn)}"))
                self.counts[name] = self.counts.get(name, 0) + x.numel()
        readers = self.readers.setdefault(self._last[1], [])
        if name not in readers:
            readers.append(name)


def _linears(network: Any, blocks: set[int] | None) -> Iterator[tuple[str, Any]]:
    """Linear layers (GPT-2's Conv1D included) in order, without the output layer."""
    head = network.get_output_embeddings()
    for name, module in network.named_modules():
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        block = _place(name)[0]
        if linear and module is not head and (blocks is None or block is None or block in blocks):
            yield name, module


def _place(name: str) -> tuple[int | None, str]:
    """The number of a layer's block and its name within the block: "model.layers.3.mlp.up_proj"."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return (None, name) if number is None else (int(parts[number]), ".".join(parts[number + 1 :]))


def _drawn(x: Tensor, count: int, name: str) -> Tensor:
    """At most `count` of a tensor's numbers, fp32, chosen by its name."""
    flat = x.reshape(-1)
    if flat.numel() > count:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        flat = flat[torch.randint(flat.numel(), (count,), generator=generator)]
    return flat.float()


def _row(kind: str, layers: list[str], count: int, numbers: Tensor) -> dict[str, Any]:
    finite = numbers[numbers.isfinite()]
    row: dict[str, Any] = {
        "kind": kind,
        "type": ", ".join(_place(name)[1] for name in layers),
        "layers": layers,
        "count": count,
        "sampled": len(numbers),
        "zeros": float((numbers == 0).float().mean()),
        "odd": len(numbers) - len(finite),
        "fit": None,
    }
    if len(finite) and finite.min() < finite.max():
        fit = student.fit(finite.numpy())
        row["fit"] = asdict(fit) | {"ks_delta": fit.ks_delta}
    return row
