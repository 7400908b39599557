"""What `lutserve quantize` is asked to do, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lutserve import formats, methods
from lutserve.errors import UserError
from lutserve.formats import Codebook
from lutserve.mixq_layout import WRITTEN
from lutserve.recipe import Recipe, parse

ALGORITHMS = ("rtn", "gptq", "awq", "smoothquant")
_INTEGER_ALGORITHMS = {
    "int8": ("rtn", "smoothquant"),
    "mix8": ("rtn",),
    "mix4": ("rtn",),
    "quik4": ("gptq",),
}


@dataclass(frozen=True)
class Settings:
    """Everything that the result depends on beside the model and the calibration text.

    method: a format of at most 16 values; what follows a `+` is about activations, and only written into
        the configuration. Or one of `mixq_layout.WRITTEN`, integers by rows, or of `methods.ADAPTIVE`.
    algo: rtn, gptq, awq or smoothquant; int8 takes rtn and smoothquant, quik4 gptq, mix8 and mix4 rtn.
    group_size: columns that share a scale; -1 for whole rows, which integers by rows always have.
    ignore: layers that stay in 16 bit: names, last parts of names, or `re:` and a regular expression.
    mse: rtn, smoothquant: search the clip ratio of each layer.
    full_range: integers, rtn, smoothquant: use all codes.
    act_order, damping, block_size: gptq. With act_order groups stay groups of neighbouring columns.
    alpha: smoothing exponent; default 0.5 for smoothquant and none for the others.
    samples, length: calibration windows and tokens in each.
    layers: a recipe instead of method, group_size and ignore; what it gives a 4-bit format is quantised, the
        rest of it is done while the result is loaded.

    UserError for values that are not allowed or do not go together.
    """

    method: str = ""
    algo: str = "rtn"
    group_size: int = 128
    ignore: tuple[str, ...] = ("lm_head",)
    mse: bool = False
    full_range: bool = False
    act_order: bool = True
    damping: float = 0.01
    block_size: int = 128
    alpha: float | None = None
    samples: int = 128
    length: int = 512
    layers: Recipe | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            self._check_recipe()
        elif not self.integers and not self.adaptive and methods.get(self.method).family != "codebook":
            raise UserError(
                f"{self.method} is quantised while it is loaded, not before; give a 4-bit format or one of "
                f"{', '.join((*methods.ADAPTIVE, *WRITTEN))}"
            )
        if self.algo not in ALGORITHMS:
            raise UserError(f"unknown algorithm {self.algo!r}; allowed: {', '.join(ALGORITHMS)}")
        if self.integers:
            self._check_integers()
        if self.group_size != -1 and (self.group_size < 1 or self.group_size % 8):
            raise UserError(f"--group-size {self.group_size}; allowed: multiples of 8, or -1 for whole rows")
        if self.algo in ("gptq", "awq") and (self.mse or self.full_range):
            option = "--mse" if self.mse else "--full-range"
            raise UserError(f"{option} goes with rtn and smoothquant; {self.algo} chooses its own scales")
        if self.adaptive and (self.algo != "rtn" or self.mse or self.full_range or self.alpha is not None):
            raise UserError(
                f"{self.method} rounds to nearest and chooses formats; --algo rtn alone goes with it"
            )
        if self.full_range and not self.codebook.integer:
            raise UserError(f"--full-range is for integers; {self.codebook.name} has fixed values")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha {self.alpha}; allowed: 0 to 1")
        if self.damping < 0 or self.block_size < 1:
            raise UserError("--damping must be 0 or more, --block-size 1 or more")
        if self.samples < 1 or self.length < 2:
            raise UserError("--samples must be 1 or more, --sequence-length 2 or more")
        assert self.recipe.quantizes

    def _check_recipe(self) -> None:
        if self.full_range:
            raise UserError("--full-range is for integers alone; a recipe has several formats")
        groups = self.recipe.config_groups.values()
        if not any(group.stored for group in groups):
            raise UserError("the recipe has no 4-bit format, so there is nothing to do before it is served")
        offline = {group.method for group in groups if group.arithmetic.offline}
        if offline:
            raise UserError(f"the recipe has {', '.join(offline)}, which only --method makes, for all layers")

    def _check_integers(self) -> None:
        allowed = _INTEGER_ALGORITHMS[self.method]
        if self.algo not in allowed:
            raise UserError(f"{self.method} goes with --algo {' or '.join(allowed)}, not {self.algo}")
        if self.mse or self.full_range:
            raise UserError(f"--mse and --full-range are for 4-bit formats, not for {self.method}")
        if self.group_size not in (-1, Settings.group_size):
            raise UserError(f"{self.method} has one scale a row; leave --group-size out")

    @property
    def integers(self) -> bool:
        """Whether the weights are integers by rows, in MixQ's layout."""
        return self.method in WRITTEN

    @property
    def adaptive(self) -> bool:
        """Whether every block takes the 4-bit float that suits it best on the calibration text."""
        return self.method in methods.ADAPTIVE

    @property
    def codebook(self) -> Codebook:
        """The format of the weights, where they have one."""
        return formats.get(methods.get(self.method).format)

    @property
    def recipe(self) -> Recipe:
        """What the result's `config.json` carries."""
        if self.layers is not None:
            groups = {
                name: group.model_copy(update={"stored": group.arithmetic.family == "codebook"})
                for name, group in self.layers.config_groups.items()
            }
            return self.layers.model_copy(update={"config_groups": groups})
        size = -1 if self.integers else self.group_size
        group = {"method": self.method, "group_size": size, "stored": True}
        return parse({"config_groups": {"default": group}, "ignore": self.ignore}, "options")

    @property
    def smoothing(self) -> float | None:
        """Exponent of SmoothQuant, or None for none."""
        if self.alpha is None and self.algo == "smoothquant":
            return 0.5
        return self.alpha

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is needed."""
        found = self.algo != "rtn" or self.smoothing is not None or self.adaptive
        return found or (self.layers is None and methods.get(self.method).outliers)

    def to_json(self) -> dict[str, Any]:
        """All fields that have a say; the codebook by its values, whatever its file is called."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.layers is not None:
            data["layers"] = self.layers.to_config()
            unused = {"method", "group_size", "ignore"}
        else:
            data["ignore"] = list(self.ignore)
            if not self.integers and not self.adaptive:
                data["values"] = list(self.codebook.values)
            unused = {"layers"}
        unused |= set() if self.calibrated else {"samples", "length"}
        return {key: value for key, value in data.items() if key not in unused}
