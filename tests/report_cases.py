"""A folder of results for the tests of `lutserve report`: small, with every kind of record, and odd."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lutserve.quantizers.columns import Columns, save

RECORDS = Path(__file__).parents[1] / "benchmarks/results"
#: a name that must not become markup
ODD = "m<b>&'\"</script><script>document.title='broken'</script>"
MODELS = ("llama3-8b", ODD)
#: recipe -> flags, bits
RECIPES: dict[str, tuple[list[str], float | None]] = {
    "exact": (["--method", "none", "--dtype", "bfloat16"], 16.0),
    "mix8": (["--method", "mix8", "--dtype", "bfloat16"], 8.1),
    "nf4": (["--method", "nf4", "--dtype", "bfloat16"], 4.125),
    "nli-4": (["--lut", "nli-4", "--dtype", "bfloat16"], None),
}
#: model, recipe -> piqa, lambada, perplexity
VALUES = {
    (MODELS[0], "exact"): (0.80, 0.70, 6.0),
    (MODELS[0], "mix8"): (0.80, 0.695, 6.03),
    (MODELS[0], "nf4"): (0.79, 0.67, 6.6),
    (MODELS[0], "nli-4"): (0.81, 0.70, 6.0),
    (MODELS[1], "exact"): (0.5, 0.25, 20.0),
    (MODELS[1], "mix8"): (0.49, 0.24, math.inf),
    (MODELS[1], "nf4"): (0.45, 0.0, math.nan),
}
PUBLISHED = 0.791
MACHINE = {
    "lutserve": "0.1.0",
    "git": "0123456789abcdef",
    "python": "3.11",
    "machine": {"cpu": "A <CPU>", "cores": 2},
    "versions": {"torch": "2.13.0"},
}


def cell(model: str, recipe: str, task: str, metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    """One line of cells.jsonl."""
    flags, bits = RECIPES[recipe]
    return {
        "cell": f"{model} {recipe} {task}",
        "preset": "study",
        "model": model,
        "recipe": recipe,
        "flags": flags,
        "task": task,
        "metrics": metrics,
        "n": 100,
        "seconds": 1.5,
        "bits": bits,
        "published": {},
        "results": None,
        "samples": None,
        "baseline": "exact",
        "provenance": MACHINE | {"command": ["lutserve", "eval", "it's"], "time": "2026-11-24T10:00:00"},
    } | more


def cells() -> list[dict[str, Any]]:
    """All cells; the last recipe has no cell for the second model."""
    found = []
    for (model, recipe), (piqa, lambada, ppl) in VALUES.items():
        published = {"acc": PUBLISHED} if recipe == "nf4" else {}
        accuracy = {"acc": {"value": piqa, "stderr": 0.01}, "acc_norm": {"value": piqa + 0.01}}
        found.append(cell(model, recipe, "piqa", accuracy, published=published))
        found.append(cell(model, recipe, "lambada_openai", {"acc": {"value": lambada}}))
        scores = {"ppl": {"value": ppl}, "nll": {"value": math.log(ppl)}}
        found.append(cell(model, recipe, "ppl:wikitext2", scores))
    return found


#: server of the benchmark -> speed relative to the first
SPEEDS = {"bf16": 1.0, "w8": 1.8, "four bits": 2.1, "other checkpoint": 3.0}


def bench() -> dict[str, Any]:
    """A record of `lutserve bench` whose servers are called otherwise than the recipes."""
    shared = ["--max-model-len", "2048", "--model"]
    serve = {
        "bf16": [*shared, "llama-1b", "--method", "none", "--linear16", "vllm"],
        "w8": [*shared, "llama-1b", "--method", "mix8"],
        "four bits": [*shared, "llama-1b", "--method=nf4"],
        "other checkpoint": [*shared, "llama-1b-w8a8", "--method", "none"],
    }
    apart = {"mean": 0.1, "largest": 0.3, "equal_tokens": 5}
    setting = MACHINE | {"baseline": "bf16", "serve": serve, "agreement": {"w8": apart}}
    summary = [
        {"workload": work, "provider": name, "median": 10 * ratio, "min": 9 * ratio, "max": 11 * ratio}
        | {"ratio": ratio, "ratio_min": 0.9 * ratio, "ratio_max": 1.1 * ratio}
        for work in ("decode-1", "prefill")
        for name, ratio in SPEEDS.items()
    ]
    return {"lutserve": setting, "summary": summary, "runs": []}


def write_cells(folder: Path, lines: list[dict[str, Any]]) -> Path:
    """Write cells.jsonl."""
    file = folder / "cells.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def fill(folder: Path) -> Path:
    """Fill a folder with cells and records, and return it."""
    write_cells(folder, cells())
    for name in (
        "accuracy-smollm2",
        "attention-zen4",
        "linears-zen3",
        "memory-llama-4-layers",
        "ranges-smollm2",
    ):
        shutil.copy(RECORDS / f"{name}.json", folder)
    layers = {
        f"model.layers.{i}.{kind}": {"columns": 64, "weight_sqnr_db": 15 + i + len(kind) / 10}
        for i in range(3)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    }
    (folder / "nf4").mkdir()
    report = {"settings": {"method": "nf4"}, "layers": layers}
    (folder / "nf4/quantization_report.json").write_text(json.dumps(report))
    served = [
        {
            "layer": f"model.layers.{i}.mlp.down_proj",
            "group": "down_proj",
            "method": "mix8",
            "kernel": "cpu/avx2",
            "bits": 8.1,
            "weights": 10,
            "outlier_columns": 4 * i,
            "outlier_slots": list(range(4 * i)),
            "outlier_misses": 0,
        }
        for i in range(3)
    ]
    (folder / "layers.json").write_text(json.dumps(served))
    inputs = [
        Columns((f"model.layers.{i}.mlp.down_proj",), torch.tensor([1.0, 6.0, 6.5 + i]), torch.zeros(3))
        for i in range(3)
    ]
    save(folder / "calibration.safetensors", inputs, {"command": "lutserve calibrate"})
    save_file({"w": torch.zeros(1)}, folder / "other.safetensors")
    (folder / "bench.json").write_text(json.dumps(bench()))
    (folder / "other.json").write_text('{"a": 1}')
    groups = {
        "a": {"targets": ["model.layers.0.self_attn.qkv_proj", "layers.2.mlp.down_proj"], "method": "mix8"},
        "b": {"targets": ["model.layers.1.mlp.down_proj"], "method": "nf4", "group_size": 64},
    }
    recipe = {"quant_method": "lutserve", "config_groups": groups, "luts": {"silu": "nli-4"}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    rows = [
        {"name": name, "bits": bits, "bytes": 1e6, "bops": 1e9, "predicted": kl, "kl": kl, "perplexity": 20.0}
        for name, bits, kl in (("found", 4.5, 0.2), ("uniform nf4", 4.25, 0.3), ("random 0", 4.5, 0.4))
    ]
    scores = {f"model.layers.{i}.mlp.down_proj": {"nf4": 0.1 * i, "int8": 0.01} for i in range(3)}
    search = {"schema": "lutserve-search-1", "sensitivity": "kl", "rows": rows, "sweep": [], "scores": scores}
    (folder / "recipe.report.json").write_text(json.dumps(search))
    return folder
