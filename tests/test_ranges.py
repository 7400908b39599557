"""`lutserve profile ranges`: histograms against sorting, sites against a model's own numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lutserve.cli import app
from lutserve.errors import UserError
from lutserve.profile import ranges, source
from lutserve.profile.histogram import QUANTILES, Histogram

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def bf16(value: float) -> float:
    return torch.tensor(value).clamp(-3.3895313892515355e38, 3.3895313892515355e38).bfloat16().item()


@settings(deadline=None, max_examples=50)
@given(st.lists(finite, min_size=1, max_size=200), st.integers(1, 4))
def test_quantiles_are_those_of_the_sorted_numbers(values: list[float], parts: int) -> None:
    whole = Histogram()
    for part in range(parts):
        one = Histogram()
        one.add(torch.tensor(values[part::parts], dtype=torch.float32))
        whole.merge(one)
    ordered = sorted(values)
    assert (whole.count, whole.odd) == (len(values), 0)
    assert (whole.low, whole.high) == (ordered[0], ordered[-1])
    for share in (*QUANTILES, 1.0):
        exact = ordered[math.ceil(share * len(ordered)) - 1]
        assert whole.quantile(share) == min(max(bf16(exact), ordered[0]), ordered[-1])


def test_infinities_and_nans_are_counted_apart() -> None:
    histogram = Histogram()
    histogram.add(torch.tensor([math.nan, math.inf, -math.inf, 1.0, -0.0, 0.0]).half())
    histogram.add(torch.tensor([math.nan]))
    histogram.add(torch.zeros(0))
    assert (histogram.count, histogram.odd, histogram.low, histogram.high) == (3, 4, 0.0, 1.0)
    assert Histogram().to_dict() == {"count": 0, "odd": 0, "min": None, "max": None, "quantiles": {}}


TEXT = "The river rises in the hills north of the town. " * 40


@pytest.fixture(scope="module", params=list(families.FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("ranges") / request.param
    return request.param, families.write(folder, request.param)


def test_every_site_of_every_family(model: tuple[str, Path]) -> None:
    """Counts say that no site, head or token is left out; bounds what cannot be otherwise."""
    family, folder = model
    seen: list[tuple[int, int]] = []
    report = ranges.profile(
        str(folder), TEXT, window=32, windows=3, dtype="float32", done=lambda *a: seen.append(a)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    tokens, heads, width = 96, 4, families.SIZES["intermediate_size"]
    by_site: dict[str, list[dict[str, Any]]] = {}
    for row in report["sites"]:
        by_site.setdefault(row["site"], []).append(row)
    acts = by_site.get("silu", []) + by_site.get("gelu", [])
    if family == "qwen3_moe":
        assert sum(row["count"] for row in acts) == 2 * tokens * 2 * 64
    else:
        assert [row["count"] for row in acts] == [] if family == "opt-relu" else [tokens * width] * 2
    assert [row["count"] for row in by_site["softmax_exp"]] == [3 * heads * 32 * 33 // 2] * 2
    assert all(row["max"] == 0 and row["min"] < -0.5 for row in by_site["softmax_exp"])
    assert [row["count"] for row in by_site["softmax_recip"]] == [tokens * heads] * 2
    assert all(1 == row["min"] <= row["max"] <= 32 for row in by_site["softmax_recip"])
    counts = {row["module"].rpartition(".")[2]: row["count"] for row in by_site["rsqrt"]}
    assert len(by_site["rsqrt"]) == (9 if "qwen3" in family else 5)
    assert all(n == tokens * {"q_norm": 4, "k_norm": 2}.get(name, 1) for name, n in counts.items())
    assert all(row["min"] > 0 for row in by_site["rsqrt"])
    assert set(report["summary"]) == set(by_site)
    for site, summary in report["summary"].items():
        assert summary["count"] == sum(row["count"] for row in by_site[site])
        assert summary["min"] == min(row["min"] for row in by_site[site])
        assert list(summary["quantiles"]) == [str(q) for q in QUANTILES]


def test_numbers_are_the_models_own(tmp_path: Path) -> None:
    """The same inputs, taken from an unmodified transformers model with eager attention."""
    folder = families.write(tmp_path / "llama", "llama")
    report = ranges.profile(str(folder), TEXT, window=48, windows=1, dtype="float32")
    rows = {(row["site"], row["module"]): row for row in report["sites"]}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT).input_ids[:48]
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0]}) if args else None
        )
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_attentions=True)
    for layer in range(2):
        stem = f"model.layers.{layer}"
        gate = inputs[f"{stem}.mlp.act_fn"]
        row = rows["silu", f"{stem}.mlp.act_fn"]
        assert (row["min"], row["max"]) == pytest.approx((gate.min().item(), gate.max().item()), rel=1e-4)
        middle = gate.flatten().sort().values[(gate.numel() + 1) // 2 - 1].item()
        assert row["quantiles"]["0.5"] == pytest.approx(middle, rel=2**-7, abs=1e-4)
        square = inputs[f"{stem}.input_layernorm"].square().mean(-1) + model.config.rms_norm_eps
        row = rows["rsqrt", f"{stem}.input_layernorm"]
        assert (row["min"], row["max"]) == pytest.approx((square.min().item(), square.max().item()), rel=1e-4)
        # The largest probability of a row is 1 / its sum, and the smallest of all exp(min) / sum.
        sums = 1 / output.attentions[layer].amax(-1)
        row = rows["softmax_recip", f"{stem}.self_attn"]
        assert row["max"] == pytest.approx(sums.max().item(), rel=1e-3)
        chances = output.attentions[layer] * sums[..., None]
        row = rows["softmax_exp", f"{stem}.self_attn"]
        assert row["min"] == pytest.approx(chances[chances > 0].log().min().item(), rel=1e-3)


def test_command(tmp_path: Path) -> None:
    folder, text, out = (
        families.write(tmp_path / "gpt2", "gpt2"),
        tmp_path / "text",
        tmp_path / "new/out.json",
    )
    text.write_text(TEXT)
    arguments = ["profile", "ranges", str(folder), "--data", str(text), "--window", "32", "--windows", "2"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(out), "--layers"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "softmax_recip" in done.stdout and "h.1.mlp.act" in done.stdout and "99.9 %" in done.stdout
    report = json.loads(out.read_text())
    assert report["schema"] == "lutserve-ranges-1" and report["windows"] == 2
    assert report["data"] == str(text) and [p.name for p in out.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 4096}, "less than one window of 4096"),
        ({"dtype": "int8"}, "--dtype int8; allowed: bfloat16, float16, float32"),
        ({"model": "/nowhere/at/all"}, "cannot load /nowhere/at/all"),
    ],
)
def test_bad_requests_are_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    settings = {"model": str(families.write(tmp_path / "m", "llama")), "text": TEXT} | change
    with pytest.raises(UserError, match=message) as caught:
        ranges.profile(settings.pop("model"), settings.pop("text"), **settings)
    assert "\n" not in str(caught.value)


def test_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUTSERVE_DATA", raising=False)
    monkeypatch.delenv("LUTSERVE_SHARED", raising=False)
    with pytest.raises(UserError, match="LUTSERVE_DATA"):
        source.read_text("wikitext")
    for bad in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"does not exist|cannot read"):
            source.read_text(str(bad))
    monkeypatch.setenv("LUTSERVE_DATA", str(tmp_path))
    with pytest.raises(UserError, match="wikitext2_test"):
        source.read_text("wikitext")


@pytest.mark.slow
def test_smollm2_like_the_recorded_statistics(shared: Path) -> None:
    """SiLU inputs and mean squares of the embedded model, recorded on other windows of the same text."""
    from lutserve import models

    text = source.read_text(str(shared / "data"))
    report = ranges.profile(models.resolve("smollm2-135m"), text, window=1024, windows=2)
    silu, rsqrt = report["summary"]["silu"], report["summary"]["rsqrt"]
    assert -42 < silu["min"] < -30 and 40 < silu["max"] < 52
    assert rsqrt["min"] == pytest.approx(0.00558, rel=0.1) and rsqrt["max"] == pytest.approx(1.12e6, rel=0.1)
    assert len(report["sites"]) == 30 * 5 + 1
