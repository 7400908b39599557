"""A multiply-accumulate unit for a format: its widths, its share of a chip, and SystemVerilog for it.

Values are integers in units of the format's smallest step, so that products and sums are exact. The published
units (arXiv 2405.03103, section 5) exist as areas only; what is written here is our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lutserve.formats import Codebook

#: products that the accumulator holds without loss
PRODUCTS = 256
#: largest integer of an exact image; quantile lists have none and take their int8 image
_EXACT = 255
#: widest operands whose products are listed
_LISTED_BITS = 5
#: shares of a chip that are MAC units and memory, whose growth the published overhead weighs
_MAC_SHARE, _MEMORY_SHARE = 0.10, 0.60


def overhead(area: float, int4_area: float, bits: int) -> float:
    """Growth in percent of a chip whose MAC units have `area` instead of INT4's, and operands these bits."""
    return 100 * (_MAC_SHARE * (area / int4_area - 1) + _MEMORY_SHARE * (bits / 4 - 1))


def integers(codebook: Codebook) -> tuple[tuple[int, ...], bool]:
    """The values as integers, and whether they stand for them exactly."""
    exact = codebook.integers(_EXACT)
    if exact is not None:
        return exact, True
    return codebook.int8_table().values[: len(codebook.values)], False


def by_code(codebook: Codebook) -> tuple[int, ...]:
    """The integer of each of the 2**bits codes that hardware would use.

    Integers in two's complement. Lists of both signs of some magnitudes as sign and magnitude, where minus
    zero is the value without a partner, if there is one. Any other list in its order. Codes without a value
    are zero.
    """
    values, _ = integers(codebook)
    half = 2 ** (codebook.bits - 1)
    codes = [0] * (2 * half)
    if codebook.integer:
        return (*values[half:], *values[:half])
    both = [v for v in values if v >= 0 and -v in values]
    lone = [v for v in values if -v not in values]
    if len(lone) <= (0 in both) and len(both) <= half:
        codes[: len(both)] = both
        codes[half : half + len(both)] = [-v for v in both]
        if lone:
            codes[half] = lone[0]
    else:
        codes[: len(values)] = values
    return tuple(codes)


def largest_product(codebook: Codebook) -> int:
    """Largest magnitude of a product, in units of the smallest step of products."""
    return max(abs(v) for v in integers(codebook)[0]) ** 2


def accumulator_bits(codebook: Codebook) -> int:
    """Width of a signed accumulator that no sum of PRODUCTS products can overflow."""
    return 1 + math.ceil(math.log2(PRODUCTS * largest_product(codebook) + 1))


def product_bits(codebook: Codebook) -> int:
    """Width of a signed product."""
    return 1 + largest_product(codebook).bit_length()


def accumulator(codebook: Codebook) -> str:
    """SystemVerilog of the module `accumulator`: adds a product a clock, or begins anew with `clear`."""
    return f"""\
module accumulator(input clk, input clear, input signed [{product_bits(codebook) - 1}:0] p,
                   output reg signed [{accumulator_bits(codebook) - 1}:0] sum);
  always @(posedge clk) sum <= clear ? p : sum + p;
endmodule
"""


def _table(codebook: Codebook) -> str:
    """The product of each pair of codes, listed."""
    codes, bits = by_code(codebook), codebook.bits
    return _module(
        codebook,
        _function("listed", 2 * bits, product_bits(codebook), [x * y for x in codes for y in codes]),
        "assign p = listed({a, b});",
    )


def _signed(codebook: Codebook) -> str:
    """Signed integers, multiplied."""
    codes = by_code(codebook)
    width = 1 + max(abs(v) for v in codes).bit_length()
    if codebook.integer:
        return _module(codebook, "", "assign p = $signed(a) * $signed(b);")
    return _module(
        codebook,
        _function("value", codebook.bits, width, list(codes)),
        f"wire signed [{width - 1}:0] x = value(a), y = value(b);\n  assign p = x * y;",
    )


def _magnitude(codebook: Codebook) -> str:
    """Magnitudes, multiplied, and the sign."""
    codes = by_code(codebook)
    width = max(abs(v) for v in codes).bit_length()
    return _module(
        codebook,
        _function("size", codebook.bits, width, [abs(v) for v in codes], signed=False)
        + _function("minus", codebook.bits, 1, [int(v < 0) for v in codes], signed=False),
        f"wire [{2 * width - 1}:0] size_p = size(a) * size(b);\n"
        f"  assign p = minus(a) ^ minus(b) ? -$signed({{1'b0, size_p}}) : $signed({{1'b0, size_p}});",
    )


def _shift(codebook: Codebook) -> str:
    """Odd parts, multiplied, shifted by the sum of the powers of two, and the sign."""
    codes = by_code(codebook)
    powers = [(v & -v).bit_length() - 1 if v else 0 for v in codes]
    odd = [abs(v) >> power for v, power in zip(codes, powers, strict=True)]
    width, shift = max(odd).bit_length(), max(1, max(powers).bit_length())
    out = product_bits(codebook) - 1
    return _module(
        codebook,
        _function("odd", codebook.bits, width, odd, signed=False)
        + _function("power", codebook.bits, shift, powers, signed=False)
        + _function("minus", codebook.bits, 1, [int(v < 0) for v in codes], signed=False),
        f"wire [{2 * width - 1}:0] odd_p = odd(a) * odd(b);\n"
        f"  wire [{shift}:0] power_p = power(a) + power(b);\n"
        f"  wire [{out - 1}:0] size_p = odd_p << power_p;\n"
        f"  assign p = minus(a) ^ minus(b) ? -$signed({{1'b0, size_p}}) : $signed({{1'b0, size_p}});",
    )


#: ways to write a multiplier; which is the smallest depends on the format
MULTIPLIERS: dict[str, Callable[[Codebook], str]] = {
    "table": _table,
    "signed": _signed,
    "magnitude": _magnitude,
    "shift": _shift,
}


def ways(codebook: Codebook) -> list[str]:
    """The keys of MULTIPLIERS worth trying: products of wide operands are too many to list."""
    return [way for way in MULTIPLIERS if way != "table" or codebook.bits <= _LISTED_BITS]


def multiplier(codebook: Codebook, way: str) -> str:
    """SystemVerilog of the module `multiplier`: two codes in, their signed product out.

    Args:
        codebook: the format.
        way: a key of MULTIPLIERS.

    """
    return MULTIPLIERS[way](codebook)


def _module(codebook: Codebook, functions: str, body: str) -> str:
    top = codebook.bits - 1
    return f"""\
module multiplier(input [{top}:0] a, input [{top}:0] b, output signed [{product_bits(codebook) - 1}:0] p);
{functions}  {body}
endmodule
"""


def _function(name: str, bits: int, width: int, values: list[int], signed: bool = True) -> str:
    """A look-up of `width` bits by a code of `bits`."""
    cases = "".join(
        f"      {code}: {name} = {f'-{width}' if v < 0 else width}'{'s' if signed else ''}d{abs(v)};\n"
        for code, v in enumerate(values)
    )
    kind = "signed " if signed else ""
    return f"""\
  function automatic {kind}[{width - 1}:0] {name}(input [{bits - 1}:0] code);
    case (code)
{cases}      default: {name} = 0;
    endcase
  endfunction
"""
