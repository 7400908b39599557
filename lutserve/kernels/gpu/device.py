"""What a launcher may ask about a device without waiting for it."""

from __future__ import annotations

from functools import cache

import torch

#: in the interpreter, where tensors are on the CPU: few, so that small tests split a product as well
_INTERPRETED = 8


@cache
def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors."""
    if device.type == "cpu":
        return _INTERPRETED
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
