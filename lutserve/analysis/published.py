"""What arXiv 2405.03103 (ICML 2024) reports about its formats, as data under our names for them.

None stands for a number that we do not have.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mac:
    """A multiply-accumulate unit in TSMC 28 nm, whose accumulator holds 256 products without loss.

    accumulator_bits; multiplier, accumulator: areas in square micrometres; microwatts;
    overhead: what a chip of such units grows by against one of INT4 units, in percent.
    """

    accumulator_bits: int
    multiplier: float
    accumulator: float
    microwatts: float
    overhead: float

    @property
    def area(self) -> float:
        """Both parts, in square micrometres."""
        return self.multiplier + self.accumulator


MACS: dict[str, Mac] = {
    "int4": Mac(16, 75.3, 85.4, 48.5, 0.0),
    "int5": Mac(18, 106.6, 97.0, 59.8, 17.7),
    "fp4_e2m1": Mac(20, 119.1, 109.1, 59.7, 4.2),
    "fp4": Mac(23, 137.9, 131.0, 67.9, 6.7),
    "fp4_basic": Mac(17, 79.7, 90.7, 49.6, 0.6),
    "fp4_range": Mac(18, 96.8, 94.5, 53.5, 1.9),
    "fp4_prec2": Mac(19, 121.5, 96.5, 54.6, 3.6),
    "fp4_log": Mac(22, 98.0, 119.7, 59.5, 3.6),
    "apot4": Mac(16, 96.2, 85.4, 47.2, 1.3),
    "apot4-sp": Mac(16, 99.7, 85.4, 45.5, 1.5),
}

MODELS = ("Mistral-7B", "OPT-1B", "OPT-6.7B", "LLaMA2-7B", "Phi-2", "BLOOM-7B", "Yi-6B")

#: mean relative change of accuracy in percent over LAMBADA, HellaSwag, WinoGrande, PIQA, BoolQ and ARC-c, for
#: weights and activations in the format (W4A4, groups of 128), by MODELS, without and with SmoothQuant
W4A4: dict[str, dict[str, tuple[float | None, ...]]] = {
    "plain": {
        "nf4": (-4.49, -11.02, -4.27, -2.65, -8.0, -8.5, -10.61),
        "sf4_5": (-3.98, -10.95, -4.76, -2.82, -6.79, -7.39, -9.17),
        "int4": (-8.74, -20.72, -9.44, -6.27, -16.19, -17.94, -24.37),
        "fp4_e2m1": (-8.46, -16.0, -5.62, -6.11, -15.66, -12.4, -17.97),
        "fp4": (None, None, None, -7.47, -17.82, -14.84, -21.45),
        "fp4_basic": (None, -11.09, -4.16, -2.68, -8.41, None, -11.52),
        "fp4_range": (None, -11.1, -6.92, None, -8.53, None, -31.46),
        "fp4_prec2": (None, -12.03, None, None, -7.25, None, -10.3),
        "fp4_log": (-8.4, -10.74, -8.19, -10.66, -15.25, -6.2, -10.56),
        "apot4": (-5.46, -12.78, -4.62, -3.74, -9.62, -10.2, -12.59),
        "apot4-sp": (-5.68, -12.02, -4.85, -3.5, -8.48, -9.59, -12.81),
    },
    "smoothquant": {
        "nf4": (-3.75, -9.66, -1.77, -3.6, -6.98, -4.49, -5.46),
        "sf4_5": (-2.86, -10.02, -1.39, -3.45, -5.86, -2.19, -3.76),
        "int4": (-7.09, -10.93, -3.6, -6.35, -19.97, -11.58, -11.52),
        "fp4_e2m1": (-7.2, -11.17, -2.74, -5.6, -17.27, -8.64, -10.32),
        "fp4": (-7.71, -10.1, -3.59, -6.63, -22.07, -10.74, -13.05),
        "fp4_basic": (-3.77, -10.71, -1.34, -3.44, -7.57, -4.23, None),
        "fp4_range": (None, -10.49, -5.45, None, -8.02, None, -26.38),
        "fp4_prec2": (None, -11.87, -1.18, -3.24, -7.98, None, None),
        "fp4_log": (-8.01, -10.75, -6.39, -9.13, -13.05, -6.71, -9.77),
        "apot4": (-4.54, -9.36, -2.1, -4.23, -9.82, -6.34, -6.4),
        "apot4-sp": (-4.55, -9.76, -1.65, -4.19, -8.2, -5.63, -6.2),
    },
}

SWEEP_MODELS = ("OPT-125M", "OPT-1B", "Phi-2", "LLaMA2-7B")
#: LAMBADA perplexity and accuracy (percent) of weights in SF4 by degrees of freedom, for each of SWEEP_MODELS
SWEEP: dict[str, tuple[tuple[float | None, float | None], ...]] = {
    "none": ((26.02, 37.90), (6.64, 57.89), (5.52, 62.57), (3.40, 73.92)),
    "nf4": ((33.77, 34.06), (7.21, 56.43), (6.47, 60.94), (3.71, 71.98)),
    "sf4_3": ((29.24, None), (None, None), (None, None), (None, 72.38)),
    "sf4_4": ((27.21, 37.30), (6.95, 57.50), (6.26, 61.19), (3.52, 72.54)),
    "sf4_5": ((25.69, 38.56), (6.90, 57.83), (6.33, 61.56), (3.60, 72.42)),
    "sf4_6": ((25.80, 37.90), (6.70, 58.59), (6.34, 60.92), (3.69, 71.82)),
    "sf4_7": ((29.22, 36.43), (6.81, 58.08), (6.48, 60.33), (3.69, 71.80)),
}
