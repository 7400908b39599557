"""`lutserve profile distributions`: fits against scipy and golden ones, samples against a model's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import check_grad
from typer.testing import CliRunner

from lutserve.cli import app
from lutserve.errors import UserError
from lutserve.profile import distributions, student
from lutserve.profile.plot import Gallery

TEXT = "The river rises in the hills north of the town. " * 40


# --- fits ---------------------------------------------------------------------------------------------------


def test_golden_fits(shared: Path) -> None:
    """As likely as scipy's to 1e-4 nats a number; the same nu, where the data say what it is."""
    cases = json.loads((shared / "golden/datatypes/tfit.json").read_text())["cases"]
    samples = np.load(shared / "golden/datatypes/tfit_samples.npz")
    assert set(cases) == set(samples)
    for name, expected in cases.items():
        for kind, loc in (("free", None), ("loc0", 0.0)):
            golden, found = expected[kind], student.fit(samples[name], loc)
            assert found.ll_t >= golden["ll_t"] - 1e-4, name
            assert found.ll_normal == pytest.approx(golden["ll_norm"], abs=1e-6)
            # Golden fits stopped up to 1.4 % short of the best nu.
            if golden["nu"] < 100:
                assert found.nu == pytest.approx(golden["nu"], rel=0.02), name
                assert found.scale == pytest.approx(golden["scale"], rel=0.01)
            else:
                assert found.nu > 100
            assert found.mu == pytest.approx(golden["mu"], abs=1e-7)
            assert found.sigma == pytest.approx(golden["sigma"], rel=1e-5)
            assert found.ks_normal == pytest.approx(golden["ks_norm"], abs=1e-4)
            assert found.ks_t == pytest.approx(golden["ks_t"], abs=0.01)
            assert not found.point_mass


@settings(deadline=None, max_examples=10)
@given(st.floats(0.8, 30), st.floats(-3, 3), st.floats(-12, 12), st.integers(0, 2**32 - 1))
def test_a_fit_is_the_likeliest(nu: float, place: float, exponent: float, seed: int) -> None:
    """No worse than scipy's and than the truth; numbers as scipy computes them; found wherever data lie."""
    scale = 2.0**exponent
    x = scale * (place + np.random.default_rng(seed).standard_t(nu, 2000))
    fit = student.fit(x)
    assert fit.ll_t == pytest.approx(stats.t.logpdf(x, fit.nu, fit.loc, fit.scale).mean(), abs=1e-9)
    assert fit.ll_t >= stats.t.logpdf(x, *stats.t.fit(x)).mean() - 1e-7
    assert fit.ll_t >= stats.t.logpdf(x, nu, place * scale, scale).mean() - 1e-9
    assert fit.ll_normal == pytest.approx(stats.norm.logpdf(x, *stats.norm.fit(x)).mean(), abs=1e-9)
    t, normal = stats.t(fit.nu, fit.loc, fit.scale), stats.norm(fit.mu, fit.sigma)
    assert fit.ks_t == pytest.approx(stats.kstest(x, t.cdf).statistic, abs=1e-9)
    assert fit.ks_normal == pytest.approx(stats.kstest(x, normal.cdf).statistic, abs=1e-9)
    assert fit.ks_delta == fit.ks_normal - fit.ks_t and not fit.point_mass
    shuffled = student.fit(np.random.default_rng(1).permutation(x).reshape(40, 50))
    assert shuffled.nu == pytest.approx(fit.nu, rel=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 5))
def test_the_gradient_is_the_slope(shift: float, log_scale: float, log_nu: float) -> None:
    z = np.random.default_rng(3).standard_t(3, 500)
    error = check_grad(
        lambda p: student._loss(p, z, True)[0],
        lambda p: student._loss(p, z, True)[1],
        np.array([shift, log_scale, log_nu]),
    )
    assert error < 1e-4


def test_numbers_that_are_mostly_one_number() -> None:
    """Zeros behind a ReLU: an ever narrower t fits them ever better, and the fit says so."""
    random = np.random.default_rng(0)
    numbers = random.standard_t(5, 20_000)
    assert student.fit(np.maximum(numbers, 0)).point_mass
    assert student.fit(np.where(random.random(20_000) < 0.95, 0, numbers)).point_mass
    # Few values, as in a weight of four bits, are no such case.
    assert student.fit(np.round(numbers * 2)).nu == pytest.approx(5, rel=0.1)
    # A normal with outliers is no point mass, however far they lie.
    outliers = np.r_[random.normal(size=20_000), 1e6]
    fit = student.fit(outliers)
    assert not fit.point_mass and fit.scale == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("bad", [[], [1.0] * 7, [2.0] * 100, [0.0] * 9 + [math.nan], [0.0] * 9 + [math.inf]])
def test_no_fit_of_such_numbers(bad: list[float]) -> None:
    with pytest.raises(UserError, match="8 or more finite numbers"):
        student.fit(bad)


# --- a model's weights and inputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt-relu", "qwen3_moe"])
def test_every_linear_layer(tmp_path: Path, family: str) -> None:
    """Each layer once, each input once, with all of its numbers where they are few."""
    folder = families.write(tmp_path / family, family)
    drawn: dict[tuple[str, str], torch.Tensor] = {}
    steps: list[tuple[int, int]] = []
    report = distributions.profile(
        str(folder),
        TEXT,
        window=32,
        windows=2,
        dtype="float32",
        sample=10**6,
        done=lambda *step: steps.append(step),
        show=lambda row, numbers: drawn.update({(row["kind"], row["layers"][0]): numbers}),
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT).input_ids[:64]
    seen: dict[str, list[torch.Tensor]] = {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    }
    for name, module in layers.items():
        module.register_forward_pre_hook(lambda m, a, name=name: seen.setdefault(name, []).append(a[0]))
    with torch.no_grad():
        for part in torch.tensor(ids).view(2, 1, 32):
            model(part)
    assert steps[-1] == (2 + len(layers), 2 + len(layers))
    weights = [row for row in report["rows"] if row["kind"] == "weight"]
    assert [row["layers"] for row in weights] == [[name] for name in layers]
    inputs = [row for row in report["rows"] if row["kind"] == "input"]
    assert sorted(name for row in inputs for name in row["layers"]) == sorted(layers)
    for row in report["rows"]:
        name = row["layers"][0]
        numbers = drawn[row["kind"], name]
        exact = layers[name].weight.flatten() if row["kind"] == "weight" else torch.cat(seen[name]).flatten()
        assert row["count"] == row["sampled"] == exact.numel()
        assert torch.equal(numbers.sort().values, exact.detach().sort().values)
        assert row["zeros"] == pytest.approx((exact == 0).float().mean().item())
    shared_by = {"llama": 3, "gpt2": 1, "opt-relu": 3, "qwen3_moe": 3}[family]
    assert len(inputs[0]["layers"]) == shared_by
    if family == "opt-relu":
        behind = next(row for row in inputs if row["type"] == "fc2")
        assert behind["zeros"] > 0.3


def test_samples_are_drawn_from_the_numbers(tmp_path: Path) -> None:
    folder = str(families.write(tmp_path / "llama", "llama"))
    settings = {"window": 32, "windows": 2, "sample": 1000, "blocks": [1]}
    reports = [distributions.profile(folder, TEXT, **settings) for _ in range(2)]
    assert reports[0] == reports[1]
    rows = reports[0]["rows"]
    assert all(".1." in name for row in rows for name in row["layers"]) and len(rows) == 7 + 4
    assert all(row["sampled"] == 1000 < row["count"] for row in rows)
    # The weights are drawn from a normal distribution.
    query = rows[0]["fit"]
    assert query["sigma"] == pytest.approx(1.6 / 128**0.5, rel=0.1) and query["nu"] > 8
    with pytest.raises(UserError, match=r"no linear layer in blocks \[7\]"):
        distributions.profile(folder, TEXT, window=32, windows=1, blocks=[7])


def test_random_tokens_need_no_text(tmp_path: Path) -> None:
    folder = families.write(tmp_path / "llama", "llama")
    (folder / "tokenizer.json").unlink()
    report = distributions.profile(str(folder), None, window=16, windows=3, sample=1000)
    assert report["windows"] == 3 and report["rows"][1]["count"] == 3 * 16 * 128


def _entry(nu: float, delta: float, point_mass: bool = False) -> dict[str, Any]:
    fit = {"nu": nu, "ks_delta": delta, "point_mass": point_mass}
    return {"kind": "weight", "type": "fc1", "fit": fit}


def test_summary() -> None:
    rows = [_entry(2, 0.1), _entry(1e5, -0.1), _entry(3, 0.3), _entry(0.05, 9, True)]
    rows += [{"kind": "weight", "type": "fc1", "fit": None}]
    fc1, weights, inputs = distributions.summary(rows)
    assert (fc1["layers"], fc1["fits"]) == (5, 3) and fc1 | {"type": "all"} == weights
    assert (fc1["nu_mean"], fc1["nu_median"], fc1["ks_delta_mean"]) == pytest.approx((35, 3, 0.1))
    assert fc1["t_better"] == pytest.approx(2 / 3)
    assert inputs["layers"] == 0 and inputs["nu_mean"] is None


# --- the command --------------------------------------------------------------------------------------------


def test_command(tmp_path: Path) -> None:
    folder, text = families.write(tmp_path / "gpt2", "gpt2"), tmp_path / "text"
    text.write_text(TEXT)
    out, pictures = tmp_path / "new/fits.json", tmp_path / "pictures"
    arguments = ["profile", "distributions", str(folder), "--data", str(text), "--window", "32"]
    arguments += ["--windows", "2", "--blocks", "0", "--sample", "2000", "-o", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--plot", str(pictures), "--layers"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "mlp.c_proj" in done.stdout and "transformer.h.0.attn.c_attn" in done.stdout
    report = json.loads(out.read_text())
    assert report["schema"] == "lutserve-distributions-1" and report["made_with"]["versions"]["torch"]
    assert len(report["rows"]) == 8 and [p.name for p in out.parent.iterdir()] == ["fits.json"]
    names = {f"{row['kind']}-{row['layers'][0]}.png" for row in report["rows"]}
    assert {p.name for p in pictures.iterdir()} == names
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "a"], "--blocks a; allowed: numbers from 0 up"),
        (["--dtype", "int8"], "--dtype int8; allowed"),
        (["--data", "/nowhere"], "cannot read --data /nowhere"),
    ],
)
def test_bad_requests_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    folder = families.write(tmp_path / "m", "llama")
    command = ["profile", "distributions", str(folder), "--data", "random", *arguments]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_pictures_need_a_folder_that_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        Gallery(tmp_path / "file/below")
