"""The model card of a quantised folder."""

from __future__ import annotations

import shlex
from statistics import fmean
from typing import Any

import lutserve
from lutserve.quantizers.settings import Settings


def command(model: str, output: str, settings: Settings, text: str) -> str:
    """The command line that makes the folder, with only the options that differ from their defaults."""
    words, algo = ["lutserve", "quantize", model], ["--algo", settings.algo]
    if settings.layers is None:
        words += ["--method", settings.method, *algo]
        words += [] if settings.integers else ["--group-size", str(settings.group_size)]
    else:
        words += ["--recipe", "recipe.json", *algo]
    options = {
        "--alpha": (settings.alpha, Settings.alpha),
        "--damping": (settings.damping, Settings.damping),
        "--block-size": (settings.block_size, Settings.block_size),
        "--ignore": (",".join(settings.ignore), ",".join(Settings.ignore)),
    }
    if settings.calibrated:
        words += ["--calibration", text]
        options["--samples"] = (settings.samples, Settings.samples)
        options["--sequence-length"] = (settings.length, Settings.length)
    for option, (value, usual) in options.items():
        words += [option, str(value)] if value != usual else []
    flags = {
        "--mse": settings.mse,
        "--full-range": settings.full_range,
        "--no-act-order": settings.algo == "gptq" and not settings.act_order,
    }
    words += [flag for flag, given in flags.items() if given]
    return shlex.join([*words, "-o", output])


def text(model: str, output: str, settings: Settings, calibration: str, layers: dict[str, Any]) -> str:
    """The README.md: what it is, how it was made, how to serve it, the error of each layer.

    Args:
        model: name of the original model.
        output: name of the folder.
        settings: how it was made.
        calibration: name of the calibration text.
        layers: the report, by layer.

    """
    stored = [group for group in settings.recipe.config_groups.values() if group.stored]
    books = {group.codebook.name: group.codebook for group in stored if group.arithmetic.family == "codebook"}
    name = ", ".join(books) or settings.method
    share = "a row" if settings.group_size == -1 else f"for {settings.group_size} weights"
    values = []
    for book in books.values():
        values += ["Codebook: " + ", ".join(f"{value:.9g}" for value in book.values) + ".", ""]
    if settings.integers:
        about = f"The linear layers of {model} as integers, one fp32 scale a row, in the layout of MixQ."
    elif settings.adaptive:
        form = f"4-bit floats, a format for each block of 64 rows and a group, one fp16 scale {share}"
        about = f"The linear layers of {model} as {form}."
        values = ["Formats: E3M0, E2M1 and E1M2, chosen by the output's error on the calibration text.", ""]
    elif settings.layers is None:
        about = f"The linear layers of {model} as indices into a codebook, one fp32 scale {share}."
    else:
        about = f"Linear layers of {model} as indices into codebooks, as the recipe in config.json says."
    bits = 8 if name in ("int8", "mix8") else 4
    measured = all("output_sqnr_db" in layer for layer in layers.values())
    lines = [
        "---",
        "library_name: vllm",
        f"tags: [lutserve, {settings.algo}, {bits}-bit]",
        "---",
        f"# {model}, {name} by {settings.algo}",
        "",
        f"{about} Made with lutserve {lutserve.__version__}:",
        "",
        "```console",
        f"$ {command(model, output, settings, calibration)}",
        "```",
        "",
        f"`lutserve serve {output}` serves it; so does `vllm serve {output}` where lutserve is installed.",
        "",
        *values,
        "## Measured error",
        "",
        "Signal-to-quantisation-noise ratio in dB of each weight"
        + (", and of each layer's output on the calibration text." if measured else "."),
        "",
        "| layer | weight |" + (" output |" if measured else ""),
        "|---|---|" + ("---|" if measured else ""),
    ]
    keys = ["weight_sqnr_db"] + (["output_sqnr_db"] if measured else [])
    for layer_name, layer in layers.items():
        lines.append(f"| {layer_name} | " + " | ".join(f"{layer[key]:.2f}" for key in keys) + " |")
    means = [fmean(layer[key] for layer in layers.values()) for key in keys]
    lines.append("| mean | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return "\n".join(lines) + "\n"
