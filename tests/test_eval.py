"""`lutserve eval`: task names, what is asked of the server, and going on after a kill.

The server of most tests is tests/fake_openai.py: the subject is our own memory and files. The slow
tests at the end run against a real one.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs lutserve[eval]")

from fake_openai import Fake, fake_server, logprob
from servers import SMALL
from tiny import tiny_llama

from lutserve.errors import UserError
from lutserve.eval import tasks
from lutserve.eval.answers import Answers, digest
from lutserve.eval.ppl import perplexity
from lutserve.eval.run import Outcome, Settings, run
from lutserve.eval.texts import wikitext2
from lutserve.server.client import running_server

QUESTIONS = 6
DOCUMENTS = 3
WINDOW = 64


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder; only its tokenizer is used."""
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(params=[True, False], ids=["route", "completions"])
def fake(root: str, request: pytest.FixtureRequest) -> Iterator[Fake]:
    """A server with our scoring route, and one without."""
    with fake_server(root, scores=request.param) as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An offline data folder with a multiple-choice, a rolling and a generation task."""
    folder = tmp_path_factory.mktemp("data")
    rows: dict[str, list[dict[str, Any]]] = {
        "choice": [
            {"q": f"How many is {i}?", "a": [f"{i} apples", "none"], "gold": 0} for i in range(QUESTIONS)
        ],
        "roll": [
            {"text": f"Document {i}. " + "The river rises in the hills. " * 20} for i in range(DOCUMENTS)
        ],
        "say": [{"q": f"Say {i}", "a": str(i)} for i in range(2)],
    }
    bodies = {
        "choice": "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: a\ndoc_to_target: gold\n"
        "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n",
        "roll": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: text\n'
        "metric_list:\n- {metric: byte_perplexity}\n",
        "say": "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
        "metric_list:\n- {metric: exact_match, aggregation: mean, higher_is_better: true}\n",
    }
    (folder / "tasks").mkdir()
    for name, body in bodies.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        head = f"task: local_{name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        (folder / "tasks" / f"local_{name}.yaml").write_text(head + body)
    return folder


@pytest.fixture(autouse=True)
def no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval runs `pip list` at the end of every evaluation: seconds each."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def evaluate(fake: Fake, data: Path, output: Path, *names: str, **options: Any) -> Outcome:
    settings = Settings(tuple(names), max_length=WINDOW, num_concurrent=4)
    return run(settings, output=output, base_url=fake.url, data=data, **options)


def test_answers_survive_and_do_not_care_about_key_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.sqlite"
    first = Answers(path)
    first.put({"a": 1, "b": [2]}, [[-0.1, True]])
    # Not closed: the second reader sees what a killed process leaves.
    second = Answers(path)
    assert second.get({"b": [2], "a": 1}) == [[-0.1, True]]
    assert second.get({"a": 1}) is None
    assert second.count() == 1
    first.close()
    second.delete()
    assert list(path.parent.iterdir()) == []


def test_an_answer_file_that_is_none_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no database, but long enough to be taken for one" * 10)
    with pytest.raises(UserError, match="not a database"):
        Answers(tmp_path / "x")


def test_digest_separates_values() -> None:
    assert digest([1, "1"]) != digest(["1", 1])
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


@pytest.mark.parametrize("name", ["choice", "local_choice"])
def test_local_task_names(data: Path, name: str) -> None:
    assert tasks.local_names([name], data) == ["local_choice"]


def test_unknown_local_task_lists_what_is_there(data: Path) -> None:
    with pytest.raises(UserError, match=r"'choise', did you mean 'choice'\?; .* has: choice, roll, say"):
        tasks.local_names(["choise"], data)


def test_folder_without_task_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task files"):
        tasks.local_names(["piqa"], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "no task"),
        ({"limit": 0}, "--limit 0"),
        ({"num_concurrent": 1}, "2 or more"),
        ({"tasks": ("choise",)}, "unknown task"),
    ],
)
def test_bad_settings(tmp_path: Path, data: Path, change: dict[str, Any], message: str) -> None:
    settings = Settings(**({"tasks": ("choice",)} | change))
    with pytest.raises(UserError, match=message):
        run(settings, output=tmp_path, base_url="http://127.0.0.1:9", data=data)


def test_bad_folders_and_servers(tmp_path: Path, data: Path) -> None:
    settings = Settings(("choice",))
    with pytest.raises(UserError, match="no folder"):
        run(settings, output=tmp_path, data=tmp_path / "absent")
    with pytest.raises(UserError, match="no server at http"):
        run(settings, output=tmp_path, base_url="http://127.0.0.1:9", data=data)
    with pytest.raises(UserError, match="are for one to start"):
        run(settings, output=tmp_path, base_url="http://127.0.0.1:9", model="x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        run(settings, output=tmp_path / "file", base_url="http://127.0.0.1:9")


def test_a_run_writes_lm_evals_files_and_forgets_its_answers(fake: Fake, data: Path, tmp_path: Path) -> None:
    outcome = evaluate(fake, data, tmp_path, "choice", "roll", "say")
    stored = json.loads(outcome.path.read_text())
    assert outcome.path.parent == tmp_path / "fake"
    assert sorted(stored["results"]) == ["local_choice", "local_roll", "local_say"]
    assert stored["n-samples"]["local_choice"]["effective"] == QUESTIONS
    assert stored["lutserve"]["recipe"] == fake.recipe
    assert stored["lutserve"]["settings"]["tasks"] == ["choice", "roll", "say"]
    samples = list(outcome.path.parent.glob("samples_local_choice_*.jsonl"))
    assert len(samples) == 1
    assert len(samples[0].read_text().splitlines()) == QUESTIONS
    assert "local_roll" in outcome.table()
    assert list((tmp_path / ".resume").iterdir()) == []
    before = fake.answered
    again = evaluate(fake, data, tmp_path, "choice", "roll", "say")
    assert fake.answered == 2 * before
    assert again.results["results"] == outcome.results["results"]


def test_rolling_in_parallel_equals_lm_evals_own(fake: Fake, data: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate

    ours = evaluate(fake, data, tmp_path, "roll", "choice").results["results"]
    arguments = {
        "model": "fake",
        "base_url": f"{fake.url}/v1/completions",
        "tokenizer": fake.root,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
        "max_length": WINDOW,
    }
    names = ["local_roll", "local_choice"]
    theirs = simple_evaluate(
        "local-completions", arguments, tasks=names, task_manager=tasks.manager(names, data), batch_size=1
    )["results"]
    roll = ours["local_roll"]["byte_perplexity,none"]
    assert math.isclose(roll, theirs["local_roll"]["byte_perplexity,none"], rel_tol=1e-12)
    assert ours["local_choice"]["acc,none"] == theirs["local_choice"]["acc,none"]


def test_a_failing_server_is_a_user_error_and_loses_nothing(root: str, data: Path, tmp_path: Path) -> None:
    with fake_server(root) as whole:
        evaluate(whole, data, tmp_path / "whole", "choice", "roll")
    with fake_server(root, fail_after=7) as broken, pytest.raises(UserError, match="go on"):
        evaluate(broken, data, tmp_path / "cut", "choice", "roll")
    assert broken.answered == 7
    with fake_server(root) as rest:
        evaluate(rest, data, tmp_path / "cut", "choice", "roll")
    assert rest.answered == whole.answered - 7


def test_other_arithmetic_or_no_resume_starts_over(root: str, data: Path, tmp_path: Path) -> None:
    def interrupted(name: str) -> None:
        with fake_server(root, fail_after=3) as broken, pytest.raises(UserError):
            evaluate(broken, data, tmp_path / name, "choice")

    interrupted("recipe")
    with fake_server(root, recipe={"quant_method": "lutserve", "luts": {"silu": "nli-4"}}) as other:
        evaluate(other, data, tmp_path / "recipe", "choice")
    assert other.answered == QUESTIONS
    interrupted("fresh")
    with fake_server(root) as same:
        evaluate(same, data, tmp_path / "fresh", "choice", resume=False)
    assert same.answered == QUESTIONS


SCRIPT = """
import sys
from pathlib import Path
from lutserve.eval.run import Settings, run
url, data, output = sys.argv[1:]
settings = Settings(("choice", "roll"), max_length=64, num_concurrent=2)
run(settings, output=Path(output), base_url=url, data=Path(data))
"""


def test_kill_dash_nine_loses_only_what_was_in_flight(root: str, data: Path, tmp_path: Path) -> None:
    with fake_server(root) as whole:
        evaluate(whole, data, tmp_path / "whole", "choice", "roll")
    with fake_server(root) as fake:
        # Nothing is answered after the tenth, so the process is killed while it waits.
        fake.fail_after, fake.fail_status = 10, 503
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, fake.url, str(data), str(tmp_path / "cut")])
        deadline = time.monotonic() + 120
        while fake.answered < 10 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kept = fake.answered
        fake.fail_after = None
        outcome = evaluate(fake, data, tmp_path / "cut", "choice", "roll")
    assert outcome.path.is_file()
    # At most the two requests in flight at the kill are asked again.
    assert whole.answered <= fake.answered <= whole.answered + 2
    assert kept == 10


def test_perplexity_is_exact(fake: Fake, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = " ".join(f"A mill stood here for {year} years." for year in range(300, 312))
    ids = AutoTokenizer.from_pretrained(fake.root)(text).input_ids
    window = 16
    count = len(ids) // window
    assert count >= 5
    expected = [
        -math.fsum(logprob(ids[i], ids[i + 1]) for i in range(start, start + window - 1)) / (window - 1)
        for start in range(0, count * window, window)
    ]
    found = perplexity(fake.url, text, window=window, num_concurrent=3)
    assert found.nll == pytest.approx(expected, rel=1e-12)
    assert found.ppl == pytest.approx(math.exp(math.fsum(expected) / count), rel=1e-12)
    assert found.tokens == count * (window - 1)
    assert fake.answered == count
    with closing(Answers(tmp_path / "cache")) as answers:
        first = perplexity(fake.url, text, window=window, windows=2, answers=answers)
        assert first.nll == found.nll[:2]
        perplexity(fake.url, text, window=window, answers=answers)
    assert fake.answered == 2 * count


def test_perplexity_user_errors(fake: Fake) -> None:
    with pytest.raises(UserError, match="less than one window"):
        perplexity(fake.url, "short", window=100)
    with pytest.raises(UserError, match="--max-model-len 4097"):
        perplexity(fake.url, "short", window=4096)
    with pytest.raises(UserError, match="windows=0"):
        perplexity(fake.url, "short", windows=0)
    fake.fail_after = 0
    with pytest.raises(UserError, match="answers 500"):
        perplexity(fake.url, "The river rises " * 20, window=16)


def test_wikitext2_text_is_the_papers(shared: Path) -> None:
    text = wikitext2(shared / "data")
    assert len(text) == 1294336
    assert text.startswith("\n\n = Robert Boulter = \n\n\n")


def test_wikitext2_needs_its_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        wikitext2(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_whole_evaluation_with_its_own_server(root: str, data: Path, tmp_path: Path) -> None:
    settings = Settings(("choice", "roll", "say"), max_length=256)
    flags = ["--method", "mix8", *SMALL]
    outcome = run(settings, output=tmp_path, model=root, server_args=flags, data=data)
    assert outcome.results["lutserve"]["recipe"]["config_groups"]["default"]["method"] == "mix8"
    assert outcome.results["lutserve"]["server"] == ["lutserve", "serve", "--model", root, *flags]
    assert 1 < outcome.results["results"]["local_roll"]["byte_perplexity,none"] < 1e4
    assert (tmp_path / "server.log").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_perplexity_equals_transformers(root: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    window = 64
    text = " ".join(f"A mill stood here for {year} years." for year in range(300, 330))
    with running_server(["--model", root, *SMALL], log=tmp_path / "log") as server:
        found = perplexity(server.base_url, text, window=window)
    ids = AutoTokenizer.from_pretrained(root)(text).input_ids[: window * len(found.nll)]
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(ids).view(-1, window)).logits[:, :-1]
    targets = torch.tensor(ids).view(-1, window)[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    # bfloat16 against float32.
    assert math.log(found.ppl) == pytest.approx(expected, rel=0.02)
