"""Offline quantisers: tensors in, codes and scales out. They need torch and numpy only.

`rtn`, `gptq`, `awq` and `smoothquant` work on single weights; `pipeline` takes a whole model through them.
"""

from __future__ import annotations

from lutserve.quantizers.activations import quantize_activations
from lutserve.quantizers.gptq import gptq
from lutserve.quantizers.rtn import rtn
from lutserve.quantizers.weight import QuantizedWeight

__all__ = ["QuantizedWeight", "gptq", "quantize_activations", "rtn"]
