"""What a served model takes in memory: while its weights load, and afterwards.

    python -m lutserve.benchmarks.memory [--layers 4] [-o out/memory]

vLLM's own loader in a process of its own for each method; no server, no KV cache. Resident memory as the
kernel counts it, mapped files included. Writes one JSON record and prints one table.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from lutserve import machine
from lutserve.benchmarks.models import default_folder, random_llama
from lutserve.console import for_tables

METHODS = ("none", "nf4", "mix8")


def load(model: str, method: str) -> dict[str, Any]:
    """Load a model in this process, which must be fresh, and return what it takes, in bytes."""
    from lutserve import compat, recipe
    from lutserve.quant_methods.config import REPORTS

    config = recipe.from_flags(method=method).to_config()
    arguments = compat.EngineArgs(
        model,
        quantization="lutserve",
        additional_config={"lutserve": config},
        enforce_eager=True,
        max_model_len=256,
    )
    vllm_config = arguments.create_engine_config()
    # As vLLM's CPU worker has it; without one, torch raises.
    torch.accelerator.empty_cache = lambda: None
    store = tempfile.mkdtemp()
    with compat.set_current_vllm_config(vllm_config):
        compat.init_distributed_environment(1, 0, f"file://{store}/store", 0, backend="gloo")
        compat.initialize_model_parallel(1)
        _trim()
        # VmHWM begins anew.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        loaded = compat.get_model(vllm_config=vllm_config)
        peak = _status("VmHWM") - before
        _trim()
        after = _status("VmRSS") - before
    shutil.rmtree(store)
    others = sum(t.nbytes for name, t in loaded.named_parameters() if "_proj" not in name)
    weights = sum(layer.weights for layer in REPORTS.layers.values())
    return {
        "method": method,
        "peak_bytes": peak,
        "resident_bytes": after,
        "bytes_outside_linears": others,
        "linear_weights": weights,
        "resident_bits_a_weight": round(8 * (after - others) / weights, 3),
    }


def _status(key: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def _trim() -> None:
    """Give what is freed back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main(
    methods: Annotated[str, typer.Option(help="Methods, comma separated.")] = ",".join(METHODS),
    layers: Annotated[int, typer.Option(help="Decoder blocks of the random model.")] = 16,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the record.")] = Path(
        "out/memory"
    ),
) -> None:
    """Load a random Llama by each method, write the record, print the table."""
    folder = random_llama(default_folder(f"llama-{layers}-layers"), layers=layers)
    shards = [file.stat().st_size for file in folder.glob("*.safetensors")]
    rows = []
    for method in methods.split(","):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(load, str(folder), method).result())
    record = machine.collect() | {
        "command": ["python", "-m", "lutserve.benchmarks.memory", *sys.argv[1:]],
        "model": f"random Llama, hidden size 2048, {layers} layers",
        "checkpoint_bytes": sum(shards),
        "largest_shard_bytes": max(shards),
        "results": rows,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"memory_{datetime.now():%Y-%m-%dT%H-%M-%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    table = Table("method", "peak while loading, MB", "resident, MB", "resident bits a weight", box=None)
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['resident_bytes'] / 1e6:.0f}",
            f"{row['resident_bits_a_weight']:.2f}",
        )
    for_tables().print(table)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
