"""lutserve: serve LLMs with approximate arithmetic inside vLLM.

Every approximation is a table: a nonlinear function is 65,536 entries, a weight a codebook, an outlier
column a slot. `import lutserve` needs neither torch nor vLLM; what does is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lutserve import formats, luts, quantizers
    from lutserve.luts import lut_table

__version__ = "0.1.0"
__all__ = ["__version__", "formats", "lut_table", "luts", "quantizers"]


def __getattr__(name: str) -> Any:
    if name == "lut_table":
        from lutserve.luts import lut_table

        return lut_table
    if name in __all__:
        return import_module(f"lutserve.{name}")
    raise AttributeError(f"module 'lutserve' has no attribute {name!r}")
