"""16-bit floating-point formats as bit patterns, in numpy alone (which has no bfloat16)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Format = Literal["float16", "bfloat16"]
F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]

PATTERNS: U16 = np.arange(65536, dtype=np.uint16)
_NAN: dict[Format, int] = {"float16": 0x7E00, "bfloat16": 0x7FC0}


def decode(bits: U16, fmt: Format) -> F32:
    """Values of uint16 bit patterns of `fmt`, as fp32 (exact), same shape."""
    if fmt == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def decode64(bits: U16, fmt: Format) -> npt.NDArray[np.float64]:
    """Values of uint16 bit patterns of `fmt`, as float64 (exact), same shape."""
    with np.errstate(invalid="ignore"):  # signalling NaNs become quiet
        return decode(bits, fmt).astype(np.float64)


def encode(values: npt.NDArray[np.floating[Any]], fmt: Format) -> U16:
    """Bit patterns of `values` (fp16, fp32 or float64) rounded once, to nearest even, to `fmt`.

    Every NaN becomes the one quiet NaN of the format, so that equal tables have equal bytes.
    """
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(np.float16).view(np.uint16) if fmt == "float16" else _encode_bf16(values)
    return np.where(np.isnan(values), np.uint16(_NAN[fmt]), rounded)


def _encode_bf16(values: npt.NDArray[np.floating[Any]]) -> U16:
    """Patterns of the nearest bf16; the caller puts the NaNs right."""
    near = values.astype(np.float32)
    word: npt.NDArray[np.uint32] = near.view(np.uint32)
    # Rounding to odd on the way through fp32 makes two roundings equal to one: step back to the value
    # nearer to zero, then mark with the last bit that something was cut off.
    word = word - (np.abs(near) > np.abs(values))
    word = word | (word.view(np.float32) != values)
    bits: U16 = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)
    return bits
