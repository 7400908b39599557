"""Calibrated facts about the input columns of linear layers: what `lutserve calibrate` writes.

A safetensors file. For each input NAME, named after the first layer that reads it, there are NAME.absmax fp32
[K], the largest |x| of every column, and NAME.gain fp32 [K], what it would gain by a place among the outlier
columns (`outliers.GAIN`). The metadata says which layers read which input, and how the file was made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from lutserve.errors import UserError
from lutserve.recipe import Group

SCHEMA = "lutserve-calibration-1"
#: where a model's folder may hold its calibration; not beside the weights, which are whatever ends like this
FILE = "lutserve/calibration.safetensors"


@dataclass(frozen=True, eq=False)
class Columns:
    """One input: the layers that read it, and absmax and gain, fp32 [K]."""

    layers: tuple[str, ...]
    absmax: Tensor
    gain: Tensor


def save(file: Path, inputs: Iterable[Columns], facts: dict[str, Any]) -> None:
    """Write a calibration; the file is complete or as it was.

    Args:
        file: parents are made.
        inputs: the inputs of the model, in order.
        facts: how it was made, anything that JSON can hold.

    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    layers: dict[str, list[str]] = {}
    for entry in inputs:
        name = entry.layers[0]
        tensors |= {f"{name}.absmax": entry.absmax, f"{name}.gain": entry.gain}
        layers[name] = list(entry.layers)
    temporary = file.with_name(f".{file.name}.tmp")
    # One key only: several would be written in an order that changes from run to run.
    metadata = {"lutserve": json.dumps({"schema": SCHEMA, **facts, "layers": layers})}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)
        # Written for its owner alone; whoever serves it may be someone else.
        temporary.chmod(0o644)
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from None


class Calibration:
    """A calibration file; UserError if it is none.

    facts: how it was made. inputs: every input by its name, in the order of the model.
    """

    def __init__(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.file = file
        advice = "make it with `lutserve calibrate`"
        try:
            with safe_open(file, framework="pt") as handle:
                self.facts: dict[str, Any] = json.loads((handle.metadata() or {}).get("lutserve", "{}"))
                if self.facts.get("schema") != SCHEMA:
                    raise UserError(f"{file} is no calibration of this version; {advice}")
                self.inputs = {
                    name: Columns(
                        tuple(layers), handle.get_tensor(f"{name}.absmax"), handle.get_tensor(f"{name}.gain")
                    )
                    for name, layers in self.facts["layers"].items()
                }
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"cannot read calibration {file} ({error}); {advice}") from None
        for name, entry in self.inputs.items():
            finite = all(t.dim() == 1 and t.isfinite().all() for t in (entry.absmax, entry.gain))
            if not finite or entry.absmax.shape != entry.gain.shape:
                raise UserError(f"{file}: {name} is no list of finite numbers; {advice}")
        self._readers = {layer: entry for entry in self.inputs.values() for layer in entry.layers}

    def gain(self, layer: str, parts: Iterable[str], k: int) -> Tensor:
        """Return the gain [k] of the input of a layer.

        Args:
            layer: vLLM's name of it.
            parts: the checkpoint's names of what vLLM fused into it.
            k: its input columns.

        Raises:
            UserError: the calibration lacks the layer, or is of another model.

        """
        found = next((self._readers[name] for name in (layer, *parts) if name in self._readers), None)
        if found is None or found.gain.shape != (k,):
            has = "nothing" if found is None else f"{len(found.gain)} columns"
            raise UserError(
                f"{self.file} has {has} for {layer}, which has {k} input columns; "
                "is it the calibration of this model?"
            )
        return found.gain


@cache
def _read(file: Path) -> Calibration:
    return Calibration(file)


def calibration_of(group: Group, model: str) -> Calibration | None:
    """Return the calibration that a group of a recipe uses.

    Args:
        group: its `calibration` names a file, relative to the model's folder; without one the folder's own is
            taken, if there is one.
        model: folder or hub id of the model.

    Raises:
        UserError: the file cannot be read, or static outlier columns lack one.

    """
    # A folder with stored weights has its columns beside them.
    if not group.arithmetic.outliers or group.stored:
        return None
    file = Path(model) / (group.calibration or FILE)
    if group.calibration or file.is_file():
        return _read(file)
    if group.outliers == "static":
        raise UserError(
            f"static outlier columns need a calibration: `lutserve calibrate {model} -o FILE`, then "
            f"--calibration-file FILE; or put it into the model's folder as {FILE}"
        )
    return None
