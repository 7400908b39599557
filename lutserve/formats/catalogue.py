"""Every named format: one literal each. A new one is one more.

The values are those that arXiv 2405.03103 ran with, to the last bit: some of its quantile lists are rounded
to six decimals, and a rule would not give them back.
"""

from __future__ import annotations

from lutserve.formats.codebook import Codebook

_STUDENT = "quantiles of Student's t, nu = {}, as published with arXiv 2405.03103"


def _mirrored(*magnitudes: float) -> tuple[float, ...]:
    """Zero and both signs of increasing magnitudes."""
    return (*(-m for m in reversed(magnitudes)), 0.0, *magnitudes)


_E2M1 = _mirrored(0.5, 1, 1.5, 2, 3, 4, 6)
_APOT4 = _mirrored(0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1)

# fmt: off
_ALL = (
    Codebook("nf4", (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ), 4, "NF4", "normal quantiles, QLoRA (arXiv 2305.14314)"),
    Codebook("sf4_3", (
        -1.0, -0.575725, -0.403755, -0.29162, -0.204868, -0.131054, -0.064036, 0.0, 0.055934, 0.113835,
        0.176078, 0.246078, 0.329642, 0.438727, 0.60598, 1.0,
    ), 4, "SF4, v = 3", _STUDENT.format(3)),
    Codebook("sf4_4", (
        -1.0, -0.608729, -0.435845, -0.318393, -0.225229, -0.144689, -0.070863, 0.0, 0.061908, 0.125773,
        0.193936, 0.269711, 0.358617, 0.471724, 0.638231, 1.0,
    ), 4, "SF4, v = 4", _STUDENT.format(4)),
    Codebook("sf4_5", (
        -1.0, -0.627781, -0.454736, -0.334331, -0.237434, -0.152899, -0.074982, 0.0, 0.065513, 0.132965,
        0.204661, 0.283835, 0.375805, 0.491076, 0.656781, 1.0,
    ), 4, "SF4", _STUDENT.format(5)),
    Codebook("sf4_6", (
        -1.0, -0.640101, -0.467104, -0.344838, -0.245517, -0.15835, -0.077722, 0.0, 0.067911, 0.137742,
        0.211771, 0.293169, 0.387111, 0.503714, 0.66875, 1.0,
    ), 4, "SF4, v = 6", _STUDENT.format(6)),
    Codebook("sf4_7", (
        -1.0, -0.648695668605137, -0.4758049192191136, -0.35226650560941064, -0.25124728719118344,
        -0.16222176644114206, -0.07967003587244491, 0.0, 0.06961628484673037, 0.1411376777420972,
        0.21681690757912492, 0.2997785136806453, 0.39509153065438735, 0.5125912352606964,
        0.6770872505232854, 1.0,
    ), 4, "SF4, v = 7", _STUDENT.format(7)),
    Codebook("fp4_basic", _E2M1, 4, "E2M1", "OCP FP4: 2 exponent bits, 1 mantissa bit"),
    Codebook("fp4_no_sub", _mirrored(0.75, 1, 1.5, 2, 3, 4, 6), 4, "E2M1-NS", "E2M1, subnormal 0.75 for 0.5"),
    Codebook("fp4_e2m1", _mirrored(0.0625, 1, 1.5, 2, 3, 4, 6), 4, "E2M1-I", "Intel's, subnormal 0.0625"),
    Codebook("fp4", _mirrored(0.0625, 2, 3, 4, 6, 8, 12), 4, "E2M1-B", "bitsandbytes FP4, times 12"),
    Codebook("fp4_e2m1_bnb", _mirrored(0.0625, 2, 3, 4, 6, 8, 12), 4, "E2M1-B", "the same as fp4"),
    Codebook("fp4_range", (*_E2M1, 8), 4, "E2M1+SR", "E2M1, minus zero read as 8: super-range"),
    Codebook("fp4_prec1", (*_E2M1[:12], 2.5, 3, 4, 6), 4, "", "E2M1 with minus zero read as 2.5"),
    Codebook("fp4_prec2", (*_E2M1[:-1], 5, 6), 4, "E2M1+SP", "E2M1, minus zero read as 5: super-precision"),
    Codebook("fp4_e1m2", _mirrored(1.25, 1.5, 1.75, 2, 2.5, 3, 3.5), 4, "E1M2", "with a hole around zero"),
    Codebook("fp4_log", _mirrored(0.25, 0.5, 1, 2, 4, 8, 16), 4, "E3M0", "powers of two"),
    Codebook("apot4", _APOT4, 4, "APoT4", "one of {0, 1/2, 1/4, 1/16} plus one of {0, 1/8}, over 5/8"),
    Codebook("apot4-sp", (*_APOT4[:12], 0.5, 0.6, 0.8, 1), 4, "APoT4+SP", "APoT4, minus zero read as 0.5"),
    Codebook("en_25", (*_mirrored(
        0.063069, 0.138071, 0.227264, 0.333333, 0.459471, 0.609476, 0.787862,
    ), 1.0), 4, "", "exponential grid (2^(i/4) - 1) / 3"),
    Codebook("mokey", _mirrored(1, 2, 3, 4, 6, 8, 16), 4, "", "Mokey's integers"),
    Codebook("denorm4", (-7, -6, -5, -4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 5, 6), 4, "",
             "int4 with a half on either side of zero"),
    Codebook("nf3", (
        -1.0, -0.5350227084855379, -0.24693143181157517, 0.0, 0.18333748033548752, 0.3819939543209139,
        0.6229857417143423, 1.0,
    ), 3, "NF3", "normal quantiles"),
    Codebook("sf3_3", (
        -1.0, -0.3622475096628733, -0.15466881612248634, 0.0, 0.11383526480516333, 0.24607773854836362,
        0.43872699492795214, 1.0,
    ), 3, "SF3, v = 3", _STUDENT.format(3)),
    Codebook("sf3_4", (
        -1.0, -0.39278935395019254, -0.1705619364387109, 0.0, 0.1257725217978133, 0.26971116287994534,
        0.4717241438815071, 1.0,
    ), 3, "SF3, v = 4", _STUDENT.format(4)),
    Codebook("sf3_5", (
        -1.0, -0.41084770299806544, -0.1801188154332576, 0.0, 0.1329647268004446, 0.2838347036415534,
        0.49107557131011725, 1.0,
    ), 3, "SF3", _STUDENT.format(5)),
    Codebook("sf3_6", (
        -1.0, -0.4227024811287854, -0.18645957091951085, 0.0, 0.1377424733823289, 0.29316883983286,
        0.5037142212421039, 1.0,
    ), 3, "SF3, v = 6", _STUDENT.format(6)),
    Codebook("nf3_nz", (
        -1.0, -0.5840457615163138, -0.3225133196607414, -0.10387883073852357, 0.10387883073852357,
        0.3225133196607414, 0.5840457615163137, 1.0,
    ), 3, "", "normal quantiles, no zero"),
    Codebook("sf3_3_nz", (
        -1.0, -0.5015162581807956, -0.2628875575162947, -0.08299175634976376, 0.08299175634976376,
        0.2628875575162947, 0.5015162581807955, 1.0,
    ), 3, "", _STUDENT.format(3) + ", no zero"),
    Codebook("sf3_4_nz", (
        -1.0, -0.5238993613586714, -0.27862916172493263, -0.08844753653560009, 0.08844753653560009,
        0.27862916172493263, 0.5238993613586711, 1.0,
    ), 3, "", _STUDENT.format(4) + ", no zero"),
    Codebook("sf3_5_nz", (
        -1.0, -0.5368359642710748, -0.2878651877735525, -0.09166749796557234, 0.09166749796557234,
        0.2878651877735525, 0.5368359642710749, 1.0,
    ), 3, "", _STUDENT.format(5) + ", no zero"),
    Codebook("sf3_6_nz", (
        -1.0, -0.5452285431525636, -0.2939135955820373, -0.09378393351237442, 0.09378393351237442,
        0.2939135955820373, 0.5452285431525635, 1.0,
    ), 3, "", _STUDENT.format(6) + ", no zero"),
    Codebook("fp3_log", _mirrored(1, 2, 4), 3, "E2M0", "powers of two"),
)
# fmt: on

CATALOGUE: dict[str, Codebook] = {codebook.name: codebook for codebook in _ALL}

#: other names of the same formats, mostly the paper's
ALIASES: dict[str, str] = {
    "sf4": "sf4_5",
    "sf3": "sf3_5",
    "e2m1": "fp4_basic",
    "fp4_e2m1_ocp": "fp4_basic",
    "e2m1-ns": "fp4_no_sub",
    "e2m1-i": "fp4_e2m1",
    "e2m1-b": "fp4",
    "e2m1-sr": "fp4_range",
    "e2m1-sp": "fp4_prec2",
    "e1m2": "fp4_e1m2",
    "e3m0": "fp4_log",
    "e2m0": "fp3_log",
    "apot4_sp": "apot4-sp",
}
