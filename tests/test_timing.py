"""`lutserve profile timing`: layers as vLLM builds them, every shape by every method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("vllm")

import families

from lutserve import timing
from lutserve.cli import app
from lutserve.errors import UserError
from lutserve.quant_methods import mixq
from lutserve.recipe import read_json

METHODS = ("none", "int8", "mix8", "mix4", "nf4", "nf4+a8", "axcore")


def test_every_shape_by_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_json(families.write(tmp_path / "llama", "llama") / "config.json")
    learnt: dict[str, int] = {}

    class Kept(dict):  # type: ignore[type-arg]
        def clear(self) -> None:
            learnt.update({name: len(kernel.slots.columns) for name, kernel in self.items()})
            super().clear()

    monkeypatch.setattr(mixq, "KERNELS", Kept())
    groups = [{"method": name} for name in METHODS] + [{"method": "nf4", "group_size": 32}]
    report = timing.profile(config, groups, [1, 16], repeats=3)
    shapes = {(256, 128), (128, 128), (384, 128), (128, 192)}
    keys = {(r["n"], r["k"], r["method"], r.get("group_size"), r["m"]) for r in report["rows"]}
    named = [(group["method"], group.get("group_size")) for group in groups]
    assert keys == {(*shape, *name, m) for shape in shapes for name in named for m in (1, 16)}
    assert len(report["rows"]) == len(keys)
    assert all(0 < row["us_min"] <= row["us"] <= row["us_max"] for row in report["rows"])
    kernels = {(row["method"], row["layer"]): row["kernel"] for row in report["rows"]}
    assert kernels["nf4", "mlp.down_proj"].startswith("lut_gemm")
    # MixQ keeps this one in eight bits, as it does when serving.
    assert kernels["mix4", "mlp.down_proj"] == kernels["mix8", "mlp.down_proj"]
    assert kernels["mix4", "self_attn.o_proj"] != kernels["mix8", "self_attn.o_proj"]
    # The activations have one outlier column in 128 or 192, and mix8 and mix4 found it.
    assert sorted(set(learnt.values())) == [0, 1]
    assert not mixq.KERNELS


def test_a_layer_that_does_not_multiply_is_no_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_json(families.write(tmp_path / "llama", "llama") / "config.json")
    call = timing._Layer.__call__
    monkeypatch.setattr(timing._Layer, "__call__", lambda self, x: call(self, x) * 2)
    with pytest.raises(RuntimeError, match=r"none \[256, 128\] is off by 1"):
        timing.profile(config, [{"method": "none"}], [1], repeats=3)


def test_command(tmp_path: Path) -> None:
    folder, out = families.write(tmp_path / "gpt2", "gpt2"), tmp_path / "new/timing.json"
    arguments = ["--methods", "none,nf4", "--tokens", "1,4", "--repeats", "3", "--threads", "1"]
    command = ["profile", "timing", str(folder), *arguments, "-o", str(out)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0 and "attn.c_attn" in done.stdout and "4 tokens" in done.stdout
    report = json.loads(out.read_text())
    assert report["schema"] == "lutserve-timing-1" and len(report["rows"]) == 4 * 2 * 2
    assert report["threads"] == 1 and report["machine"]["machine"]["cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nf9"], "unknown method 'nf9'"),
        (["--methods", ""], "unknown method ''"),
        (["--tokens", "0"], "--tokens 0; allowed: numbers from 1 up"),
        (["--group-size", "0"], "1 or more columns"),
    ],
)
def test_bad_requests_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    folder = families.write(tmp_path / "llama", "llama")
    done = CliRunner().invoke(app, ["profile", "timing", str(folder), *arguments])
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert "\n" not in str(done.exception)
