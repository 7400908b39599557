"""Tables at the activations, norms and softmaxes of every model family, through vLLM, against transformers.

The models are random and in fp16, so that what remains between the two is small: vLLM adds the residual
in fp32 before a norm, transformers in fp16, and their attentions sum in another order. That difference is
below 0.003 on average without any table; the tables used here move a log-probability by 0.012 or more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import hf_reference
import numpy as np
import pytest
import torch
import transformers

from lutserve import luts
from lutserve.layers.names import layer_of
from lutserve.recipe import parse

#: largest mean difference and largest 95th percentile that an agreement may have, in nats
MEAN, MOST = 0.006, 0.02

RECIPES: dict[str, dict[str, Any]] = {
    "exact": {"luts": {"silu": "exact"}},
    "activation": {
        "luts": {"layers.1.silu": "nli-4", "layers.1.gelu": "nli-4", "h.1.gelu": "nli-4"}
        | {"silu": "nli-2", "gelu": "nli-2"},
        "count_saturations": True,
    },
    "norm": {"luts": {"rsqrt": "nli-4"}},
    "softmax": {"luts": {"softmax_exp": "nli-2"}},
}

ROPE_NORMS = ("input_layernorm", "post_attention_layernorm")
#: family -> stem of its layers, activation in a layer, its site, norms in a layer, norm after all layers
PLACES = {
    "llama": ("model.layers", "mlp.act_fn", "silu", ROPE_NORMS, "model.norm"),
    "qwen2": ("model.layers", "mlp.act_fn", "silu", ROPE_NORMS, "model.norm"),
    "qwen3": (
        "model.layers",
        "mlp.act_fn",
        "silu",
        (*ROPE_NORMS, "self_attn.q_norm", "self_attn.k_norm"),
        "model.norm",
    ),
    "gemma": ("model.layers", "mlp.act_fn", "gelu", ROPE_NORMS, "model.norm"),
    "gpt2": ("transformer.h", "mlp.act", "gelu", ("ln_1", "ln_2"), "transformer.ln_f"),
    "opt-relu": (
        "model.decoder.layers",
        None,
        "",
        ("self_attn_layer_norm", "final_layer_norm"),
        "model.decoder.final_layer_norm",
    ),
    "opt-gelu": (
        "model.decoder.layers",
        "activation_fn",
        "gelu",
        ("self_attn_layer_norm", "final_layer_norm"),
        "model.decoder.final_layer_norm",
    ),
    "qwen3_moe": (
        "model.layers",
        "mlp.experts",
        "silu",
        (*ROPE_NORMS, "self_attn.q_norm", "self_attn.k_norm"),
        "model.norm",
    ),
}
each_family = pytest.mark.parametrize("family", families.FAMILIES)


def run(requests: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Score all requests with vLLM in one process of its own."""
    out = folder / "scores.json"
    done = subprocess.run(
        [sys.executable, families.__file__, str(out)],
        input=json.dumps(requests),
        text=True,
        capture_output=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def request(folder: Path, kind: str, **more: Any) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "recipe": RECIPES[kind],
        "bent": kind == "norm",
        "prompts": families.prompts(),
        **more,
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {family: families.write(base / family, family) for family in families.FAMILIES}


@pytest.fixture(scope="module")
def served(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    """What vLLM says, by family and kind of recipe."""
    keys = [(family, kind) for family in models for kind in RECIPES]
    answers = run([request(models[family], kind) for family, kind in keys], tmp_path_factory.mktemp("out"))
    return dict(zip(keys, answers, strict=True))


def expected(folder: Path, recipe: dict[str, Any]) -> torch.Tensor:
    """The same log-probabilities by transformers with the same tables."""
    made = parse(recipe)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, attn_implementation="tables", experts_implementation="eager"
    ).eval()
    hf_reference.use_tables(model, lambda site, name: made.lut_for(site, layer_of(name), name))
    ids = torch.tensor(families.prompts())
    with torch.no_grad():
        chances = model(ids).logits.float().log_softmax(-1)
    return chances[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("kind", RECIPES)
def test_log_probabilities(
    served: Any, models: Any, family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = torch.tensor(served[family, kind]["scores"])
    if kind == "norm":
        monkeypatch.setattr(luts, "lut_table", families.bent_rsqrt)
    error = (got - expected(models[family], RECIPES[kind])).abs()
    assert error.mean() < MEAN and error.quantile(0.95) < MOST
    effect = (got - torch.tensor(served[family, "exact"]["scores"])).abs().mean()
    if kind == "exact" or (kind, family) == ("activation", "opt-relu"):
        assert effect == 0
    else:
        assert effect > 2 * MEAN


@pytest.mark.slow
@each_family
def test_every_site_is_found_under_its_own_name(served: Any, family: str) -> None:
    stem, act, site, norms, last = PLACES[family]
    tables = ("nli-2", "nli-4")
    function = "silu" if site == "silu" else "gelu" if family == "opt-gelu" else "gelu_tanh"
    acts = [[f"{stem}.{i}.{act}", site, function, tables[i]] for i in range(2)] if act else []
    assert sorted(served[family, "activation"]["sites"]) == acts
    assert served[family, "activation"]["saturations"].keys() == ({site} if act else set())
    names = [f"{stem}.{i}.{norm}" for i in range(2) for norm in norms] + [last]
    assert sorted(served[family, "norm"]["sites"]) == sorted([n, "rsqrt", "rsqrt", "nli-4"] for n in names)
    attention = "attn.attn" if family == "gpt2" else "self_attn.attn"
    softmax = [[f"{stem}.{i}.{attention}", "softmax_exp", "softmax_exp", "nli-2"] for i in range(2)]
    assert sorted(served[family, "softmax"]["sites"]) == softmax
    assert served[family, "exact"]["sites"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["qwen3", *(pytest.param(name, marks=pytest.mark.extended) for name in ("gpt2", "gemma"))]
)
def test_compiled_like_eager(served: Any, models: Any, family: str, tmp_path: Path) -> None:
    both = RECIPES["activation"]["luts"] | {"rsqrt": "nli-4"}
    recipe = {"luts": both, "count_saturations": True}
    more = {"recipe": recipe, "narrow": True}
    eager, compiled = run(
        [request(models[family], "exact", eager=eager, **more) for eager in (True, False)], tmp_path
    )
    assert compiled["sites"] == eager["sites"] and len(eager["sites"]) >= 7
    error = (torch.tensor(eager["scores"]) - torch.tensor(compiled["scores"])).abs()
    assert error.mean() < MEAN and error.quantile(0.95) < MOST
    # With a range of [-0.5, 0.5] many inputs lie outside: of all 4 prompts and 1 new token, and no warm-up.
    (count,), (other,) = eager["saturations"].values(), compiled["saturations"].values()
    inputs = families.SIZES["intermediate_size"] * 2 * 4 * 48
    assert 0.2 * inputs < count < inputs and count == pytest.approx(other, rel=0.01)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma", "qwen3"])
def test_the_reference_reproduces_the_published_models(shared: Path, family: str) -> None:
    """What the log-probabilities above are compared with equals the golden logits (fp32, act and softmax)."""
    golden = np.load(shared / "golden/fplut/tiny_models_n4.npz")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
    config = getattr(transformers, f"{family.capitalize()}Config")(**sizes, **heads)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="tables"
    )
    stem = f"{family}/w/"
    model.load_state_dict({k[len(stem) :]: torch.from_numpy(golden[k]) for k in golden if k.startswith(stem)})
    ids = torch.from_numpy(golden[f"{family}/ids"])
    # A table's input next to a rounding border may fall on its other side: one fp16 step of one value.
    for spec, name, tolerance in (("exact", "baseline", 1e-5), ("nli-4", "fplut_n4", 1e-3)):
        hf_reference.use_tables(model.eval(), lambda site, _, spec=spec: "exact" if site == "rsqrt" else spec)
        with torch.no_grad():
            logits = model(ids).logits
        assert np.abs(logits.numpy() - golden[f"{family}/logits/fp32/{name}"]).max() < tolerance
