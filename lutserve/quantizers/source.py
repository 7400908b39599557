"""Read a Hugging Face model folder tensor by tensor, so that no more than is needed is in memory."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutserve.errors import UserError
from lutserve.recipe import read_json

#: files that hold weights, and what only makes sense with the unquantised ones
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json", "*.h5", "*.msgpack")


class Source:
    """The tensors and the configuration of a model folder; UserError if it holds none that we can read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        stored = self.config.get("quantization_config")
        if stored:
            raise UserError(
                f"{folder} is quantised already ({stored.get('quant_method', 'unknown method')}); "
                "give the 16-bit model"
            )
        self.files = self._weight_files()
        #: the file of each tensor
        self.names = {name: file for file in self.files for name in _names(file)}

    def tensor(self, name: str) -> Tensor:
        """Return the tensor `name`, a key of `names`, as it is stored."""
        file = self.names[name]
        if file.suffix != ".safetensors":
            return _pickled(file)[name]
        from safetensors import safe_open

        # Opened anew each time: a file that stays mapped counts as ours as far as it was ever read.
        with safe_open(file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor

    def find(self, name: str, base: str) -> str:
        """Return the checkpoint's name of a parameter: its own, or the same without the prefix `base`."""
        short = name.removeprefix(f"{base}.")
        for candidate in (name, short, f"{base}.{name}"):
            if candidate in self.names:
                return candidate
        raise UserError(f"{self.folder} has no tensor {name!r}; is the download complete?")

    def companions(self) -> list[Path]:
        """Files to keep beside quantised weights: tokenizer, chat template, generation settings, code."""
        weights = {file for pattern in WEIGHT_FILES for file in self.folder.glob(pattern)}
        kept = (file for file in self.folder.iterdir() if file.is_file() and file not in weights)
        ours = {"config.json", "lutserve.json", ".gitattributes"}
        return sorted(f for f in kept if f.name not in ours and not f.name.lower().startswith("readme"))

    def _weight_files(self) -> list[Path]:
        for suffix in ("safetensors", "bin"):
            stem = "model" if suffix == "safetensors" else "pytorch_model"
            index = self.folder / f"{stem}.{suffix}.index.json"
            if index.is_file():
                names = sorted(set(read_json(index)["weight_map"].values()))
                missing = [name for name in names if not (self.folder / name).is_file()]
                if missing:
                    raise UserError(f"{self.folder} lacks {missing[0]}, which its index names")
                return [self.folder / name for name in names]
            single = self.folder / f"{stem}.{suffix}"
            if single.is_file():
                return [single]
        raise UserError(f"{self.folder} has no model.safetensors or pytorch_model.bin")


def _names(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return list(_pickled(file))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}: {error}") from None


@cache
def _pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, mapped and not loaded."""
    try:
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}; convert the model to safetensors") from None
    return tensors
