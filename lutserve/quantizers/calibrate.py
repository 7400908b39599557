"""`lutserve calibrate`: show a model text, and note which columns of which inputs are outliers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lutserve.kernels import mixq
from lutserve.quantizers import calibration, columns
from lutserve.quantizers.outliers import OutlierSlots
from lutserve.quantizers.skeleton import Skeleton
from lutserve.quantizers.source import Source
from lutserve.quantizers.statistics import record


class _Inputs:
    """One input of a block: the same learning as in a server, but from every token."""

    def __init__(self, k: int) -> None:
        self.layers: list[str] = []
        self.slots = OutlierSlots(k, lambda chosen: torch.empty(len(chosen), 0))
        self.absmax = torch.zeros(k)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in x [..., K]."""
        x = x.reshape(-1, x.shape[-1])
        torch.maximum(self.absmax, x.abs().amax(0), out=self.absmax)
        self.tokens += len(x)
        rounded = x.bfloat16()

        def prepare() -> mixq.Prepared:
            prepared: mixq.Prepared = mixq.prepare(rounded, self.slots.index, self.slots.keep)
            return prepared

        self.slots.learn(rounded, prepare(), prepare)


@torch.no_grad()
def calibrate(
    model: Path,
    output: Path,
    *,
    text: str = calibration.DEFAULT,
    samples: int = 128,
    length: int = 512,
    watch: Callable[[float], None] = lambda done: None,
) -> Path:
    """Write the column statistics of a model and return the file.

    Args:
        model: Hugging Face folder with 16-bit (or fp32) weights.
        output: a .safetensors file, or a folder, which gets `columns.FILE`.
        text: calibration text, see `calibration.windows`.
        samples: windows of it.
        length: tokens in a window.
        watch: told how much of the work is done, from 0 to 1.

    Raises:
        UserError: the model cannot be read, there is no such text, or the file cannot be written.

    """
    file = output if output.suffix == ".safetensors" else output / columns.FILE
    skeleton = Skeleton(Source(model))
    hidden, arguments = skeleton.inputs(calibration.windows(text, model, samples, length))
    steps, done = len(skeleton.blocks) * len(hidden), 0

    def step() -> None:
        nonlocal done
        done += 1
        watch(done / steps)

    found: list[columns.Columns] = []
    for index in range(len(skeleton.blocks)):
        block = skeleton.fill(index)
        inputs = record(_Inputs, block, skeleton.linears(index), hidden, arguments[index], True, step)
        skeleton.empty(index)
        for entry in inputs:
            layers = tuple(f"{skeleton.path}.{index}.{name}" for name in entry.layers)
            found.append(columns.Columns(layers, entry.absmax, entry.slots.excess / entry.tokens))
    facts = {"model": model.resolve().name, "text": text, "samples": samples, "length": length}
    columns.save(file, found, facts)
    return file
