"""The GPU path in less than ten minutes: right or wrong, how near to the ceilings, what models gain.

    python -m lutserve.benchmarks.gpu [-o out/gpu] [--numerics 190] [--operators 150] [--models 230]

Three stages, each with its seconds, 0 to skip it: `numerics`, every kernel against the torch reference on
the device (tests/gpu, needs pytest); `operators`, timed against vLLM's and cuBLAS (`gpu_operators`);
`models`, whole ones (`gpu_models`). Writes one JSON record, anew after every stage and model, so that a run
that is cut off keeps what it has. Status 1: something failed or was not right.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.table import Table

from lutserve import machine
from lutserve.benchmarks import gpu_models
from lutserve.benchmarks.record import write
from lutserve.benchmarks.stage import Stage, lines_of
from lutserve.console import for_tables

TESTS = Path(__file__).parent.parent / "tests" / "gpu"
Seconds = Annotated[int, typer.Option(min=0, help="Seconds for this stage, 0 to skip it.")]


def check_numerics(seconds: float, log: Path) -> dict[str, Any]:
    """Run tests/gpu's numerics on the device; return pytest's summary, and what failed."""
    files = [str(path) for path in sorted(TESTS.glob("numerics_*.py"))]
    if not files:
        return {"failed": f"no tests in {TESTS}; run from the source tree"}
    stage = lines_of([sys.executable, "-m", "pytest", "-q", "--tb=line", *files], seconds, log)
    broken = [line for line in stage.lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": stage.lines[-1:], "broken": broken} | _failure(stage)


def time_operators(seconds: float, log: Path) -> dict[str, Any]:
    """Run `gpu_operators`; return ceilings and cases as far as it came."""
    stage = lines_of([sys.executable, "-m", "lutserve.benchmarks.gpu_operators"], seconds, log)
    head, *cases = stage.records or [{}]
    found: dict[str, Any] = head | {"cases": cases} | _failure(stage)
    return found


def _failure(stage: Stage) -> dict[str, str]:
    return {"failed": stage.failed} if stage.failed else {}


def model_targets(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the speed of each model's configurations relative to the baseline, beside the target if any."""
    base = {one["model"]: one for one in found if one.get("configuration") == gpu_models.BASELINE}
    return [
        {
            "case": f"{one['model']}, {workload}",
            "call": one["configuration"],
            "baseline": gpu_models.BASELINE,
            "at_least": gpu_models.LUT_TARGET if one["configuration"] == gpu_models.LUTS else None,
            "reached": round(rate["median"] / base[one["model"]]["tokens_per_s"][workload]["median"], 3),
        }
        for one in found
        if "tokens_per_s" in one and one is not base.get(one["model"])
        for workload, rate in one["tokens_per_s"].items()
        if "tokens_per_s" in base.get(one["model"], {})
    ]


def targets(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all targets of a record: case, call, baseline, at_least and reached, None where not measured."""
    operators = record.get("operators", {}).get("cases", [])
    found = [{"case": case["case"]} | target for case in operators for target in case["targets"]]
    return found + model_targets(record.get("models", []))


def failures(record: dict[str, Any]) -> list[str]:
    """Return a line for everything in a record that failed."""
    parts = [(name, record.get(name, {})) for name in ("numerics", "operators")]
    parts += [(f"{one['model']} {one.get('configuration', '')}", one) for one in record.get("models", [])]
    found = [f"{name}: {part['failed']}" for name, part in parts if "failed" in part]
    for case in record.get("operators", {}).get("cases", []):
        found += [f"{case['case']}, {call}: {reason}" for call, reason in case["failed"].items()]
    return found


def show(record: dict[str, Any]) -> None:
    """Print the operators' times and all targets."""
    times = Table("case", "call", "microseconds (p20 - p80)", "of the ceiling", box=None)
    for case in record.get("operators", {}).get("cases", []):
        for call, (low, median, high) in case["microseconds_p20_median_p80"].items():
            share = f"{case['of_ceiling'][call]:.0%}"
            times.add_row(case["case"], call, f"{median:g} ({low:g} - {high:g})", share)
    ratios = Table("case", "call", "speed relative to", "reached", "target", box=None)
    for target in targets(record):
        reached = "not measured" if target["reached"] is None else f"{target['reached']:.2f}x"
        wanted = "" if target["at_least"] is None else f"{target['at_least']:g}x"
        ratios.add_row(target["case"], target["call"], target["baseline"], reached, wanted)
    for table in (times, ratios):
        for_tables().print(table)


def refuse(message: str) -> NoReturn:
    """Print one line and exit with status 2."""
    typer.echo(message, err=True)
    raise typer.Exit(2)


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for record and logs.")] = Path(
        "out/gpu"
    ),
    numerics: Seconds = 190,
    operators: Seconds = 150,
    models: Seconds = 230,
) -> None:
    """Check, measure, write the record, print the tables."""
    if not torch.cuda.is_available():
        refuse(
            "lutserve.benchmarks.gpu needs a CUDA device, and torch finds none; "
            "on a CPU use python -m lutserve.benchmarks.kernels"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"cannot write to {output}: {error.strerror}; choose another --output")
    record: dict[str, Any] = machine.collect() | {
        "command": ["python", "-m", "lutserve.benchmarks.gpu", *sys.argv[1:]],
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "note": "models: medians of rounds inside one process each, so not interleaved",
    }
    path = output / f"gpu_{datetime.now():%Y-%m-%dT%H-%M-%S}.json"

    def save() -> None:
        write(path, record | {"targets": targets(record), "failures": failures(record)})

    save()
    if numerics:
        record["numerics"] = check_numerics(numerics, output / "numerics.log")
        save()
    if operators:
        record["operators"] = time_operators(operators, output / "operators.log")
        save()
    if models:
        record["models"] = []
        for found in gpu_models.measure_all(output, models):
            record["models"].append(found)
            save()
    show(record)
    for line in failures(record):
        print(line, file=sys.stderr)
    print(f"written to {path}", file=sys.stderr)
    raise typer.Exit(bool(failures(record)))


if __name__ == "__main__":
    typer.run(main)
