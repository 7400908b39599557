"""What a search finds on the embedded model, how well it predicts, how long it takes and how much memory.

    python -m lutserve.benchmarks.search cost --data FOLDER [-o out/search]
    python -m lutserve.benchmarks.search quality --data FOLDER [-o out/search]

`cost` runs the command `lutserve search` with `fisher` and eight candidates at 4.25 bits in a process of its
own, and a process that only imports what it imports. `quality` scores {int3, int4, int8} in groups of 64 by
every sensitivity and compares the recipes of each at 3.5 and 4.0 bits; int3 counts as the 3 bits that it
would take, although our kernels store four. FOLDER holds `c4_train_head1000.jsonl.gz` and
`wikitext2_validation.raw.gz`. Scores that are known are not measured again. Each writes one JSON record.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from scipy.stats import kendalltau, spearmanr
from torch import Tensor

from lutserve import env, formats, machine, models
from lutserve.quantizers import calibration, rtn
from lutserve.search import seed
from lutserve.search.allocate import Choice, Space
from lutserve.search.candidates import Candidate
from lutserve.search.operators import Function, Linear
from lutserve.search.precision import Precision
from lutserve.search.run import Settings, space_of
from lutserve.search.sensitivity import MEASURES, Scores, Task
from lutserve.search.sensitivity.task import Store
from lutserve.search.simulation import Simulation
from lutserve.search.verify import Examiner, Row, as_json

app = typer.Typer(no_args_is_help=True)
#: mean bits: of `cost`, of `quality`
BUDGET, BUDGETS = 4.25, (3.5, 4.0)
CANDIDATES = "int4,sf4_5,int4@128,sf4_5@128,sf4_5@32,int8,mix8,none"
IMPORTS = "import scipy.optimize, scipy.stats, torch, transformers; transformers.AutoModelForCausalLM"
Data = Annotated[Path, typer.Option(help="Folder with the evaluation data.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the record.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads to use.")]


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds that a command took, and the most memory that it held, in bytes; it must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


@app.command()
def cost(data: Data, threads: Threads = 2, output: Output = Path("out/search")) -> None:
    """Measure a whole search from the command line: its time, its memory, and the recipe that it finds."""
    output.mkdir(parents=True, exist_ok=True)
    cache = output / f"cache-{time.time_ns()}"
    recipe = output / "recipe.json"
    folder = Path(models.resolve(models.DEFAULT))
    environment = {"OMP_NUM_THREADS": str(threads), "LUTSERVE_DATA": str(data), "LUTSERVE_CACHE": str(cache)}
    command = ["search", str(folder), "--budget", f"bits={BUDGET}", "--candidates", CANDIDATES]
    command += ["--group-size", "64", "--data", "c4", "-o", str(recipe)]
    _, imports = measured([sys.executable, "-c", IMPORTS], environment)
    seconds, peak = measured([sys.executable, "-m", "lutserve.cli", *command], environment)
    report = json.loads(recipe.with_suffix(".report.json").read_text())
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    rows = {row["name"]: row for row in report["rows"]}
    others = {name: rows[name]["kl"] for name in ("uniform int4", "uniform sf4_5")}
    others["random, mean"] = fmean(row["kl"] for name, row in rows.items() if name.startswith("random"))
    write(
        "cost",
        output,
        {
            "threads": threads,
            "search": ["lutserve", *command[:1], models.DEFAULT, *command[2:-1], "recipe.json"],
            "seconds": round(seconds, 1),
            "peak_bytes": peak,
            "peak_bytes_of_imports": imports,
            "model_bytes_16_bit": size,
            "peak_over_imports_in_models": round((peak - imports) / size, 3),
            "found_over": {name: round(rows["found"]["kl"] / kl, 4) for name, kl in others.items()},
            **{key: report[key] for key in ("candidates", "windows", "agreement", "rows")},
        },
    )


class Nominal(Candidate):
    """An integer format in groups of columns that counts with its own bits, whatever it is stored in."""

    @cached_property
    def precision(self) -> Precision:
        """Its bits, with a 16-bit scale a group."""
        return Precision(formats.get(self.method).bits, 16, 16, self.group_size)

    @cached_property
    def key(self) -> str:
        """Name for stored scores."""
        return f"nominal:{self.method}:{self.group_size}"

    @property
    def rounds_weights_only(self) -> bool:
        """Whether its error is that of the weights alone."""
        return True

    def weight(self, weight: Tensor) -> Tensor:
        """The weight [N, K] rounded, fp32."""
        return rtn(weight, self.method, self.group_size).dequantize()

    def replacement(self, operator: Linear) -> Function:
        """A linear layer with the rounded weight."""
        weight = self.weight(operator.weight)
        return operator.by(lambda x: x @ weight.T)


@app.command()
def quality(data: Data, threads: Threads = 1, output: Output = Path("out/search")) -> None:
    """Compare sensitivities: how each ranks layers, and what its recipes do to held-out text."""
    torch.set_num_threads(threads)
    os.environ["LUTSERVE_DATA"] = str(data)
    folder = Path(models.resolve(models.DEFAULT))
    seen = calibration.windows("c4", folder, 1, 192)
    unseen = calibration.windows("wikitext2", folder, 2, 192)
    simulation = Simulation(folder)
    candidates = [Nominal(name, 64) for name in ("int3", "int4", "int8")]
    space = space_of(simulation, Settings(candidates, {"bits": 4.0}))
    scores: dict[str, Scores] = {}
    for name, measure in MEASURES.items():
        store = Store(env.cache_dir() / "search" / f"benchmark-{name}-{simulation.digest()[:16]}.jsonl")
        start = time.perf_counter()
        task = Task(simulation, space.units, space.candidates, seen, store)
        scores[name] = measure(task)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    rows: list[Row] = []
    for budget in BUDGETS:
        chosen = {name: space.best(scores[name], {"bits": budget})[0] for name in scores}
        chosen |= {f"random {i}": space.random({"bits": budget}, i) for i in range(4)}
        if budget == 4:
            chosen["seed rule as published"] = published(simulation, space, scores["seed-mpl"])
        examiner = Examiner(simulation, space, scores["kl"], {"bits": budget}, unseen)
        rows += [examiner.row(f"{budget:g}: {name}", choice) for name, choice in chosen.items()]
    for name, choice in space.uniform({"bits": 16.0}).items():
        rows.append(Examiner(simulation, space, scores["kl"], {"bits": 16.0}, unseen).row(name, choice))
    additive = [row for row in rows if row.kl > 0]
    write(
        "quality",
        output,
        {
            "threads": threads,
            "text": "scores: C4, 192 tokens; KL: WikiText-2 validation, 2 windows of 192 tokens",
            "against_isolated_kl": {name: ranks(scores[name], scores["kl"]) for name in scores},
            "tau_of_summed_kl": float(
                kendalltau([row.predicted for row in additive], [row.kl for row in additive]).statistic
            ),
            "rows": as_json(rows),
        },
    )


def published(simulation: Simulation, space: Space, scores: Scores) -> Choice:
    """The published rule at 4 bits: a quarter of the blocks, those of least distortion, get 3 bits."""
    # The scores are linear in missing bits and in each layer's share of its block.
    distortion = [0.0] * simulation.arch.layers
    for unit, row in scores.items():
        distortion[simulation.decoder[unit]] += row["int4"]
    bits = seed.block_bits(distortion, 4, 75)
    names = {3: "int3", 4: "int4"}
    return {
        unit: next(c for c in space.candidates[unit] if c.name == names[bits[simulation.decoder[unit]]])
        for unit in space.units
    }


def ranks(scores: Scores, isolated: Scores) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation with measured isolated KL by format, and the ratio of the sums."""
    found = {}
    for name in ("int3", "int4"):
        own, kl = ([row[name] for row in table.values()] for table in (scores, isolated))
        found[name] = {"spearman": float(spearmanr(own, kl).statistic), "sum_ratio": sum(own) / sum(kl)}
    return found


def write(name: str, output: Path, facts: dict[str, Any]) -> None:
    """Write the record of one command."""
    command = ["python", "-m", "lutserve.benchmarks.search", *sys.argv[1:]]
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"search-{name}_{datetime.now():%Y-%m-%dT%H-%M-%S}.json"
    path.write_text(json.dumps(machine.collect() | {"command": command} | facts, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    app()
