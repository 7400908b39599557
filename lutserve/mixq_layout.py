"""MixQ's own checkpoints: which tensors a layer has, and what recipe serves a published folder.

Of a layer X such a folder holds, in safetensors files,

    X.weight       int8 [N, K], or uint8 [N, K / 2]: int4 in two's complement, even columns in the low nibble
    X.scale_col    [1, N], any floating dtype
    X.weight_cache [N, S] and X.ind int32 [S], where it has outlier columns: their weights, their places

The SC'24 release calls the first one q_weight; later releases have under that name, with q_scale_col, a
second copy for their own GEMV, which is not read. Both put `quant_config.json` beside the weights: w_bit (or
bits) 8 or 4, version MIX. Source: github.com/Qcompiler, MIXQ and vllm-mixed-precision.
`lutserve quantize` writes the same tensors, with fp32 scales, for the methods in WRITTEN.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from lutserve.errors import UserError
from lutserve.recipe import Recipe, parse, read_json

CODES, SCALE, KEPT, PLACES = "weight", "scale_col", "weight_cache", "ind"
#: the codes' name in the first release
FIRST_CODES = "q_weight"
#: what later releases have besides, for their own kernels
UNUSED = ("q_weight", "q_scale_col")
CONFIG = "quant_config.json"
#: methods that `lutserve quantize` writes in this layout
WRITTEN = ("int8", "mix8", "mix4", "quik4")


class Stored(NamedTuple):
    """What a folder holds of one layer."""

    #: name of the codes
    codes: str
    #: of the weight's integers, 8 or 4
    bits: int
    #: outlier columns
    columns: int
    #: tensors that nobody reads
    unused: tuple[str, ...]


@cache
def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype ("I8", "F16", ...) and shape of every tensor of a folder; UserError for a broken file."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  (no mapping: iterating it does not work)
                    part = handle.get_slice(name)
                    found[name] = (part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {file}: {error}") from None
    return found


def stored(folder: Path, layer: str) -> Stored:
    """Return what a folder holds of a layer, by the checkpoint's name of it.

    Raises:
        UserError: it is not in this layout.

    """
    found = headers(folder)
    codes = CODES if f"{layer}.{CODES}" in found else FIRST_CODES
    dtype, shape = found.get(f"{layer}.{codes}", ("nothing", ()))
    _, scale = found.get(f"{layer}.{SCALE}", ("", ()))
    if dtype not in ("I8", "U8") or len(shape) != 2 or scale != (1, shape[0]):
        raise UserError(
            f"{folder}: {layer} has {dtype} {list(shape)} with scales {list(scale)}; MixQ's layers have int8 "
            "[N, K] or uint8 [N, K / 2] with scales [1, N] (weight-only layers are not read)"
        )
    _, kept = found.get(f"{layer}.{KEPT}", ("", (shape[0], 0)))
    _, places = found.get(f"{layer}.{PLACES}", ("", (0,)))
    if kept != (shape[0], *places):
        raise UserError(f"{folder}: {layer}.{KEPT} is {list(kept)} but {PLACES} is {list(places)}")
    unused = tuple(name for name in UNUSED if name != codes and f"{layer}.{name}" in found)
    return Stored(codes, 8 if dtype == "I8" else 4, places[0], unused)


def recipe_of(folder: Path) -> Recipe | None:
    """Return the recipe that serves a published folder; None where there is no `quant_config.json` of MixQ's.

    Raises:
        UserError: the folder says that it is MixQ's but cannot be served.

    """
    path = folder / CONFIG
    config = read_json(path) if path.is_file() else {}
    version = config.get("version")
    if version == "QUIK":
        raise UserError(
            f"{path}: QUIK as MixQ's repository ports it is not served; make a folder with "
            "`lutserve quantize MODEL --method quik4`"
        )
    if version != "MIX":
        return None
    bits = config.get("w_bit", config.get("bits"))
    if bits not in (4, 8):
        raise UserError(f"{path}: w_bit is {bits!r}; MixQ's checkpoints have 8 or 4")
    if not headers(folder):
        raise UserError(
            f"{folder} has no weights in safetensors files, and no other kind is loaded; convert its "
            "pytorch_model.bin"
        )
    group = {"method": f"mix{bits}", "group_size": -1, "stored": True}
    return parse({"config_groups": {"default": group}}, str(path))
