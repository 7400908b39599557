"""`lutserve search` from text to recipe, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from typer.testing import CliRunner

from lutserve import recipe
from lutserve.cli import app
from lutserve.errors import UserError
from lutserve.search import cost
from lutserve.search.allocate import Space, parse_budgets
from lutserve.search.candidates import Candidate
from lutserve.search.run import Settings, _space, search
from lutserve.search.simulation import Simulation
from lutserve.search.verify import Row, agreement

CANDIDATES = [Candidate(name, 32) for name in ("int4", "nf4", "int8", "none")]
TEXT = "The river rises in the hills north of the town. Nobody knows its name, and few have seen it. " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write(tmp_path_factory.mktemp("run") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LUTSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settings(**changes: Any) -> Settings:
    small = {"samples": 2, "held_out": 2, "length": 32, "randoms": 2}
    return Settings(**{"candidates": CANDIDATES, "budgets": {"bits": 6.0}} | small | changes)


@pytest.fixture(scope="module")
def space(folder: Path) -> Space:
    return _space(Simulation(folder), settings())


def damage(space: Space) -> dict[str, dict[str, float]]:
    """Made-up scores that fall with the bits, and more so in later layers."""
    return {
        unit: {c.method: (i + 1) * (16 - c.precision.weight) ** 2 / 100 for c in space.candidates[unit]}
        for i, unit in enumerate(space.units)
    }


def test_sizes_are_those_of_the_recipe(space: Space, folder: Path) -> None:
    """What the solver adds up is what `lutserve flops` counts for the recipe that comes out."""
    choice, loss = space.best(damage(space), {"bits": 7.0})
    assert {c.method for c in choice.values()} >= {"int4", "int8"}
    assert loss == pytest.approx(sum(damage(space)[u][c.method] for u, c in choice.items()))
    config = json.loads((folder / "config.json").read_text())
    counted = cost.account(config, space.recipe(choice))["recipe"]
    size = space.size(choice)
    assert size["bits"] == counted["effective_bits_per_weight"] <= 7
    assert (size["bytes"], size["bops"]) == (counted["model_bytes"], counted["linear_bops_per_token"])
    given = space.recipe(choice)
    for name, candidate in space.layers(choice).items():
        assert given.group_for(name).method == candidate.method
        if candidate.method == "int4":
            assert given.group_for(name).group_size == 32


@pytest.mark.parametrize(
    "budgets", [{"bits": 6.0}, {"bytes": 400_000.0}, {"bops": 3e7}, {"bits": 9, "bops": 2e7}]
)
def test_budgets_are_kept_and_used(space: Space, budgets: dict[str, float]) -> None:
    choice, _ = space.best(damage(space), budgets)
    size = space.size(choice)
    assert all(size[name] <= cap for name, cap in budgets.items()) and space.fits(choice, budgets)
    # No single layer could be given more.
    for unit, current in choice.items():
        for other in space.candidates[unit]:
            if damage(space)[unit][other.method] < damage(space)[unit][current.method]:
                assert not space.fits(choice | {unit: other}, budgets)
    for seed in range(3):
        assert space.fits(space.random(budgets, seed), budgets) or "bops" in budgets
        assert space.random(budgets, seed) == space.random(budgets, seed)
    assert space.random(budgets, 1) != space.random(budgets, 2)


def test_uniform_recipes_within_the_budget(space: Space) -> None:
    def names(bits: float) -> list[str]:
        return list(space.uniform({"bits": bits}))

    assert names(4.5) == ["uniform int4", "uniform nf4"]
    assert names(16) == ["uniform int4", "uniform nf4", "uniform int8", "uniform none"]
    assert names(4.4) == []


def test_budgets_that_cannot_be_met(folder: Path, text: str, cache: Path) -> None:
    with pytest.raises(
        UserError, match=r"the least possible is bits=4\.5000, bytes=\d+, bops=\d+; bits cannot be"
    ):
        search(folder, settings(budgets={"bits": 4.25}), text)
    assert not cache.exists(), "refused before anything is measured"
    with pytest.raises(UserError, match="no choice fits"):
        search(folder, settings(budgets={"bytes": 1.0}), text)


def test_granularity_and_devices_narrow_the_choice(folder: Path) -> None:
    simulation = Simulation(folder)
    blocks = _space(simulation, settings(granularity="block"))
    assert list(blocks.units) == ["model.layers.0", "model.layers.1"]
    assert all(len(names) == 4 for names in blocks.units.values())
    wide = [Candidate("int4", 96), Candidate("int8")]
    # 192 columns on two devices are 96 each, which is one group; 128 are 64, which is none.
    cut = _space(simulation, settings(candidates=wide, tensor_parallel=2))
    assert cut.candidates["model.layers.0.mlp.down_proj"] == wide
    assert cut.candidates["model.layers.0.self_attn.o_proj"] == wide[1:]
    assert cut.candidates["model.layers.0.self_attn.qkv_proj"] == wide
    both = _space(simulation, settings(candidates=wide, tensor_parallel=2, granularity="block"))
    assert both.candidates["model.layers.0"] == wide[1:]
    with pytest.raises(UserError, match="fit none of the candidates"):
        _space(simulation, settings(candidates=wide[:1], tensor_parallel=2))


def test_result_is_measured_on_other_text(folder: Path, text: str, cache: Path) -> None:
    told: list[str] = []
    found = search(folder, settings(sweep=(5.0, 8.0)), text, lambda what, share: told.append(what))
    names = [row.name for row in found.rows]
    assert names == ["found", "uniform int4", "uniform nf4", "random 0", "random 1"]
    assert [row.name for row in found.sweep] == ["bits=5", "bits=8"]
    assert all(0 < row.kl < 20 and math.isfinite(row.perplexity) for row in [*found.rows, *found.sweep])
    first = found.rows[0]
    assert first.predicted <= min(row.predicted for row in found.rows) + 1e-12 and first.bits <= 6
    assert found.sweep[0].predicted > first.predicted > found.sweep[1].predicted
    assert told[0] == "loading" and "fisher" in told and told[-1] == "verifying"
    (file,) = (cache / "search").iterdir()
    before = file.read_bytes()
    # Another budget costs no new score.
    again = search(folder, settings(budgets={"bits": 5.0}), text)
    assert file.read_bytes() == before and again.facts["scores"] == found.facts["scores"]
    assert again.rows[0].kl == found.sweep[0].kl


def test_verification_counts_like_transformers(folder: Path, text: str) -> None:
    import transformers

    from lutserve.quantizers import calibration

    found = search(folder, settings(candidates=[Candidate("none")], budgets={"bits": 16.0}, randoms=0), text)
    row = found.rows[0]
    assert (row.name, row.kl, row.predicted, row.bits) == ("found", 0.0, 0.0, 16.0)
    assert found.recipe.config_groups == {} and found.facts["agreement"]["measured_over_predicted"] is None
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = calibration.windows(text, folder, 4, 32)[2:]
    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss.item() for w in windows]
    assert row.perplexity == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)


def row(predicted: float, kl: float) -> Row:
    return Row("x", 4.0, 1.0, 1.0, predicted, kl, 1.0)


def test_agreement() -> None:
    rows = [row(1, 2.0), row(2, 3.0), row(3, 2.5), row(4, 9.0)]
    # Of six pairs one is the wrong way round.
    assert agreement(rows) == {"tau": pytest.approx(4 / 6), "measured_over_predicted": 2.0}
    assert agreement([row(0, 0)]) == {"tau": None, "measured_over_predicted": None}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["search", *arguments])


def test_command(folder: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "recipe.json"
    arguments = [str(folder), "--budget", "bits=5", "--candidates", "int4,nf4,int8", "--group-size", "32"]
    arguments += ["--data", text, "--samples", "1", "--held-out", "1", "--sequence-length", "32"]
    done = run(
        *arguments, "--random", "1", "--sweep", "5:8:2", "--plot", str(tmp_path / "a.png"), "-o", str(out)
    )
    assert done.exit_code == 0, done.exception
    assert "held-out KL" in done.stdout and "uniform nf4" in done.stdout and "Kendall's tau" in done.stdout
    written = recipe.load(out)
    assert {group.method for group in written.config_groups.values()} <= {"int4", "nf4", "int8"}
    assert written.quantizes
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert report["rows"][0]["name"] == "found" and report["data"] == text and len(report["sweep"]) == 2
    assert len(report["scores"]) == 8
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.parent.iterdir()) == ["recipe.json", "recipe.report.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "bits=0"], "--budget bits=0; allowed: bits=X, bytes=X, bops=X"),
        (["--budget", "ms=3"], "allowed: bits=X"),
        (["--budget", "bits=5", "--budget", "bits=6"], "each once"),
        (["--budget", "bits=5", "--sweep", "8:5:3"], "allowed: LOW:HIGH:COUNT"),
        (["--budget", "bits=5", "--sensitivity", "guess"], "allowed: fisher, kl, linear, block, seed-mpl"),
        (["--budget", "bits=5", "--candidates", "mix8"], "mix8 cannot be a candidate"),
        (["--budget", "bits=5", "--samples", "0"], "1 or more"),
    ],
)
def test_command_refuses(folder: Path, arguments: list[str], message: str) -> None:
    done = run(str(folder), *arguments)
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_budget_forms() -> None:
    assert parse_budgets(["bits=4.25", "bytes=120e6"]) == {"bits": 4.25, "bytes": 120e6}
    with pytest.raises(UserError, match="give a --budget"):
        parse_budgets([])
