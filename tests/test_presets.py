"""The presets of `lutserve eval`: every name means something, and published values have their place."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lutserve import models, recipe

PRESETS = sorted((Path(__file__).parents[1] / "eval/presets").glob("*.yaml"))
#: lm-eval's tasks that presets use
TASKS = {
    *("arc_challenge", "arc_easy", "boolq", "gsm8k", "hellaswag", "lambada_openai"),
    *("mmlu", "openbookqa", "piqa", "sciq", "wikitext", "winogrande"),
}
#: metric -> where its published values lie
RANGES = {
    "acc": (0.0, 1.0),
    "acc_norm": (0.0, 1.0),
    "exact_match": (0.0, 1.0),
    "ppl": (1.0, 50.0),
    "perplexity": (1.0, 50.0),
    "word_perplexity": (1.0, 50.0),
}


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    return content


def name_of(task: Any) -> str:
    return f"ppl:{task['ppl']}" if isinstance(task, dict) else task


def test_there_is_one_for_every_study() -> None:
    names = {file.stem for file in PRESETS}
    assert {"fp16lut", "axcore-opt", "axcore-llama2", "mixq", "students", "bit-allocation"} <= names


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_names(file: Path) -> None:
    content = read(file)
    assert content["name"] == file.stem
    assert content["baseline"] in content["recipes"]
    assert set(content["models"]) <= set(models.ALIASES)
    assert {name for name in map(name_of, content["tasks"]) if ":" not in name} <= TASKS
    for flags in content["recipes"].values():
        words = shlex.split(flags)
        given = dict(zip(words[::2], words[1::2], strict=True))
        assert given.pop("--dtype") in ("float16", "bfloat16")
        recipe.from_flags(None, **{key[2:].replace("-", "_"): value for key, value in given.items()})


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_published_values_have_their_place(file: Path) -> None:
    content = read(file)
    seen = set()
    for row in content.get("published", ()):
        assert row["model"] in content["models"]
        assert row["recipe"] in content["recipes"]
        assert row["task"] in map(name_of, content["tasks"])
        low, high = RANGES[row["metric"]]
        assert low < row["value"] < high
        place = (row["model"], row["recipe"], row["task"], row["metric"])
        assert place not in seen
        seen.add(place)


def test_known_rows() -> None:
    """The lines that everyone quotes."""
    published = {
        (row["model"], row["recipe"], row["task"]): row["value"]
        for file in PRESETS
        for row in read(file).get("published", ())
        if row["metric"] in ("ppl", "word_perplexity")
    }
    assert published["llama2-7b", "axcore", "ppl:wikitext2"] == 5.65
    assert published["opt-30b", "axcore-kv", "ppl:wikitext2"] == 9.79
    assert published["llama3-8b", "nli-4", "ppl:wikitext2"] == pytest.approx(6.156, abs=5e-4)
    assert published["llama2-7b", "sf4", "wikitext"] == 9.16
