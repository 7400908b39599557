"""Look-ups in a table of 16 numbers held in registers: two byte permutations and a third that chooses.

A table is four registers for each byte of its entries ("planes"). A permutation looks four nibbles up in
eight bytes at a time, so four weights cost three of them a plane, and no memory is read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from lutserve.kernels.gpu import floats

if triton.knobs.runtime.interpret:

    @triton.jit
    def byte_perm(a, b, selector):
        """PTX's `prmt.b32` for selectors whose nibbles are below 8: the interpreter has no libdevice."""
        selector += tl.zeros_like(a)  # it may be a number
        both = (b.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | a.to(tl.uint32, bitcast=True)
        result = tl.zeros_like(both)
        for i in tl.static_range(4):
            result |= ((both >> ((selector >> 4 * i & 7) * 8).to(tl.uint64)) & 255) << 8 * i
        return result.to(tl.uint32).to(tl.int32, bitcast=True)
else:
    byte_perm = libdevice.byte_perm


@triton.jit
def planes(codebook, dtype: tl.constexpr):
    """Return the low and the high bytes of 16 entries (fp32 in memory, rounded to dtype): 8 words.

    An int8 table has low bytes only, and four words.
    """
    words = ()
    for byte in tl.static_range(1 if dtype == tl.int8 else 2):
        for register in tl.static_range(4):
            word = 0
            for i in tl.static_range(4):
                entry = tl.load(codebook + 4 * register + i)
                if dtype == tl.int8:
                    entry = entry.to(tl.int8)
                else:
                    entry = floats.narrow(entry, dtype).to(tl.int16, bitcast=True)
                word |= ((entry.to(tl.int32) >> 8 * byte) & 255) << 8 * i
            words = words + (word,)  # noqa: RUF005 - Triton does not unpack
    return words


@triton.jit
def expand(words, table, dtype: tl.constexpr):
    """Return the weights [R, 8 O] of `dtype` that the packed words int32 [R, O] stand for.

    table: `planes`, scalars or a column [R, 1] of tables. The nibbles of a word are its columns
    0 2 4 6 1 3 5 7 (`lut_gemm.ORDER`); a column in binary is: pair, place in the pair, half of the word.
    """
    indices = words & 0x77777777
    choice = ((words >> 1) & 0x44444444) | 0x32103210
    halves = ()
    for half in tl.static_range(2):
        chosen = indices >> 16 * half, choice >> 16 * half
        lows = _plane(table[0], table[1], table[2], table[3], chosen[0], chosen[1])
        if dtype == tl.int8:
            first = tl.join(_part(lows, 0, dtype), _part(lows, 16, dtype))
            second = tl.join(_part(lows, 8, dtype), _part(lows, 24, dtype))
        else:
            highs = _plane(table[4], table[5], table[6], table[7], chosen[0], chosen[1])
            pair0, pair1 = byte_perm(lows, highs, 0x5140), byte_perm(lows, highs, 0x7362)
            first = tl.join(_part(pair0, 0, dtype), _part(pair1, 0, dtype))
            second = tl.join(_part(pair0, 16, dtype), _part(pair1, 16, dtype))
        halves = halves + (tl.join(first, second),)  # noqa: RUF005
    return tl.join(halves[0], halves[1]).reshape(words.shape[0], 8 * words.shape[1])


@triton.jit
def _plane(a, b, c, d, indices, choice):
    """Return one byte of each of four weights: `indices` are nibbles below 8, `choice` picks the half."""
    return byte_perm(byte_perm(a, b, indices), byte_perm(c, d, indices), choice)


@triton.jit
def _part(words, shift: tl.constexpr, dtype: tl.constexpr):
    """The entry at bit `shift` of each word."""
    if dtype == tl.int8:
        return (words >> shift).to(tl.int8)
    else:  # Triton compiles what follows a return
        return (words >> shift).to(tl.int16).to(dtype, bitcast=True)
