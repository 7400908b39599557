"""Conversions and products of 16-bit floats that are exact in Triton's interpreter as well.

The interpreter truncates fp32 to bf16, misreads subnormal bf16 and multiplies matrices of bf16 as integers,
so there it gets other steps; on a device each of these is what its name says.
"""

from __future__ import annotations

import triton
import triton.language as tl

if triton.knobs.runtime.interpret:

    @triton.jit
    def widen(x):
        """Return x in fp32; x: fp32 or a 16-bit float."""
        if x.dtype == tl.bfloat16:
            return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        return x.to(tl.float32)

    @triton.jit
    def narrow(x, dtype: tl.constexpr):
        """Return fp32 x in dtype, rounded to nearest even."""
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return x.to(dtype)

    @triton.jit
    def dot(a, b):
        """Return a @ b with sums in fp32, or in int32 for int8."""
        if a.dtype == tl.int8:
            return tl.dot(a, b)
        return tl.dot(widen(a), widen(b))
else:

    @triton.jit
    def widen(x):
        """Return x in fp32; x: fp32 or a 16-bit float."""
        return x.to(tl.float32)

    @triton.jit
    def narrow(x, dtype: tl.constexpr):
        """Return fp32 x in dtype, rounded to nearest even."""
        return x.to(dtype)

    @triton.jit
    def dot(a, b):
        """Return a @ b with sums in fp32, or in int32 for int8."""
        return tl.dot(a, b)
