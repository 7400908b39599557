"""The embedded model through the whole pipeline: what GPTQ and AWQ gain shows in perplexity."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lutserve import models
from lutserve.checkpoint import Checkpoint
from lutserve.errors import UserError
from lutserve.eval.texts import wikitext2
from lutserve.quantizers.pipeline import quantize
from lutserve.quantizers.settings import Settings


@pytest.mark.extended
@pytest.mark.timeout(3600)
def test_order_of_perplexities(shared, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("LUTSERVE_SHARED", str(shared))
    try:
        folder = Path(models.resolve(models.DEFAULT))
    except UserError as error:
        pytest.skip(str(error))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(wikitext2(shared / "data"), verbose=False).input_ids
    found = {}
    for algo in ("rtn", "gptq", "awq"):
        output = tmp_path / algo
        quantize(folder, output, Settings("int4", algo, samples=24), text="c4")
        loaded.load_state_dict({k: v.float() for k, v in Checkpoint(output).dequantized()}, strict=False)
        losses = []
        with torch.no_grad():
            for start in range(0, 4 * 2048, 2048):
                window = torch.tensor(ids[start : start + 2048])[None]
                logits = loaded(window).logits[0, :-1]
                losses.append(float(torch.nn.functional.cross_entropy(logits, window[0, 1:])))
        found[algo] = math.exp(sum(losses) / len(losses))
    assert found["gptq"] < 0.98 * found["rtn"], found
    assert found["awq"] < found["rtn"], found
