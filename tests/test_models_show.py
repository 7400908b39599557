"""`lutserve models show`: counts against transformers' own model and against cost.account."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import transformers
from typer.testing import CliRunner

from lutserve.cli import app
from lutserve.errors import UserError
from lutserve.recipe import read_json
from lutserve.search import cost, occupancy


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gpt2", "opt-relu"])
def test_parameters_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    folder = families.write(tmp_path / family, family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = occupancy.describe(read_json(folder / "config.json"), ["none", "int8"])
    counts = found["parameters"]
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert sum(counts.values()) == 2 * counts["total"]
    sizes = {row["method"]: row for row in found["methods"]}
    assert sizes["none"]["model_bytes"] == 2 * counts["total"]
    assert sizes["none"]["bits_per_weight"] == 16 and sizes["none"]["linear_bytes"] == 2 * counts["linear"]
    saved = sizes["none"]["model_bytes"] - sizes["int8"]["model_bytes"]
    assert saved == sizes["none"]["linear_bytes"] - sizes["int8"]["linear_bytes"] > 0


def test_every_method_is_counted_as_flops_counts_it(tmp_path: Path) -> None:
    config = read_json(families.write(tmp_path / "llama", "llama") / "config.json")
    found = occupancy.describe(config, group_size=32)
    assert found["architecture"]["kv_heads"] == 2 and len(found["architecture"]["sites"]) == 4
    # Two blocks, keys and values of two heads of 32 channels, two bytes.
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 2
    for row in found["methods"]:
        group = {"targets": ["Linear"], "method": row["method"], "group_size": 32}
        counted = cost.account(config, {"quant_method": "lutserve", "config_groups": {"all": group}})
        assert row["model_bytes"] == counted["recipe"]["model_bytes"]
        assert row["bits_per_weight"] == pytest.approx(
            counted["recipe"]["effective_bits_per_weight"], abs=1e-4
        )
    bits = {row["method"]: row["bits_per_weight"] for row in found["methods"]}
    assert bits["nf4"] == 4.5 and bits["none"] == 16 and 8 < bits["int8"] < 8.2


def test_command(tmp_path: Path) -> None:
    folder = str(families.write(tmp_path / "gpt2", "gpt2"))
    shown = CliRunner().invoke(app, ["models", "show", folder], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "attn.c_attn" in shown.stdout and "every 4-bit format" in shown.stdout and "mix8" in shown.stdout
    answered = CliRunner().invoke(app, ["models", "show", folder, "--json"], catch_exceptions=False)
    assert json.loads(answered.stdout)["architecture"]["family"] == "gpt2"
    listed = CliRunner().invoke(app, ["models"], catch_exceptions=False)
    assert "llama3-8b" in listed.stdout and "c_attn" not in listed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "smolm2"], "unknown model 'smolm2'"),
        (["show", "{folder}", "--group-size", "-2"], "1 or more columns, or -1"),
    ],
)
def test_bad_requests_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    folder = str(families.write(tmp_path / "llama", "llama"))
    done = CliRunner().invoke(app, ["models", *(a.format(folder=folder) for a in arguments)])
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_family_that_is_not_counted(tmp_path: Path) -> None:
    folder = str(families.write(tmp_path / "moe", "qwen3_moe"))
    done = CliRunner().invoke(app, ["models", "show", folder])
    assert isinstance(done.exception, UserError) and "qwen3_moe" in str(done.exception)
