"""Matrices, their store, comparisons and claims; the server is tests/fake_openai.py, real ones at the end."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lutserve[eval]")

from fake_openai import Fake, fake_server
from servers import SMALL

from lutserve.errors import UserError
from lutserve.eval import claim, compare, matrix, run, store
from lutserve.eval.matrix import Claim, Matrix
from lutserve.eval.runner import Outcome, metrics, run_matrix
from lutserve.server.client import running_server

QUESTIONS = 8
TEXT = " ".join(f"A mill stood here for {year} years." for year in range(300, 330))
RUN = """
import resource, sys
from pathlib import Path
from lutserve.errors import UserError
from lutserve.eval import matrix
from lutserve.eval.runner import run_matrix
file, output, data, url, size = sys.argv[1:]
if int(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
try:
    outcome = run_matrix(
        matrix.load(Path(file)), output=Path(output), data=Path(data), base_url=url or None, num_concurrent=2
    )
except UserError as error:
    sys.exit(f"UserError: {error}")
sys.exit("; ".join(outcome.failures.values()))
"""


@pytest.fixture(autouse=True)
def no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval runs `pip list` at the end of every evaluation: seconds each."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An offline data folder with a task, and a text."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tasks").mkdir()
    (folder / "text.txt").write_text(TEXT)
    rows = [{"q": f"How many is {i}?", "a": [f"{i} apples", "none"], "gold": i % 2} for i in range(QUESTIONS)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks" / "local_choice.yaml").write_text(
        f"task: local_choice\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'choice.jsonl'}}}}}\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: a\ndoc_to_target: gold\n"
        "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    return folder


def written(folder: Path, data: Path, model: str, recipes: str = "{served: ''}", more: str = "") -> Path:
    """A matrix file of a question task and two perplexities."""
    file = folder / "matrix.yaml"
    text = data / "text.txt"
    file.write_text(
        f"name: small\nmodels: ['{model}']\nrecipes: {recipes}\n"
        f"tasks: [choice, {{ppl: '{text}', window: 16}}, {{ppl: wikitext2, window: 32, windows: 2}}]\n{more}"
    )
    return file


@pytest.fixture
def fake(tiny: Path) -> Iterator[Fake]:
    with fake_server(str(tiny)) as running:
        yield running


@pytest.fixture(scope="module")
def two_tasks(data: Path, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    file = written(tmp_path_factory.mktemp("matrix"), data, str(tiny))
    file.write_text(file.read_text().replace(", {ppl: wikitext2, window: 32, windows: 2}", ""))
    return file


def evaluate(file: Path, output: Path, data: Path, url: str | None) -> Outcome:
    return run_matrix(matrix.load(file), output=output, data=data, base_url=url, num_concurrent=2)


def in_a_process(file: Path, output: Path, data: Path, url: str, size: int = 0) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", RUN, file, output, data, url, str(size)]
    return subprocess.Popen([str(part) for part in argv], stderr=subprocess.PIPE)


def test_a_run_keeps_every_cell_once(fake: Fake, data: Path, two_tasks: Path, tmp_path: Path) -> None:
    outcome = evaluate(two_tasks, tmp_path, data, fake.url)
    assert outcome.failures == {}
    choice, ppl = outcome.rows
    assert store.read(tmp_path) == [json.loads(json.dumps(row)) for row in (choice, ppl)]
    assert (choice["task"], choice["n"], choice["recipe"]) == ("choice", QUESTIONS, "served")
    assert set(choice["metrics"]["acc"]) == {"value", "stderr"}
    assert ppl["metrics"]["ppl"]["value"] == pytest.approx(math.exp(ppl["metrics"]["nll"]["value"]))
    assert json.loads((tmp_path / choice["results"]).read_text())["results"]["local_choice"]
    assert len((tmp_path / choice["samples"]).read_text().splitlines()) == QUESTIONS
    assert choice["provenance"]["machine"] and choice["provenance"]["command"] == ["lutserve"]
    assert list((tmp_path / ".resume").iterdir()) == []
    asked = fake.answered
    assert evaluate(two_tasks, tmp_path, data, fake.url).rows == store.read(tmp_path)
    assert fake.answered == asked
    other = two_tasks.read_text().replace("window: 16", "window: 8")
    (tmp_path / "other.yaml").write_text(other)
    assert len(evaluate(tmp_path / "other.yaml", tmp_path, data, fake.url).rows) == 2
    assert len(store.read(tmp_path)) == 3


def test_kill_dash_nine(tiny: Path, data: Path, two_tasks: Path, tmp_path: Path) -> None:
    after = QUESTIONS + 4  # in the second cell
    with fake_server(str(tiny)) as whole:
        expected = evaluate(two_tasks, tmp_path / "whole", data, whole.url)
    with fake_server(str(tiny), fail_after=after, fail_status=503) as fake:
        process = in_a_process(two_tasks, tmp_path / "cut", data, fake.url)
        deadline = time.monotonic() + 120
        while fake.answered < after and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        fake.fail_after = None
        again = evaluate(two_tasks, tmp_path / "cut", data, fake.url)
    assert again.failures == {}
    assert [row["metrics"] for row in again.rows] == [row["metrics"] for row in expected.rows]
    assert len(store.read(tmp_path / "cut")) == 2
    # At most the two questions in flight are asked again.
    assert whole.answered <= fake.answered <= whole.answered + 2


def test_a_full_disk(fake: Fake, data: Path, two_tasks: Path, tmp_path: Path) -> None:
    """No file may grow past 9000 bytes, which is too few for the answers of a cell."""
    process = in_a_process(two_tasks, tmp_path / "cut", data, fake.url, 9000)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert b"cannot keep answers" in err
    assert b"Traceback" not in err
    assert store.read(tmp_path / "cut") == []
    again = evaluate(two_tasks, tmp_path / "cut", data, fake.url)
    assert again.failures == {}
    assert len(store.read(tmp_path / "cut")) == 2


def test_lm_evals_files_are_whole_or_an_error(tmp_path: Path) -> None:
    sample = {"doc_id": 0, "arguments": [], "resps": [], "filtered_resps": [], "target": "t"}
    sample |= {"doc_hash": "d", "prompt_hash": "p", "target_hash": "t"}
    results = {"results": {"t": {"acc,none": 1.0}}, "configs": {"t": {}}, "samples": {"t": [sample] * 3}}
    with files_up_to(100), pytest.raises(UserError, match="is there space"):
        run.write(dict(results), tmp_path / "full", "m")
    path, samples = run.write(dict(results), tmp_path / "room", "m")
    assert path.is_file()
    assert len(samples["t"].read_text().splitlines()) == 3


def test_a_dying_server_costs_its_cells_only(tiny: Path, data: Path, two_tasks: Path, tmp_path: Path) -> None:
    with fake_server(str(tiny), fail_after=QUESTIONS + 2) as fake:
        outcome = evaluate(two_tasks, tmp_path, data, fake.url)
        assert [row["task"] for row in outcome.rows] == ["choice"]
        assert all("go on" in reason for reason in outcome.failures.values()) and len(outcome.failures) == 1
        fake.fail_after = None
        assert evaluate(two_tasks, tmp_path, data, fake.url).failures == {}
    assert len(store.read(tmp_path)) == 2


ROW = {"cell": "a", "metrics": {"acc": {"value": 0.5, "stderr": None}}}


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let no file grow past `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_store_survives_a_full_disk_and_a_cut_line(tmp_path: Path) -> None:
    with store.opened(tmp_path) as kept:
        kept.add(ROW)
        size = (tmp_path / "cells.jsonl").stat().st_size
        with files_up_to(size + 10), pytest.raises(store.Full, match="make room"):
            kept.add(ROW | {"cell": "b"})
        assert store.read(tmp_path) == [ROW]
        kept.add(ROW | {"cell": "c"})
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"cell": "d", "met')
    assert [row["cell"] for row in store.read(tmp_path)] == ["a", "c"]
    with store.opened(tmp_path) as kept:
        kept.add(ROW | {"cell": "e"})
    assert [row["cell"] for row in store.read(tmp_path)] == ["a", "c", "e"]


def test_store_refuses_damage_and_company(tmp_path: Path) -> None:
    with store.opened(tmp_path), pytest.raises(UserError, match="in use"), store.opened(tmp_path):
        pass
    (tmp_path / "cells.jsonl").write_text(json.dumps(ROW) + "\nnonsense\n")
    with pytest.raises(UserError, match="line 2"):
        store.read(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        store.read(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot write"), store.opened(tmp_path / "cells.jsonl"):
        pass


GOOD = "name: x\nmodels: [m]\nrecipes: {a: '', b: '--lut nli-4'}\ntasks: [piqa]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "valid dictionary"),
        ("a: [", "no YAML"),
        (GOOD + "modles: [m]\n", "modles"),
        (GOOD.replace("[m]", "[]"), "models"),
        (GOOD.replace("[m]", "[m, m]"), "twice"),
        (GOOD.replace("{a: '', b: '--lut nli-4'}", "{}"), "recipes"),
        (GOOD.replace("{a:", "{'a/b':"), "recipes"),
        (GOOD.replace("--lut", "--model y --lut"), "models are given"),
        (GOOD.replace("--lut", "'"), "quotation|no YAML|mapping"),
        (GOOD.replace("[piqa]", "[{ppl: wikitext2, window: 1}]"), "window"),
        (GOOD.replace("[piqa]", "[{ppl: wikitext2, windws: 1}]"), "windws"),
        (GOOD + "baseline: c\n", "no recipe"),
        (GOOD + "limit: 0\n", "limit"),
        (GOOD + "published: [{model: m, recipe: c, task: piqa, metric: acc, value: 1}]\n", "no cell"),
        (GOOD + "claims: [{model: m, recipe: b, task: piqa, metric: acc}]\n", "expected, recovery"),
    ],
)
def test_bad_matrices(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        matrix.load(tmp_path / "m.yaml")
    assert "\n" not in str(caught.value)


def test_bad_runs(tmp_path: Path, data: Path, two_tasks: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        matrix.load(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="--preset nothing"):
        matrix.preset("nothing")
    several = matrix.load(two_tasks).with_changes(["a", "b"], None)
    with pytest.raises(UserError, match="one model and one recipe"):
        run_matrix(several, output=tmp_path, data=data, base_url="http://127.0.0.1:9")
    misspelt = two_tasks.read_text().replace("choice", "choise")
    (tmp_path / "m.yaml").write_text(misspelt)
    with pytest.raises(UserError, match="did you mean 'choice'"):
        evaluate(tmp_path / "m.yaml", tmp_path / "out", data, None)
    no_text = two_tasks.read_text().replace("text.txt", "test.txt")
    (tmp_path / "m.yaml").write_text(no_text)
    with pytest.raises(UserError, match="no such text"):
        evaluate(tmp_path / "m.yaml", tmp_path / "out", data, None)


def test_metrics_of_lm_eval() -> None:
    values = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "em,strip": 1.0,
        "em_stderr,strip": "N/A",
    }
    assert metrics(values) == {
        "acc": {"value": 0.5, "stderr": 0.1},
        "em,strip": {"value": 1.0, "stderr": None},
    }


def stored(folder: Path, recipe: str, values: list[float], name: str = "acc") -> None:
    """A store with one question task and one perplexity, `values` for both."""
    folder.mkdir(exist_ok=True)
    samples = [
        {"doc_id": i, "doc_hash": f"h{i}", "filter": "none", name: value} for i, value in enumerate(values)
    ]
    (folder / f"{recipe}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    (folder / f"{recipe}.json").write_text(json.dumps({"nll": values}))
    common = {"model": "m", "recipe": recipe, "settings": {"window": 16}}
    score = {"value": float(np.mean(values)), "stderr": None}
    rows = [
        common | {"cell": recipe + "1", "task": "t", "metrics": {name: score}, "samples": f"{recipe}.jsonl"},
        common
        | {"cell": recipe + "2", "task": "ppl:x", "metrics": {"nll": score}, "samples": None}
        | {"results": f"{recipe}.json"},
    ]
    with store.opened(folder) as kept:
        for row in rows:
            kept.add(row)


def test_compare(tmp_path: Path) -> None:
    a, b = [0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0]
    stored(tmp_path, "a", a)
    stored(tmp_path, "b", b)
    with pytest.raises(UserError, match="its recipes are a, b"):
        compare.side(str(tmp_path))
    found = compare.compare(compare.side(f"{tmp_path}:a"), compare.side(f"{tmp_path}:b"))
    change = np.subtract(b, a)
    for one in found:
        assert (one.a, one.b, one.n) == (0.6, 0.4, 5)
        assert one.mean == pytest.approx(change.mean())
        assert one.stderr == pytest.approx(change.std(ddof=1) / math.sqrt(5))
    assert [(one.metric, one.flips) for one in found] == [("acc", 0.6), ("nll", 0.6)]
    stored(tmp_path / "c", "c", [1.25, 2.0])
    alone = compare.side(str(tmp_path / "c"))
    assert compare.compare(alone, alone)[1].flips is None
    with pytest.raises(UserError, match="other items"):
        compare.compare(compare.side(f"{tmp_path}:a"), alone)
    (tmp_path / "c" / "c.jsonl").unlink()
    with pytest.raises(UserError, match="remove its line"):
        compare.compare(alone, alone)


def rows_of(base: float, value: float, metric: str) -> list[dict[str, Any]]:
    common = {"model": "m", "task": "t"}
    scores = {"exact": base, "b": value}
    return [common | {"recipe": r, "metrics": {metric: {"value": v}}} for r, v in scores.items()]


@pytest.mark.parametrize(
    ("base", "value", "metric", "check", "holds"),
    [
        (0.8, 0.79, "acc", {"recovery": 0.98}, True),
        (0.8, 0.78, "acc", {"recovery": 0.98}, False),
        (20.0, 20.1, "ppl", {"recovery": 0.99}, True),
        (20.0, 20.3, "ppl", {"recovery": 0.99}, False),
        (20.0, 20.3, "word_perplexity", {"recovery": 0.99}, False),
        (20.0, 20.1, "ppl", {"expected": 20.0, "tolerance": 0.006}, True),
        (20.0, 20.1, "ppl", {"expected": 20.0, "tolerance": 0.004}, False),
        (20.0, 20.1, "ppl", {"expected": 20.1, "recovery": 0.999}, False),
    ],
)
def test_claims(base: float, value: float, metric: str, check: dict[str, float], holds: bool) -> None:
    made = Matrix.model_validate(
        {"name": "x", "models": ["m"], "recipes": {"exact": "", "b": ""}, "tasks": ["t"]}
        | {"claims": [{"model": "m", "recipe": "b", "task": "t", "metric": metric} | check]}
    )
    (verdict,) = claim.check(made, rows_of(base, value, metric))
    assert verdict.holds is holds
    (missing,) = claim.check(made, [])
    assert not missing.holds and "no " in missing.reason
    assert claim.check(made.with_changes(["other"], None), []) == []


def test_our_own_claims_are_well_formed() -> None:
    assert all(isinstance(one, Claim) for found in matrix.claims() for one in found.claims)
    assert any(found.claims for found in matrix.claims())


@pytest.mark.extended
@pytest.mark.timeout(1200)
def test_real_servers_one_of_which_is_killed(tiny: Path, data: Path, tmp_path: Path) -> None:
    flags = " ".join(SMALL)
    recipes = f"{{exact: '--method none {flags}', mix8: '--method mix8 {flags}'}}"
    file = written(tmp_path, data, str(tiny), recipes)
    file.write_text(file.read_text().replace(", {ppl: wikitext2, window: 32, windows: 2}", ""))
    process = in_a_process(file, tmp_path / "out", data, "")
    try:
        cells = tmp_path / "out" / "cells.jsonl"
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            if cells.exists() and cells.read_bytes().count(b"\n"):
                break
            time.sleep(0.02)
        # The first recipe's server, after its first cell; the runner goes on to the second recipe's.
        for child in children(process.pid):
            os.kill(child, signal.SIGKILL)
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
    kept = store.read(tmp_path / "out")
    assert [row["recipe"] for row in kept][-2:] == ["mix8", "mix8"]
    assert (process.returncode == 0) == (len(kept) == 4), err
    outcome = evaluate(file, tmp_path / "out", data, None)
    assert outcome.failures == {}
    again = store.read(tmp_path / "out")
    assert again[: len(kept)] == kept
    assert len(again) == len({row["cell"] for row in again}) == 4
    bits = {row["recipe"]: row["bits"] for row in again}
    assert 8 < bits["mix8"] < 16
    differences = compare.compare(
        compare.side(f"{tmp_path / 'out'}:exact"), compare.side(f"{tmp_path / 'out'}:mix8")
    )
    assert {(one.task, one.metric) for one in differences} >= {("choice", "acc")}


def children(pid: int) -> list[int]:
    """Direct child processes."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_equal_to_lm_evals_own_command(shared: Path, tmp_path: Path) -> None:
    names = ["piqa", "arc_easy", "lambada_openai", "wikitext2"]
    model = shared / "models" / "tiny-llama-pydoc"
    flags = ["--model", str(model), "--dtype", "float16", *SMALL]
    ours_file = tmp_path / "m.yaml"
    ours_file.write_text(f"name: x\nmodels: [m]\nrecipes: {{a: ''}}\nlimit: 6\ntasks: [{', '.join(names)}]\n")
    with running_server(flags, log=tmp_path / "log") as server:
        outcome = evaluate(ours_file, tmp_path / "ours", shared / "data", server.base_url)
        arguments = f"model={server.model},base_url={server.base_url}/v1/completions,tokenizer={model},"
        arguments += "tokenizer_backend=huggingface,num_concurrent=8,max_length=512"
        argv = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
        argv += ["--tasks", ",".join(f"local_{name}" for name in names), "--limit", "6", "--log_samples"]
        argv += ["--include_path", str(shared / "data/tasks"), "--output_path", str(tmp_path / "theirs")]
        environment = os.environ | run.offline(shared / "data")
        subprocess.run(argv, env=environment, check=True, capture_output=True)
    assert outcome.failures == {}
    (path,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]
    for row in outcome.rows:
        expected = metrics(theirs[f"local_{row['task']}"])
        assert {name: one["value"] for name, one in row["metrics"].items()} == {
            name: one["value"] for name, one in expected.items()
        }
        samples = [json.loads(line) for line in (tmp_path / "ours" / row["samples"]).read_text().splitlines()]
        (other,) = path.parent.glob(f"samples_local_{row['task']}_*.jsonl")
        known = [json.loads(line) for line in other.read_text().splitlines()]
        assert [one["filtered_resps"] for one in samples] == [one["filtered_resps"] for one in known]
