"""A torchvision that was not built for the installed torch must not break text models."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version


def hide_broken_torchvision() -> None:
    """Make `torchvision` look absent where it cannot be loaded.

    vLLM's CPU distribution pulls torchvision from PyPI, which is built for CUDA's torch and fails to load
    with the +cpu build ("operator torchvision::nms does not exist"). transformers imports it wherever it
    finds it, so every model would fail. Text models need none of it. Costs two look-ups of metadata.
    """
    try:
        torch, vision = version("torch"), version("torchvision")
    except PackageNotFoundError:
        return
    if torch.endswith("+cpu") and not vision.endswith("+cpu"):
        # What the import system itself uses for "known not to exist".
        sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
