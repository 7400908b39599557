"""`lutserve bench`: the arithmetic of its summary, the order of its runs, and one real run."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import tiny_llama

from lutserve import env
from lutserve.benchmarks import check, fleet, footprint, serve, throughput
from lutserve.benchmarks.check import Agreement, Answer, compare
from lutserve.benchmarks.fleet import commands, fit_together, schedule
from lutserve.benchmarks.models import random_llama
from lutserve.benchmarks.report import Report
from lutserve.benchmarks.summary import Measurement, Row, summarize
from lutserve.benchmarks.workloads import (
    PROVIDERS,
    WORKLOADS,
    Provider,
    Workload,
    batches,
    choose,
    choose_providers,
)
from lutserve.errors import UserError

# decode: 8 requests at 20 ms a token each are 400 tokens a second, whatever the prefill took
DECODE = {"median_tpot_ms": 20.0, "duration": 99.0, "total_input_tokens": 128}
PREFILL = {"median_tpot_ms": 0.0, "duration": 2.0, "total_input_tokens": 4096}


def test_values_of_workloads() -> None:
    assert WORKLOADS["decode-8"].value(DECODE) == 400.0
    assert WORKLOADS["decode-1"].value(DECODE) == 50.0
    assert WORKLOADS["prefill"].value(PREFILL) == 2048.0


def test_arguments_of_a_workload() -> None:
    arguments = Workload("x", "decode", input_len=3, output_len=4, concurrency=2, prompts=5).arguments(seed=7)
    flags = dict(zip(arguments[3::2], arguments[4::2], strict=True))
    assert arguments[:3] == ["--dataset-name", "random", "--ignore-eos"]
    assert flags == {
        "--random-input-len": "3",
        "--random-output-len": "4",
        "--num-prompts": "5",
        "--max-concurrency": "2",
        "--seed": "7",
    }


def test_ratios_are_formed_inside_each_round() -> None:
    # The machine halves its speed in round 1; ratios of medians would say 1.5.
    runs = [("base", 100.0, 50.0, 90.0), ("fast", 200.0, 100.0, 270.0)]
    measurements = [
        Measurement(name, "w", n, value) for name, *values in runs for n, value in enumerate(values)
    ]
    base, fast = summarize(measurements, "base")
    assert base == Row("w", "base", 90.0, 50.0, 100.0, 1.0, 1.0, 1.0)
    assert fast == Row("w", "fast", 200.0, 100.0, 270.0, 2.0, 2.0, 3.0)


def test_rows_come_workload_by_workload_and_rounds_may_be_missing() -> None:
    measurements = [
        Measurement("base", "a", 0, 10.0),
        Measurement("base", "b", 0, 1.0),
        Measurement("other", "a", 0, 5.0),
        Measurement("other", "a", 1, 50.0),
        Measurement("other", "b", 1, 3.0),
    ]
    rows = summarize(measurements, "base")
    assert [(row.workload, row.provider) for row in rows] == [
        ("a", "base"),
        ("a", "other"),
        ("b", "base"),
        ("b", "other"),
    ]
    assert rows[1] == Row("a", "other", 27.5, 5.0, 50.0, 0.5, 0.5, 0.5)
    assert math.isnan(rows[3].ratio)
    assert summarize([], "base") == []


def names(plan: Any) -> list[tuple[str, list[str]]]:
    return [(provider.name, [workload.name for workload in todo]) for provider, todo in plan]


def test_schedule_rotates_and_keeps_neighbours_together() -> None:
    providers = [Provider("p"), Provider("q"), Provider("r")]
    workloads = [WORKLOADS["decode-1"], WORKLOADS["prefill"]]
    assert names(schedule(providers, workloads, 1, together=True)) == [
        ("q", ["decode-1"]),
        ("r", ["decode-1"]),
        ("p", ["decode-1"]),
        ("q", ["prefill"]),
        ("r", ["prefill"]),
        ("p", ["prefill"]),
    ]
    assert names(schedule(providers, workloads, 3, together=False)) == [
        ("p", ["decode-1", "prefill"]),
        ("q", ["decode-1", "prefill"]),
        ("r", ["decode-1", "prefill"]),
    ]


def test_choose_keeps_the_asked_order_and_names_what_is_allowed() -> None:
    assert [w.name for w in choose(["prefill", "decode-1"], WORKLOADS, "workload")] == ["prefill", "decode-1"]
    assert choose(None, WORKLOADS, "workload") == list(WORKLOADS.values())
    with pytest.raises(UserError, match="unknown workload 'decode-9'; allowed: decode-1"):
        choose(["decode-9"], WORKLOADS, "workload")


def test_a_provider_is_named_in_the_table_or_is_any_method() -> None:
    assert choose_providers(["mix8+nli-4", "bf16"]) == [PROVIDERS["mix8+nli-4"], PROVIDERS["bf16"]]
    assert choose_providers(None) == list(PROVIDERS.values())
    assert choose_providers(["nf4+a8"]) == [Provider("nf4+a8", ("--method", "nf4+a8"))]
    with pytest.raises(UserError, match="unknown provider 'mix9'; allowed: bf16, vllm-w8a8"):
        choose_providers(["mix9"])


def test_commands_put_the_users_flags_last() -> None:
    made = commands([PROVIDERS["mix8"]], {"mix8": "/m"}, ["--max-model-len", "4096"])
    assert made["mix8"][:2] == ["--model", "/m"]
    assert made["mix8"][-4:] == ["--method", "mix8", "--max-model-len", "4096"]
    assert "--no-enable-prefix-caching" in made["mix8"]


def test_fit_together_counts_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(fleet, "_OVERHEAD", 10)
    monkeypatch.setattr(fleet, "available_memory", lambda: 2021)
    assert fit_together({"a": str(tmp_path), "b": str(tmp_path)})
    monkeypatch.setattr(fleet, "available_memory", lambda: 2020)
    assert not fit_together({"a": str(tmp_path), "b": str(tmp_path)})


def test_compare_and_the_bound_on_agreement(tmp_path: Path) -> None:
    base = Answer((1, 2, 3), (-1.0, -2.0))
    near = Answer((1, 2, 9), (-1.5, -2.25))
    assert compare(near, base) == Agreement(mean=0.375, largest=0.5, equal_tokens=2)
    report = Report(tmp_path / "r.json", "base", {})
    serve.agree(report, "base", {"base": base})
    assert report.agreement == {}
    serve.agree(report, "near", {"base": base, "near": near})
    assert report.agreement["near"].largest == 0.5
    wrong = Answer((1, 2, 3), (-1.0, -2.0 - 2 * check.LIMIT - 0.1))
    with pytest.raises(UserError, match="wrong computes something else than base"):
        serve.agree(report, "wrong", {"base": base, "wrong": wrong})


def test_the_report_is_whole_after_every_run(tmp_path: Path) -> None:
    report = Report(tmp_path / "bench.json", "base", {"machine": {"cores": 2}})
    report.agreement["fast"] = Agreement(0.01, 0.02, 16)
    for number in range(2):
        report.add(DECODE | {"model_id": "m"}, "base", WORKLOADS["decode-1"], number, recipe=None)
        report.add(DECODE | {"median_tpot_ms": 10.0}, "fast", WORKLOADS["decode-1"], number, recipe={"a": 1})
        stored = json.loads(report.path.read_text())
        assert len(stored["runs"]) == 2 * (number + 1)
    assert stored["runs"][0]["model_id"] == "m"
    assert stored["runs"][3]["lutserve"] == {
        "provider": "fast",
        "workload": "decode-1",
        "round": 1,
        "value": 100.0,
        "recipe": {"a": 1},
    }
    assert stored["summary"][1]["ratio"] == 2.0
    assert stored["lutserve"]["machine"] == {"cores": 2}
    assert stored["lutserve"]["agreement"]["fast"]["equal_tokens"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    report.show(console)
    shown = console.export_text()
    assert "2.00x" in shown
    assert "fast: 0.0100 nats apart" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"providers": ["mix9"]}, "unknown provider"),
        ({"workloads": ["decode-9"]}, "unknown workload"),
        ({"rounds": 0}, "--rounds 0"),
        ({"model": "tiny", "providers": ["vllm-w8a8"]}, "leave out it or --model"),
    ],
)
def test_user_errors(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        serve.run(output=tmp_path, **options)


@pytest.fixture
def small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(
        random_llama, hidden=256, layers=2, intermediate=512, heads=4, kv_heads=2, vocab=1000
    )
    monkeypatch.setattr(fleet, "random_llama", small)
    monkeypatch.setattr(fleet, "default_folder", lambda name: tmp_path / name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("small_model")
def test_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Workload("short", "decode", input_len=8, output_len=8, concurrency=2, prompts=2)
    monkeypatch.setitem(WORKLOADS, "short", short)
    report = serve.run(
        output=tmp_path / "out",
        providers=["bf16", "vllm-w8a8", "mix8+nli-4"],
        workloads=["short"],
        rounds=1,
        together=False,
    )
    stored = json.loads(report.path.read_text())
    assert [row["provider"] for row in stored["summary"]] == ["bf16", "vllm-w8a8", "mix8+nli-4"]
    assert all(row["median"] > 0 for row in stored["summary"])
    assert all(run["completed"] == 2 and run["median_tpot_ms"] > 0 for run in stored["runs"])
    assert all(run["total_output_tokens"] == 16 for run in stored["runs"])
    assert all(run["lutserve"]["peak_bytes"] > 1 << 27 for run in stored["runs"])
    recipe = stored["runs"][2]["lutserve"]["recipe"]
    assert recipe["config_groups"]["default"]["method"] == "mix8"
    assert recipe["luts"]["silu"] == "nli-4"
    assert 0 < report.agreement["vllm-w8a8"].mean < 0.3
    assert 0 < report.agreement["mix8+nli-4"].mean < 0.3


@pytest.mark.extended
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("small_model")
def test_a_real_throughput_table(tmp_path: Path) -> None:
    table, path = throughput.run(
        types="bf16,mix",
        batch="2",
        model=None,
        rounds=1,
        output=tmp_path / "out",
        windows=None,
        data=None,
        server_args=(),
    )
    assert path.with_suffix(".md").read_text() == table + "\n"
    runs = json.loads(path.read_text())["runs"]
    assert {run["lutserve"]["workload"] for run in runs} == {"steps-2", "decode-2"} and len(runs) == 4
    assert {run["total_input_tokens"] for run in runs} == {3, 3 * 128}
    lines = table.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["bf16", "mix8"]
    assert lines[3].count("x, ") == 2


def test_types_of_the_throughput_table(tmp_path: Path) -> None:
    found = throughput.chosen("fp16,bf16,mix,quik4=" + str(tiny_llama(tmp_path / "tiny")))
    assert [provider.name for provider in found] == ["fp16", "bf16", "mix8", "quik4"]
    assert found[0].arguments[-1] == "float16" and found[3].folder == str(tmp_path / "tiny")
    paths = fleet.model_paths(str(tmp_path / "tiny"), found)
    assert paths["quik4"] == paths["fp16"] == str(tmp_path / "tiny")
    for types, message in (
        ("awq", "awq: it is quantised beforehand; give awq=DIR"),
        ("quik", "give quik=DIR"),
        ("bitsandbytes", "vLLM has no CPU kernels for it; llm-int8 follows its rule"),
        ("mix8,mix", "mix is there twice"),
        ("mix9", "unknown provider 'mix9'"),
        ("awq=/nowhere", "does not exist"),
        ("", "unknown provider ''"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            throughput.chosen(types)
    assert throughput.sizes("1, 8,32") == [1, 8, 32]
    for batch in ("", "0", "1,1", "-1", "8,x", "1.5"):
        with pytest.raises(UserError, match="give whole numbers from 1 on"):
            throughput.sizes(batch)
    options = {"batch": "1", "rounds": 1, "output": tmp_path, "server_args": (), "data": None}
    with pytest.raises(UserError, match="--with-ppl needs --model"):
        throughput.run(types="bf16", model=None, windows=1, **options)
    with pytest.raises(UserError, match="leave out it or --model"):
        throughput.run(types="bf16,vllm-w8a8", model="tiny", windows=None, **options)


def test_the_throughput_table_has_a_row_for_each_type_and_batch(tmp_path: Path) -> None:
    report = Report(tmp_path / "r.json", "bf16", {})
    for number, speed in enumerate((1.0, 2.0, 4.0)):
        for workload in batches([1, 8]):
            for name, tpot in (("bf16", 40.0), ("mix8", 20.0)):
                result = {"median_tpot_ms": tpot / speed, "duration": 1, "total_input_tokens": 1}
                report.add(result, name, workload, number, peak_bytes=number * 10**9)
    quality = {name: {"2048": 20.0, "512": 25.0} for name in ("bf16", "mix8")}
    table = throughput.markdown(report, quality).splitlines()
    assert table[2] == "| 1 | bf16 | 50.0 | 50.0 | 2.00 | 20.000 | 25.000 |"
    ratio = "(2.00x, 2.00-2.00)"
    assert table[5] == f"| 8 | mix8 | 800.0 {ratio} | 800.0 {ratio} | 2.00 | 20.000 | 25.000 |"
    assert len(table) == 6 and "perplexity" not in throughput.markdown(report, {})


def test_memory_of_a_server_is_that_of_its_session() -> None:
    code = "import os, time; x = b'1' * (64 << 20); os.fork(); print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert child.stdout is not None and child.stdout.read(2) == b"\n\n"
        assert footprint.resident_bytes(child.pid) >= 128 << 20
        assert footprint.peak_bytes(child.pid) >= footprint.resident_bytes(child.pid) > 0
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert footprint.resident_bytes(child.pid) == 0


def test_benchmark_models_live_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUTSERVE_CACHE", str(tmp_path))
    assert env.cache_dir() == tmp_path
    assert fleet.default_folder("x") == tmp_path / "bench" / "x"
