"""`lutserve flops`: what a model costs, counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lutserve.errors import UserError


def flops(
    model: Annotated[str, typer.Argument(help="Alias (`lutserve models`), folder or hub id.")],
    recipe: Annotated[Path | None, typer.Option(help="Recipe file (JSON). Default: the model's own.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Length of the prompt. Default: 2048.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Keys that a decoded token attends to.")] = 1024,
    accounting: Annotated[
        str, typer.Option(help="exact, or seed: as the published mixed-precision tables count, 1024 tokens.")
    ] = "exact",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Count MACs, FLOPs, BOPs, bytes and table look-ups of a model; needs its config.json only."""
    from lutserve import recipe as recipes
    from lutserve.search import cost, seed

    config = _config(model)
    chosen = recipes.load(recipe) if recipe else recipes.from_model(config)
    if accounting == "exact":
        counts: dict[str, Any] = cost.account(config, chosen, tokens or 2048, context)
    elif accounting == "seed":
        counts = seed.account(config, chosen, tokens or 1024)
    else:
        raise UserError(f"--accounting {accounting}; allowed: exact, seed")
    if as_json:
        print(json.dumps(counts, indent=1))
    else:
        _show(counts)


def _config(model: str) -> dict[str, Any]:
    """The `config.json` of a model, without its weights."""
    from lutserve import models
    from lutserve.recipe import read_json

    resolved = models.resolve(model, progress=lambda line: print(line, file=sys.stderr))
    if Path(resolved).is_dir():
        return read_json(Path(resolved) / "config.json")
    from huggingface_hub import hf_hub_download

    try:
        return read_json(Path(hf_hub_download(resolved, "config.json")))
    except Exception as error:  # whatever the hub's client raises offline, for gated and for unknown models
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot get config.json of {resolved}: {reason}") from None


def _show(counts: dict[str, Any], prefix: str = "") -> None:
    """A line for each number, with its path."""
    for key, value in counts.items():
        if isinstance(value, dict):
            _show(value, f"{prefix}{key}.")
        else:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:,.6f}"
            print(f"{prefix}{key}: {value if isinstance(value, bool) else shown}")
