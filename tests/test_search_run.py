"""`lutserve search` from text to recipe, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from typer.testing import CliRunner

from lutserve import luts, recipe
from lutserve.cli import app
from lutserve.errors import UserError
from lutserve.search import cost
from lutserve.search.allocate import Space, parse_budgets
from lutserve.search.architecture import Site
from lutserve.search.candidates import Candidate, TableCandidate
from lutserve.search.patterns import merged
from lutserve.search.refine import refine
from lutserve.search.run import Settings, search, space_of
from lutserve.search.simulation import Simulation
from lutserve.search.timing import Timing
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
    return space_of(Simulation(folder), settings())


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
    size = space.size(choice, {})
    assert size["bits"] == counted["effective_bits_per_weight"] <= 7
    assert (size["bytes"], size["bops"]) == (counted["model_bytes"], counted["linear_bops_per_token"])
    given = space.recipe(choice)
    for name, candidate in space.linears(choice).items():
        assert given.group_for(name).method == candidate.method
        if candidate.method == "int4":
            assert given.group_for(name).group_size == 32


@pytest.mark.parametrize(
    "budgets", [{"bits": 6.0}, {"bytes": 400_000.0}, {"bops": 3e7}, {"bits": 9, "bops": 2e7}]
)
def test_budgets_are_kept_and_used(space: Space, budgets: dict[str, float]) -> None:
    choice, _ = space.best(damage(space), budgets)
    size = space.size(choice, budgets)
    assert all(size[name] <= cap for name, cap in budgets.items()) and space.fits(choice, budgets)
    # No single layer could be given more.
    for unit, current in choice.items():
        for other in space.candidates[unit]:
            if damage(space)[unit][other.method] < damage(space)[unit][current.method]:
                assert not space.fits(choice | {unit: other}, budgets)
    for seed in range(3):
        assert space.fits(space.random(budgets, seed), budgets)
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
    blocks = space_of(simulation, settings(granularity="block"))
    assert list(blocks.units) == ["model.layers.0", "model.layers.1"]
    assert all(len(names) == 4 for names in blocks.units.values())
    wide = [Candidate("int4", 96), Candidate("int8")]
    # 192 columns on two devices are 96 each, which is one group; 128 are 64, which is none.
    cut = space_of(simulation, settings(candidates=wide, tensor_parallel=2))
    assert cut.candidates["model.layers.0.mlp.down_proj"] == wide
    assert cut.candidates["model.layers.0.self_attn.o_proj"] == wide[1:]
    assert cut.candidates["model.layers.0.self_attn.qkv_proj"] == wide
    both = space_of(simulation, settings(candidates=wide, tensor_parallel=2, granularity="block"))
    assert both.candidates["model.layers.0"] == wide[1:]
    with pytest.raises(UserError, match="fit none of the candidates"):
        space_of(simulation, settings(candidates=wide[:1], tensor_parallel=2))


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
    return Row("x", 4.0, 1.0, 1.0, 0, {}, predicted, kl, 1.0)


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
    assert len(report["scores"]) == 8 and report["schema"] == "lutserve-search-2"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.parent.iterdir()) == ["recipe.json", "recipe.report.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "bits=0"], "--budget bits=0; allowed: bits=X, bytes=X, bops=X, entries=X"),
        (["--budget", "ms=3"], "allowed: bits=X"),
        (["--budget", "ms:decode_b0=3"], "ms:decode_bN=X"),
        (["--budget", "ms:decode_b1=3"], "needs --timing FILE"),
        (["--budget", "ms:decode_b1=3", "--timing", "/nowhere"], "cannot read /nowhere"),
        (["--budget", "entries=100"], "go together"),
        (["--budget", "bits=5", "--luts", "nli-2"], "go together"),
        (["--budget", "entries=9", "--luts", "nli-2"], "--luts and --lut-sites go together"),
        (["--budget", "entries=9", "--luts", "nli-2", "--lut-sites", "tanh"], "--lut-sites tanh"),
        (["--budget", "entries=9", "--luts", "nli-2", "--lut-sites", "gelu"], "has no gelu"),
        (["--budget", "bits=5", "--refine", "magic"], "allowed: none, swap, evo"),
        (["--budget", "bits=5", "--refine", "evo", "--max-patterns", "2"], "give one of them"),
        (["--budget", "bits=5", "--max-patterns", "0"], "must be 1 or more"),
        (["--budget", "bits=5", "--budget", "bits=6"], "each once"),
        (["--budget", "bits=5", "--sweep", "8:5:3"], "allowed: LOW:HIGH:COUNT"),
        (["--budget", "bits=5", "--sensitivity", "guess"], "allowed: fisher, kl, linear, block, seed-mpl"),
        (["--budget", "bits=5", "--candidates", "fpma"], "fpma cannot be a candidate"),
        (["--budget", "bits=5", "--samples", "0"], "1 or more"),
    ],
)
def test_command_refuses(folder: Path, text: str, arguments: list[str], message: str) -> None:
    done = run(str(folder), "--data", text, "--held-out", "1", "--sequence-length", "32", *arguments)
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_budget_forms() -> None:
    assert parse_budgets(["bits=4.25", "bytes=120e6"]) == {"bits": 4.25, "bytes": 120e6}
    with pytest.raises(UserError, match="give a --budget"):
        parse_budgets([])


def table_of_times(file: Path, space: Space, us: dict[str, float]) -> Path:
    """Times of every layer: `us` a thousand weights and token, measured for 1 and 16 tokens."""
    rows = [
        {"n": s.out, "k": s.columns, "method": method, "m": m, "us": us[method] * s.weights / 1000 * m}
        for s in space.sites.values()
        for method in us
        for m in (1, 16)
    ]
    file.write_text(json.dumps({"machine": "none", "rows": rows}))
    return file


def test_milliseconds_are_a_budget(folder: Path, text: str, tmp_path: Path) -> None:
    simulation = Simulation(folder)
    plain = space_of(simulation, settings())
    file = table_of_times(tmp_path / "times.json", plain, {"int4": 1.0, "nf4": 1.5, "int8": 2.0, "none": 4.0})
    budgets = {"ms:decode_b4": 1.5 * plain.arch.linear_weights / 1e6 * 4}
    asked = settings(budgets=budgets, timing=Timing(file))
    space = space_of(simulation, asked)
    choice, _ = space.best(damage(space), budgets)
    ms = space.size(choice, budgets)["ms"]["ms:decode_b4"]
    assert ms <= budgets["ms:decode_b4"] < ms * 1.2 and len({c.method for c in choice.values()}) > 1
    weights = {name: space.sites[name].weights for name in space.sites}
    share = {"int4": 1.0, "nf4": 1.5, "int8": 2.0, "none": 4.0}
    assert ms == pytest.approx(sum(4 * share[c.method] * weights[u] for u, c in choice.items()) / 1e6)
    found = search(folder, asked, text)
    assert found.rows[0].ms == {"ms:decode_b4": pytest.approx(ms, rel=0.2)}
    with pytest.raises(UserError, match=r"the budget is .*|no choice fits"):
        space.best(damage(space), {"ms:prefill_16": 1e-6})


def test_tables_of_times_are_checked(tmp_path: Path) -> None:
    site = Site("x", (), 10, 20)
    row = {"n": 10, "k": 20, "method": "int4", "m": 1, "us": 2.0}

    def timing(*rows: Any) -> Timing:
        (tmp_path / "t.json").write_text(json.dumps({"rows": list(rows)}))
        return Timing(tmp_path / "t.json")

    both = timing(row, row | {"m": 16, "us": 32.0}, row | {"us": 9.0, "group_size": 32})
    # A row of this very group size is better than one of any.
    assert both.microseconds(site, Candidate("int4", 32), 1) == 9.0
    assert timing(row, row | {"m": 16, "us": 8.0}).microseconds(site, Candidate("int4"), 4) == pytest.approx(
        4.0
    )
    for tokens, name in ((2, "int4"), (1, "nf4")):
        with pytest.raises(UserError, match="cannot say how long"):
            timing(row).microseconds(site, Candidate(name), tokens)
    for bad in (row | {"us": 0}, row | {"us": float("inf")}, row | {"n": 0}, {"n": 1}, 5, row | {"m": "a"}):
        with pytest.raises(UserError, match="is no table of times"):
            timing(bad)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(UserError, match="is no table of times"):
        Timing(tmp_path / "t.json")


@pytest.mark.parametrize("most", [1, 2, 3])
def test_patterns_are_limited(most: int, tmp_path: Path) -> None:
    folder = tiny.tiny_llama(tmp_path / "deep", layers=6)
    simulation = Simulation(folder)
    free = space_of(simulation, settings())
    limited = space_of(simulation, settings(max_patterns=most))
    scores = damage(free)

    def kinds(choice: Any) -> set[tuple[str, ...]]:
        names = [option.name for option in choice.values()]
        return {tuple(names[i : i + 4]) for i in range(0, len(names), 4)}

    loose, loss = free.best(scores, {"bits": 6.0})
    tight, more = limited.best(scores, {"bits": 6.0})
    assert len(kinds(tight)) <= most < len(kinds(loose)) and loss < more
    assert limited.fits(tight, {"bits": 6.0})


def test_blocks_are_merged_with_the_most_similar() -> None:
    blocks = {0: ("a", "a"), 1: ("b", "b"), 2: ("a", "c"), 3: ("b", "b"), 4: ("a", "a")}
    assert merged(blocks, 3) == [[0, 4], [1, 3], [2]]
    assert merged(blocks, 2) == [[0, 4, 2], [1, 3]]
    assert sorted(map(sorted, merged(blocks, 1))) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("method", ["swap", "evo"])
def test_refining_finds_what_the_scores_do_not_know(space: Space, method: str) -> None:
    """Scores that know nothing of two units which are only bad together."""
    budgets, scores = {"bits": 5.0}, damage(space)
    start, _ = space.best(scores, budgets)
    low = [unit for unit, option in start.items() if option.name == "int4"][:2]

    def true(choice: Any) -> float:
        both = all(choice[unit].name == "int4" for unit in low)
        return sum(scores[unit][option.name] for unit, option in choice.items()) + (5.0 if both else 0.0)

    found = refine(method, space, scores, budgets, start, [true, true], rounds=20)
    assert space.fits(found, budgets) and true(found) < true(start) - 1
    # What is measured decides: a measure that calls every change worse changes nothing.
    worse = lambda choice: 0.0 if choice == start else 1.0  # noqa: E731
    assert refine(method, space, scores, budgets, start, [worse, worse], rounds=2) == start


def test_refined_search(folder: Path, text: str) -> None:
    plain = search(folder, settings(), text)
    refined = search(folder, settings(refine="swap", rounds=1), text)
    assert refined.facts["refine"] == "swap" and refined.rows[0].bits <= 6
    assert refined.facts["scores"] == plain.facts["scores"]


def test_tables_and_methods_are_chosen_together(folder: Path, text: str) -> None:
    tables = [TableCandidate(name) for name in ("nli-2", "nli-4", "nli-16")]
    sites = ("silu", "softmax_exp")
    # Four sites: two may have 35 numbers, or one 131 and the rest 19.
    asked = settings(
        budgets={"bits": 6.0, "entries": 2 * 19 + 2 * 35}, tables=tables, lut_sites=sites, sweep=(5.0,)
    )
    found = search(folder, asked, text)
    first = found.rows[0]
    assert first.entries <= 108 and first.bits <= 6
    assert set(found.recipe.luts) == {f"model.layers.{i}.{site}" for i in range(2) for site in sites}
    assert sorted(found.recipe.luts.values()) == ["nli-2", "nli-2", "nli-4", "nli-4"]
    assert "uniform int4, nli-2" in [row.name for row in found.rows]
    assert all(found.facts["scores"]["model.layers.0.silu"][t.name] > 0 for t in tables)
    # A table of more points costs less.
    silu = found.facts["scores"]["model.layers.1.silu"]
    assert silu["nli-16"] < silu["nli-4"] < silu["nli-2"]


def test_entries_are_the_numbers_of_a_table() -> None:
    assert [luts.entries("silu", f"nli-{n}") for n in (2, 4, 16, 32)] == [19, 35, 131, 259]
    assert luts.entries("silu", "nnlut:16") == 16 + 17 + 17 and luts.entries("silu", "exact") == 0


@pytest.mark.parametrize("family", ["gpt2", "opt-relu", "llama", "qwen3", "gemma"])
def test_every_family(family: str, text: str, tmp_path: Path) -> None:
    folder = families.write(tmp_path / family, family)
    mixed = [Candidate(name, 32) for name in ("int4", "nf4", "mix8", "axcore", "none")]
    found = search(folder, settings(candidates=mixed, budgets={"bits": 6.0}, randoms=1), text)
    assert found.rows[0].bits <= 6 and 0 < found.rows[0].kl < 20
    counted = cost.account(json.loads((folder / "config.json").read_text()), found.recipe)["recipe"]
    assert counted["effective_bits_per_weight"] == found.rows[0].bits
