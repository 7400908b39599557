"""The published evaluation of a 4-bit cache: golden arrays, the rule by scalars, and a server."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from servers import SMALL, client

from lutserve import kv_formats
from lutserve.errors import UserError
from lutserve.kernels import kv_reference, library
from lutserve.luts import fpma
from lutserve.recipe import parse
from lutserve.server.client import running_server


def coded(x: torch.Tensor, coding: kv_formats.Coding) -> torch.Tensor:
    bounds = torch.tensor(coding.bounds, dtype=torch.float32)
    return kv_reference.fake_quantise(x, bounds, coding.divisor, torch.tensor(coding.values))


def test_golden_attention_of_opt(shared: Path) -> None:
    library.load()
    golden = {k: torch.from_numpy(v) for k, v in np.load(shared / "golden/axcore/kv.npz").items()}
    key = coded(golden["opt_k"], kv_formats.E1M2)
    value = coded(golden["opt_v"].transpose(1, 2), kv_formats.E3M0).transpose(1, 2)
    assert torch.equal(key, golden["opt_k_deq"]) and torch.equal(value, golden["opt_v_deq"])
    by_token = [golden["opt_q"].transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)]
    out = kv_reference.attend(*(x.contiguous() for x in by_token), 64**-0.5, True)
    assert torch.equal(out.transpose(0, 1), golden["opt_out"])


def dot(a: list[np.float16], b: list[np.float16]) -> np.float16:
    """FPMA products with C = 58 summed in fp16."""
    total = np.float16(0)
    for x, y in zip(a, b, strict=True):
        pair = np.array([x]).view(np.uint16), np.array([y]).view(np.uint16)
        product = fpma.fpma(*pair, 58).view(np.float16)[0]
        total = np.float16(np.float64(total) + np.float64(product))
    return total


@pytest.mark.parametrize("before", [False, True])
def test_grouped_queries_by_scalars(before: bool) -> None:
    """The last three of 70 tokens: two query heads share keys and values, sums go over all keys."""
    library.load()
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(3, 2, 16, generator=generator).half()
    key, value = (torch.randn(70, 1, 16, generator=generator).half() for _ in "kv")
    out = kv_reference.attend(query, key, value, 0.25, before)
    for row in range(3):
        seen = 68 + row
        for head in range(2):
            q = [
                np.float16(np.float32(x) * np.float32(0.25)) if before else np.float16(x)
                for x in query[row, head].tolist()
            ]
            scores = [dot(q, list(k.numpy())) for k in key[:seen, 0]]
            if not before:
                scores = [np.float16(np.float32(s) * np.float32(0.25)) for s in scores]
            e = [math.exp(float(s) - float(max(scores))) for s in scores]
            weights = [np.float16(x / sum(e)) for x in e]
            for d in range(16):
                exact = dot(weights, list(value[:seen, 0, d].numpy()))
                # exp in fp32 may round a weight to the other side.
                assert abs(float(out[row, head, d]) - float(exact)) <= 4e-3


def test_a_group_of_zeros_and_one_token_alone() -> None:
    value = torch.zeros(2, 1, 70)
    value[0, 0, 69] = 0.37
    found = coded(value.half(), kv_formats.E3M0)
    assert found.isfinite().all() and (found[0, 0, :69] == 0).all() and (found[1] == 0).all()
    assert found[0, 0, 69].item() == pytest.approx(0.37, rel=2e-3)


def test_recipes() -> None:
    assert not parse({"kv_cache_scheme": "axcore", "kv_numerics": "reference"}).packs_cache
    assert parse({"kv_cache_scheme": "axcore"}).packs_cache
    with pytest.raises(UserError, match="kv_numerics reference needs kv_cache_scheme axcore"):
        parse({"kv_cache_scheme": "nf4", "kv_numerics": "reference"})
    with pytest.raises(UserError, match="has an exact softmax"):
        parse({"kv_cache_scheme": "axcore", "kv_numerics": "reference", "luts": {"softmax_exp": "nli-4"}})


@pytest.mark.slow
def test_a_server_evaluates_as_published(shared: Path, tmp_path: Path) -> None:
    # Trained: in random weights small errors of attention grow without bound.
    model = shared / "models" / "tiny-llama-pydoc"
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"kv_cache_scheme": "axcore", "kv_numerics": "reference"}))
    found = {}
    for name, flags in {"exact": (), "reference": ("--recipe", str(recipe))}.items():
        arguments = ["--model", str(model), "--dtype", "float16", *flags, *SMALL]
        with running_server(arguments, log=tmp_path / f"{name}.log") as server:
            answer = client(server).completions.create(
                model=server.model,
                prompt="The river rises in the hills north of the town, where the rain of one night",
                max_tokens=8,
                temperature=0,
                logprobs=1,
                echo=True,
            )
            chances = answer.choices[0].logprobs
            assert chances and chances.token_logprobs
            found[name] = np.array(chances.token_logprobs[1:20])
    off = np.abs(found["reference"] - found["exact"])
    assert 0 < off.max() < 1 and off.mean() < 0.2
