"""What must hold on the real embedded model: perplexity on the first 32 windows of WikiText-2."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from lutserve.benchmarks.accuracy import RECIPES, measure
from lutserve.eval.ppl import wikitext2
from lutserve.models import DEFAULT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

#: transformers in bf16 on the same windows
PUBLISHED = 21.8243


def test_mix8_stays_within_1_percent_and_nli_within_half_a_percent(shared: Path, tmp_path: Path) -> None:
    text = wikitext2(shared / "data")
    found = {
        name: measure(RECIPES[name], text, 32, tmp_path / name, DEFAULT).ppl
        for name in ("bf16", "nli-4", "mix8")
    }
    assert found["bf16"] == pytest.approx(PUBLISHED, rel=1e-3)
    assert found["nli-4"] == pytest.approx(found["bf16"], rel=5e-3)
    assert found["mix8"] <= found["bf16"] * 1.01
