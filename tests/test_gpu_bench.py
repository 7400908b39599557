"""The GPU's benchmark without a GPU: its refusal, its stages, its records, and every call in small."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("vllm")

from lutserve.benchmarks import gpu, gpu_models, gpu_operators
from lutserve.benchmarks.stage import lines_of

#: what only vLLM's CUDA build has
THEIRS = {"vLLM", "vLLM W4A16", "vLLM W8A8", "FlashAttention"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_one_line_and_status_2(tmp_path) -> None:
    command = [sys.executable, "-m", "lutserve.benchmarks.gpu", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "out").exists()
    assert done.stderr == (
        "lutserve.benchmarks.gpu needs a CUDA device, and torch finds none; "
        "on a CPU use python -m lutserve.benchmarks.kernels\n"
    )


def test_every_call_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, in small: ours fit their operators and are within what is allowed."""
    monkeypatch.setattr(gpu_operators, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_operators, "SHAPES", ((64, 256), (128, 384)))
    monkeypatch.setattr(gpu_operators, "PREFILL", (33,))
    monkeypatch.setattr(gpu_operators, "CONTEXT", 128)
    monkeypatch.setattr(gpu_operators, "LENGTH", 128)
    monkeypatch.setattr(gpu_operators, "WIDTHS", (256, 96))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    torch.manual_seed(0)
    names = set()
    for case in gpu_operators.cases():
        assert case.name not in names
        names.add(case.name)
        for target in case.targets:
            assert {target.call, target.baseline} <= set(case.contenders)
        for name, contender in case.contenders.items():
            assert contender.work.moved > 0
            if name not in THEIRS:
                error = gpu_operators.distance(contender.build()(), contender.expected)
                assert error <= contender.allowed, f"{case.name}, {name}: {error}"


def test_the_ceiling_of_a_call() -> None:
    reached = {"copy_gb_s": 1000.0, "fp16_tflop_s": 100.0, "int8_top_s": 200.0}
    work = gpu_operators.Work
    assert gpu_operators.fastest(work(5_000_000), reached) == 5.0
    assert gpu_operators.fastest(work(5_000_000, 10**9, 10**9), reached) == 15.0


def stage(program: str, tmp_path, seconds: float = 60):
    return lines_of([sys.executable, "-c", program], seconds, tmp_path / "log")


def test_a_stage_that_ends_well(tmp_path) -> None:
    found = stage("print('INFO'); print('{\"a\": 1}')", tmp_path)
    assert found.failed is None and found.records == [{"a": 1}]
    assert (tmp_path / "log").read_text().splitlines() == ["INFO", '{"a": 1}']


def test_a_stage_that_fails_says_why(tmp_path) -> None:
    found = stage("print('{}'); raise ValueError('three')", tmp_path)
    assert found.records == [{}] and found.failed.startswith("status 1: ValueError: three; see ")


def test_a_stage_out_of_time_keeps_what_it_printed_and_leaves_nothing(tmp_path) -> None:
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('{\"child\": %d}' % child.pid, flush=True); child.wait()"
    )
    start = time.monotonic()
    found = stage(program, tmp_path, seconds=2)
    assert time.monotonic() - start < 30 and found.failed.startswith("not finished after 2 s")
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(found.records[0]["child"])], capture_output=True)
    assert state.stdout.strip()[:1] in (b"", b"Z")


def test_targets_and_failures_of_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    case = {
        "case": "product",
        "microseconds_p20_median_p80": {"fp16": [1.0, 2.0, 3.0]},
        "of_ceiling": {"fp16": 0.5},
        "failed": {"ours": "off by 1"},
        "targets": [{"call": "ours", "baseline": "fp16", "at_least": 3.0, "reached": None}],
    }

    def served(model: str, configuration: str, rate: float) -> dict:
        speeds = {"prefill": {"median": rate, "rounds": [rate]}}
        return {"model": model, "configuration": configuration, "tokens_per_s": speeds}

    lame = {"model": "L", "configuration": "mix8", "failed": "out of memory"}
    # A model whose baseline is missing has no ratios.
    models = [
        served("L", gpu_models.BASELINE, 100.0),
        served("L", "nli-4", 95.0),
        lame,
        served("S", "nf4", 1.0),
    ]
    record = {"numerics": {"failed": "status 1"}, "operators": {"cases": [case]}, "models": models}
    assert gpu.targets(record) == [
        {"case": "product", "call": "ours", "baseline": "fp16", "at_least": 3.0, "reached": None},
        {"case": "L, prefill", "call": "nli-4", "baseline": "vLLM fp16", "at_least": 0.9, "reached": 0.95},
    ]
    assert gpu.failures(record) == [
        "numerics: status 1", "L mix8: out of memory", "product, ours: off by 1"
    ]  # fmt: skip
    gpu.show(record)
    shown = capsys.readouterr().out
    assert "not measured" in shown and "0.95x" in shown and "2 (1 - 3)" in shown
    assert gpu.targets({}) == gpu.failures({}) == []


def test_configurations_are_recipes_that_hold() -> None:
    found = gpu_models.configurations()
    assert next(iter(found)) == gpu_models.BASELINE and found[gpu_models.BASELINE].quantization is None
    assert found[gpu_models.LUTS].backend == "LUTSERVE" and found["mix8"].backend == "auto"
