"""Scores against what they are defined as, on tiny models of every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from lutserve.errors import UserError
from lutserve.quantizers import rtn
from lutserve.search.architecture import Site
from lutserve.search.candidates import Candidate, allowed, parse, parse_tables
from lutserve.search.sensitivity import MEASURES, Task, block, fisher, kl, linear, seed_mpl
from lutserve.search.sensitivity.task import Store
from lutserve.search.simulation import Simulation, units

FAMILIES = ["llama", "qwen2", "gpt2", "opt-gelu"]
CANDIDATES = [Candidate("int4", 64), Candidate("int8"), Candidate("none")]


@pytest.fixture(scope="module", params=FAMILIES)
def simulation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    folder = tmp_path_factory.mktemp("search") / request.param
    return Simulation(families.write(folder, request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    return Simulation(families.write(tmp_path_factory.mktemp("search") / "llama", "llama"))


def task(simulation: Simulation, file: Path, count: int = 2, granularity: str = "site") -> Task:
    chosen = units(simulation, granularity)
    windows = [torch.tensor(ids) for ids in families.prompts(count, 24)]
    return Task(simulation, chosen, dict.fromkeys(chosen, CANDIDATES), windows, Store(file))


def logits(model: Any, window: Tensor) -> Tensor:
    with torch.no_grad():
        return model(window[None], use_cache=False).logits[0]


def by_transformers(simulation: Simulation) -> Any:
    """The same model, by transformers alone and in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(simulation.folder, dtype=torch.float32).eval()


def parts_of(simulation: Simulation, model: Any, name: str) -> list[Any]:
    """Modules of a fused layer in that model."""
    site, block = simulation.sites[name], simulation.decoder[name]
    return [model.get_submodule(f"{simulation.arch.blocks}.{block}.{shard}") for shard in site.shards]


def kl_of(before: Tensor, after: Tensor) -> float:
    """KL in nats, summed over positions, by torch's own function and in float64."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return functional.kl_div(q, p, log_target=True, reduction="sum").item()


def weights(simulation: Simulation, name: str) -> list[Tensor]:
    """The weights [N, K] of a fused layer's parts in fp32."""
    return [operator.weight.float() for operator in simulation.operators[name]]


def test_a_change_is_undone_even_after_an_error(simulation: Simulation) -> None:
    window = torch.tensor(families.prompts(1, 24)[0])
    before = simulation.hidden_of([window])
    name = next(iter(simulation.sites))
    with pytest.raises(ZeroDivisionError), simulation.replaced({name: CANDIDATES[0].replacement}):
        assert not torch.equal(simulation.hidden_of([window]), before)
        _ = 1 / 0
    assert torch.equal(simulation.hidden_of([window]), before)


def test_kl_is_that_of_a_model_changed_by_hand(simulation: Simulation, tmp_path: Path) -> None:
    job = task(simulation, tmp_path / "store")
    job.candidates = dict.fromkeys(job.units, CANDIDATES[:1]) | {next(iter(job.units)): CANDIDATES}
    got = kl.scores(job)
    assert list(got) == list(simulation.sites)
    model = by_transformers(simulation)
    for name in list(got)[:3]:
        before = [logits(model, window) for window in job.windows]
        parts = parts_of(simulation, model, name)
        kept = [part.weight.data.clone() for part in parts]
        for part in parts:
            turned = part.weight.data.T if type(part).__name__ == "Conv1D" else part.weight.data
            rounded = rtn(turned, "int4", 64).dequantize()
            part.weight.data = rounded.T if type(part).__name__ == "Conv1D" else rounded
        after = [logits(model, window) for window in job.windows]
        for part, weight in zip(parts, kept, strict=True):
            part.weight.data = weight
        want = sum(map(kl_of, before, after)) / 48
        assert got[name]["int4"] == pytest.approx(want, rel=1e-3, abs=1e-7) and want > 1e-5
    first = got[next(iter(got))]
    assert first["none"] == 0 < abs(first["int8"]) < first["int4"]


def test_fisher_is_half_the_squared_product_of_gradient_and_change(
    simulation: Simulation, tmp_path: Path
) -> None:
    """The same numbers with gradients taken one output at a time by torch.autograd.grad."""
    job = task(simulation, tmp_path / "store", count=1)
    got = fisher.scores(job)
    outputs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in simulation.sites}
    handles = []
    model = by_transformers(simulation)
    for name in simulation.sites:
        for part in parts_of(simulation, model, name):

            def keep(module: Any, inputs: Any, output: Tensor, name: str = name) -> Tensor:
                output = output if output.requires_grad else output.requires_grad_(True)
                outputs[name].append((inputs[0].detach(), output))
                return output

            handles.append(part.register_forward_hook(keep))
    with torch.enable_grad():
        logs = model(job.windows[0][None], use_cache=False).logits[0].log_softmax(-1)
        labels = torch.multinomial(logs.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
        flat = [output for pairs in outputs.values() for _, output in pairs]
        gradients = iter(torch.autograd.grad(logs.gather(-1, labels).sum(), flat))
    for handle in handles:
        handle.remove()
    for name, pairs in outputs.items():
        total = 0.0
        for weight, (x, output) in zip(weights(simulation, name), pairs, strict=True):
            change = x.double() @ (rtn(weight, "int4", 64).dequantize() - weight).double().T
            total += (next(gradients).double() * change.view_as(output)).square().sum().item()
        assert got[name]["int4"] == pytest.approx(total / 2 / 24, rel=1e-3)
        assert got[name]["none"] == 0 < got[name]["int8"] < got[name]["int4"]


def test_fisher_predicts_kl(llama: Simulation, tmp_path: Path) -> None:
    job = task(llama, tmp_path / "store", count=8)
    predicted, measured = fisher.scores(job), kl.scores(job)
    pairs = [(predicted[u][m], measured[u][m]) for u in job.units for m in ("int4", "int8")]
    ratios = [a / b for a, b in pairs]
    assert 0.5 < sum(a for a, _ in pairs) / sum(b for _, b in pairs) < 2
    assert all(0.2 < ratio < 5 for ratio in ratios)


def test_linear_is_slope_times_relative_error(llama: Simulation, tmp_path: Path) -> None:
    job = task(llama, tmp_path / "store")
    got = linear.scores(job)
    name = next(iter(job.units))
    points = [(t, job.store.known[f"linear|{name}|{t}"]) for t in linear.NOISE]
    slope = sum(t * d for t, d in points) / sum(t * t for t, _ in points)
    weight = torch.cat(weights(llama, name))
    error = ((rtn(weight, "int4", 64).dequantize() - weight).square().sum() / weight.square().sum()).item()
    assert got[name]["int4"] == pytest.approx(slope * error, rel=1e-4)
    assert got[name]["none"] == 0
    noisy = linear._noisy("unit", 0.04, weight)
    assert ((noisy - weight).norm() / weight.norm()).item() == pytest.approx(0.2, rel=1e-4)
    assert torch.equal(noisy, linear._noisy("unit", 0.04, weight))
    # int8 rounds activations too: it counts as the noise that changes the layer's outputs as much.
    rows = weight / weight.abs().amax(1, keepdim=True) * 127
    alone = ((rows.round() - rows) * weight.abs().amax(1, keepdim=True) / 127).square().sum()
    assert got[name]["int8"] > 1.2 * slope * (alone / weight.square().sum()).item()
    assert got[name]["int8"] < 0.1 * got[name]["int4"]
    # In the middle of the noise the prediction is what noise of that size does.
    assert points[1][1] == pytest.approx(slope * linear.NOISE[1], rel=0.3)


def test_block_error_is_the_change_of_the_blocks_output(simulation: Simulation, tmp_path: Path) -> None:
    job = task(simulation, tmp_path / "store", count=1, granularity="block")
    got = block.scores(job)
    last = len(simulation.blocks()) - 1
    name = f"{simulation.arch.blocks}.{last}"
    seen: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = simulation.blocks()[last].register_forward_hook(keep)
    simulation.hidden_of(job.windows)
    # Only the last block is changed, so its input in the whole model is the unchanged one.
    with simulation.replaced(dict.fromkeys(job.units[name], CANDIDATES[0].replacement)):
        simulation.hidden_of(job.windows)
    handle.remove()
    want = (seen[1] - seen[0]).double().square().sum().item() / 24
    assert got[name]["int4"] == pytest.approx(want, rel=1e-4) and want > 0
    assert set(got) == {f"{simulation.arch.blocks}.{i}" for i in range(last + 1)}


def test_the_published_rule_is_linear_in_bits(simulation: Simulation, tmp_path: Path) -> None:
    job = task(simulation, tmp_path / "store", granularity="block")
    got = seed_mpl.scores(job)
    outputs: list[Tensor] = []
    last = [name for name in simulation.sites if name.endswith(simulation.arch.sites[-1].name)]
    model = by_transformers(simulation)
    for name in last:
        parts_of(simulation, model, name)[0].register_forward_hook(
            lambda m, i, output: outputs.append(output)
        )
    for window in job.windows:
        logits(model, window)
    for block_number, row in enumerate(got.values()):
        want = sum(outputs[i].square().sum().item() for i in (block_number, block_number + 2)) / 48
        assert row == {
            method: pytest.approx(want * n, rel=1e-4)
            for method, n in (("int4", 12), ("int8", 8), ("none", 0))
        }
    parts = seed_mpl.scores(task(simulation, tmp_path / "store"))
    whole = sum(row["int4"] for row in parts.values())
    assert whole == pytest.approx(sum(row["int4"] for row in got.values()))


@pytest.mark.parametrize("measure", list(MEASURES))
def test_an_interrupted_run_goes_on(llama: Simulation, tmp_path: Path, measure: str) -> None:
    whole = MEASURES[measure](task(llama, tmp_path / "whole"))
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    # Half of the lines, and one that was being written.
    half = lines[: len(lines) // 2]
    (tmp_path / "part").write_text("".join(half) + lines[len(half)][:9])
    told: list[float] = []
    job = task(llama, tmp_path / "part")
    job.done = told.append
    assert MEASURES[measure](job) == whole
    assert told[-1] == 1.0 and told == sorted(told)
    # Nothing is measured twice: a poisoned store is believed.
    poisoned = {name: 7.0 for line in lines for name in json.loads(line)}
    (tmp_path / "poisoned").write_text(json.dumps(poisoned) + "\n")
    scores = MEASURES[measure](task(llama, tmp_path / "poisoned"))
    assert scores != whole and (tmp_path / "poisoned").read_text().count("\n") == 1


def test_what_a_layer_can_take() -> None:
    down = Site("mlp.down_proj", (), 576, 1536, row_parallel=True)
    up = Site("mlp.gate_up_proj", (), 3072, 576)
    big, small = Candidate("int4", 1536), Candidate("int4", 64)
    assert allowed(down, [big, small, Candidate("int8")], 1) == [big, small, Candidate("int8")]
    assert allowed(down, [big, small, Candidate("int8")], 2) == [small, Candidate("int8")]
    assert allowed(up, [big, small], 2) == [big, small]
    assert not Candidate("nf4", -1).fits(down, 2) and Candidate("nf4", -1).fits(down, 1)
    assert not Candidate("nf4", 12).fits(up)
    with pytest.raises(UserError, match="fit none of the candidates"):
        allowed(down, [big], 2)
    # mix4 is mix8 in down_proj; AxCore's blocks are 64 rows of every part by a whole group.
    assert not Candidate("mix4", 64).fits(down) and Candidate("mix4", 64).fits(up)
    axcore = Candidate("axcore", 64)
    assert axcore.fits(Site("qkv_proj", (), 192, 576, cuts=(128, 64)))
    assert not axcore.fits(Site("qkv_proj", (), 192, 576, cuts=(96, 96)))
    assert not axcore.fits(Site("o_proj", (), 64, 100, cuts=(64,)))


def test_candidates_are_checked() -> None:
    assert [c.name for c in parse("int4, none", 64)] == ["int4", "none"]
    both = parse("nf4,nf4@32,nf4@-1,mix8", 64)
    assert [(c.name, c.group_size) for c in both[:3]] == [("nf4", 64), ("nf4@32", 32), ("nf4@-1", -1)]
    assert len({c.key for c in both}) == 4
    for names, message in [
        ("", "give names"),
        ("int4,int4", "each once"),
        ("fpma", "fpma cannot be a candidate"),
        ("mix4:a4", "cannot be a candidate"),
        ("nf4@x", "a group size"),
        ("nf4@0", "groups of 0"),
        ("nf5", "unknown method"),
    ]:
        with pytest.raises(UserError, match=message):
            parse(names, 64)
    assert [table.name for table in parse_tables("nli-2,nnlut:16")] == ["nli-2", "nnlut:16"]
    for names, message in [("nli-3", "unknown look-up table"), ("exact", "stays? exact|is exact")]:
        with pytest.raises(UserError, match=message):
            parse_tables(names)


def test_a_score_belongs_to_the_values_of_a_format(tmp_path: Path) -> None:
    keys = set()
    for values in ([-1.0, 0.0, 1.0], [-1.0, 0.0, 0.5]):
        (tmp_path / "mine.json").write_text(json.dumps({"values": values}))
        keys.add(Candidate(str(tmp_path / "mine.json"), 64).key)
    assert len(keys | {Candidate("int4", 64).key, Candidate("int4", 32).key}) == 4


def test_unknown_granularity(llama: Simulation) -> None:
    with pytest.raises(UserError, match="allowed: site, block"):
        units(llama, "head")
