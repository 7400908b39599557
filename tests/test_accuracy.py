"""What must hold on the real embedded model: perplexity on WikiText-2, close to exact arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from lutserve.benchmarks.accuracy import RECIPES, chosen, measure
from lutserve.errors import UserError
from lutserve.eval.texts import wikitext2
from lutserve.models import DEFAULT


def test_recipes_by_name_and_by_flags() -> None:
    assert chosen([]) == RECIPES
    assert list(chosen(["mix8,bf16", "nli-4"])) == ["mix8", "bf16", "nli-4"]
    found = chosen(["exact=--method none", "n = --lut nli-2 --lut-sites silu,softmax_exp"])
    assert found["exact"] == ("--method", "none")
    assert list(found.values())[1] == ("--lut", "nli-2", "--lut-sites", "silu,softmax_exp")


@pytest.mark.parametrize("text", ["nli-3", "bf16,bf16", "=--lut nli-4", "../x=", "x=--lut 'nli-4", ""])
def test_wrong_recipes_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--recipes") as refused:
        chosen([text])
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("windows", "published"),
    # windows of 2048 tokens, and transformers' perplexity in bf16 on them
    [(10, 19.9308), pytest.param(32, 21.8243, marks=pytest.mark.extended)],
)
def test_mix8_stays_within_1_percent_and_nli_within_half_a_percent(
    shared: Path, tmp_path: Path, windows: int, published: float
) -> None:
    text = wikitext2(shared / "data")
    found = {
        name: measure(RECIPES[name], text, windows, tmp_path / name, DEFAULT).ppl
        for name in ("bf16", "nli-4", "mix8")
    }
    assert found["bf16"] == pytest.approx(published, rel=1e-3)
    assert found["nli-4"] == pytest.approx(found["bf16"], rel=5e-3)
    assert found["mix8"] <= found["bf16"] * 1.01
