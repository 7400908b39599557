"""Counting a model: the published numbers, and models of every family that transformers builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from typer.testing import CliRunner

from lutserve.cli import app
from lutserve.errors import UserError
from lutserve.recipe import Recipe
from lutserve.search import architecture, cost, precision, seed
from lutserve.search.architecture import Site
from lutserve.search.precision import Precision

LENGTHS, CONTEXTS = [128, 1024, 2048], [128, 1024, 4096]
SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def config_of(arch: dict[str, Any]) -> dict[str, Any]:
    names = dict(hidden="hidden_size", layers="num_hidden_layers", heads="num_attention_heads")
    names |= dict(kv_heads="num_key_value_heads", intermediate="intermediate_size", vocab="vocab_size")
    names |= dict(tie="tie_word_embeddings", head_dim="head_dim")
    return {"model_type": "llama"} | {names[key]: value for key, value in arch.items()}


def uniform(method: str, group_size: int = 64) -> Recipe:
    return Recipe.model_validate({"config_groups": {"all": {"method": method, "group_size": group_size}}})


def axcore(group: int) -> Precision:
    """The published 4-bit format with a 2-bit type and a 16-bit scale a group."""
    return Precision(4, 16, 18, group)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    return dict(json.loads((shared / "golden/bit_allocation/flops.json").read_text()))


MODELS = ["SmolLM2-135M", "Llama-3-8B", "Llama-2-7B"]


@pytest.mark.parametrize("name", MODELS)
def test_published_counts(golden: dict[str, Any], name: str) -> None:
    want = golden[name]
    config = config_of(want["arch"])
    got = cost.account(config, tokens=LENGTHS, context=CONTEXTS)
    for section in ("arch", "params", "per_token_linear", "prefill", "decode"):
        assert got[section] == want[section], section
    one = cost.account(config, tokens=2048, context=1024)
    assert one["lut_sites"] == want["lut_sites"]
    key = "decode_bytes_batch1_ctx1024_16bit"
    assert one[key] == want[key]
    methods = {"16bit": "none", "int8_pc": "int8", "int4": "int4", "mix8_1pct": "mix8"}
    for label, method in methods.items():
        assert cost.account(config, uniform(method, want["group_size"]))["recipe"] == pytest.approx(
            want["uniform"][label], rel=1e-12, abs=0
        ), label
    arch = architecture.of(config)
    stored = cost.stored(arch, lambda layer, site: axcore(want["group_size"]))
    assert {key: want["uniform"]["axcore_fp4"][key] for key in stored} == stored


@pytest.mark.parametrize("name", MODELS)
def test_published_mix(golden: dict[str, Any], name: str) -> None:
    arch, group = architecture.of(config_of(golden[name]["arch"])), golden[name]["group_size"]

    def choice(layer: int, site: Site) -> Precision:
        if layer in (0, 1, arch.layers - 2, arch.layers - 1):
            return precision.of(uniform("int8").config_groups["all"])
        return (
            precision.of(uniform("int4", group).config_groups["all"])
            if "attn" in site.name
            else axcore(group)
        )

    got, want = cost.stored(arch, choice), golden[name]["mixed_example"]
    assert got["linear_weight_bits"] == want["linear_weight_bits"]
    assert got["effective_bits_per_weight"] == pytest.approx(want["effective_bits_per_weight"], rel=1e-12)
    assert got["linear_bops_per_token"] == want["linear_bops_per_token"]
    assert got["linear_bops_per_token"] / (arch.linear_weights * 256) == want["bops_vs_16bit"]


SIZES = {
    "llama-7b": (4096, 32, 32, 11008),
    "llama-13b": (5120, 40, 40, 13824),
    "llama-30b": (6656, 60, 52, 17920),
    "llama-65b": (8192, 80, 64, 22016),
    "opt-125m": (768, 12, 12, 3072),
    "opt-1.3b": (2048, 24, 32, 8192),
    "opt-2.7b": (2560, 32, 32, 10240),
    "opt-6.7b": (4096, 32, 32, 16384),
}


def sized(name: str) -> dict[str, Any]:
    hidden, layers, heads, inner = SIZES[name]
    config = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    if name.startswith("opt"):
        extra = {"model_type": "opt", "ffn_dim": inner, "vocab_size": 50272, "max_position_embeddings": 2048}
    else:
        extra = {"model_type": "llama", "intermediate_size": inner, "vocab_size": 32000}
    return config | extra


GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}


def test_like_fvcore(golden: dict[str, Any]) -> None:
    for name, want in golden["_fvcore_cross_check_T1024"].items():
        got = cost.account(GPT2 if name == "gpt2" else sized(name), tokens=1024)["prefill"]["1024"]
        assert got["attention_macs_dense"] == want["attention_macs_dense"], name
        head = got["lm_head_macs_all_positions"]
        if name == "gpt2":
            assert (got["linear_macs"], head) == (want["block_linear_macs"], want["lm_head_macs"])
        else:
            # What fvcore counts as linear holds the output layer of OPT, of LLaMA too.
            assert got["linear_macs"] + head == want["linear_macs"], name


def test_published_seed_accounting(shared: Path) -> None:
    for case in json.loads((shared / "golden/bit_allocation/seed_compat.json").read_text())["cases"]:
        config = sized(case["model"].lower())
        arch = architecture.of(config)
        got = seed.totals(arch, case["weight_bits"], case["act_bits"])
        assert {k: round(v, 2) for k, v in got.items()} == case["seed"]
        assert got["size_GB_1024"] == pytest.approx(case["published"]["size_GB"], abs=0.0101)
        assert got["TBOPs_1024"] == pytest.approx(case["published"]["TBOPs"], abs=0.0101)
        # The exact counts of the same bits, without scales.
        stored = cost.stored(arch, lambda i, s, c=case: Precision(c["weight_bits"][i], c["act_bits"][i]))
        prefill = cost.account(config, tokens=1024)["prefill"]["1024"]
        rest = prefill["attention_macs_dense"] + prefill["lm_head_macs_all_positions"]
        assert round(stored["model_bytes"] / 1e6, 2) == case["exact_16bit_rest"]["size_MB"]
        bops = (stored["linear_bops_per_token"] * 1024 + rest * 256) / 1e9
        assert round(bops, 3) == case["exact_16bit_rest"]["GBOPs"]


def test_published_seed_rule(shared: Path) -> None:
    for case in json.loads((shared / "golden/bit_allocation/knapsack.json").read_text())["seed_mpl"]:
        got = seed.block_bits(case["distortion"], case["target_bits"], case["percentile"])
        assert got == case["bits"] and sum(got) / len(got) == case["avg"]


def test_smollm2_without_golden_files() -> None:
    """Figures of the specification, so that counting is proved where the shared folder is absent."""
    got = cost.account(SMOLLM2, uniform("int4"))
    assert got["params"]["total"] == 134_515_008
    assert got["prefill"]["2048"]["total_flops_causal_last_logit"] == 579_947_986_944
    assert got["decode"]["1024"]["total_flops"] == 339_738_624
    assert got["recipe"]["model_bytes"] == 113_095_296
    assert got["recipe"]["effective_bits_per_weight"] == 4.25
    assert got["lut_sites"]["decode_ctx_1024"] == {
        "silu": 46080,
        "rsqrt": 61,
        "reciprocal": 270,
        "exp": 276480,
    }


@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name != "qwen3_moe"])
def test_parameters_and_sites_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Every parameter of the real model is counted once, every shard is a layer of the size we think."""
    folder = families.write(tmp_path / family, family)
    config = json.loads((folder / "config.json").read_text())
    arch = architecture.of(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert arch.parameters == sum(p.numel() for p in model.parameters())
    inside = {name: m for name, m in model.named_modules() if name.startswith(arch.blocks)}
    weights = {n for n, m in inside.items() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"}
    named = set()
    for layer in range(arch.layers):
        for site in arch.sites:
            shards = [f"{arch.blocks}.{layer}.{shard}" for shard in site.shards]
            assert sum(inside[shard].weight.numel() for shard in shards) == site.weights
            assert all((inside[shard].bias is not None) is site.bias for shard in shards)
            named |= set(shards)
    assert named == weights
    norms = [m for n, m in model.named_modules() if type(m).__name__.endswith(("RMSNorm", "LayerNorm"))]
    assert arch.norms == sum(p.numel() for m in norms for p in m.parameters())


def test_windows_bound_attention_and_the_cache() -> None:
    full = cost.account(SMOLLM2, tokens=100, context=50)
    short = SMOLLM2 | {"model_type": "mistral", "sliding_window": 8}
    got = cost.account(short, tokens=100, context=50)
    pairs = sum(min(t + 1, 8) for t in range(100))
    assert got["prefill"]["100"]["attention_macs_causal"] == 2 * 9 * 64 * 30 * pairs
    assert got["lut_sites"]["prefill_100_causal"]["exp"] == 9 * 30 * pairs
    assert got["decode"]["50"]["attention_macs"] == 2 * 9 * 64 * 30 * 8
    key = "decode_bytes_batch1_ctx50_16bit"
    assert got[key]["kv_read"] * 49 == full[key]["kv_read"] * 7
    kinds = ["sliding_attention", "full_attention"] * 15
    mixed = cost.account(short | {"layer_types": kinds}, tokens=100, context=50)
    assert mixed["decode"]["50"]["attention_macs"] == 2 * 9 * 64 * 15 * (8 + 50)
    unused = cost.account(short | {"use_sliding_window": False}, tokens=100, context=50)
    assert unused["decode"] == full["decode"]


def test_recipes_reach_single_layers() -> None:
    groups = {
        "one": {"targets": ["layers.3.mlp.down_proj"], "method": "int8"},
        "shards": {"targets": ["q_proj", "k_proj", "v_proj"], "method": "nf4+a8", "group_size": 32},
    }
    got = cost.account(SMOLLM2, {"config_groups": groups})["recipe"]
    none, down, qkv = 106_168_320 * 16, 576 * 1536, 960 * 576
    saved = down * 8 - 576 * 16 + 30 * qkv * (12 - 16 / 32)
    assert got["linear_weight_bits"] == none - saved
    assert got["linear_bops_per_token"] == 106_168_320 * 256 - down * 192 - 30 * qkv * (256 - 32)
    with pytest.raises(UserError, match="one fused layer"):
        cost.account(SMOLLM2, {"config_groups": {"q": {"targets": ["q_proj"], "method": "int8"}}})


def test_groups_that_do_not_divide_have_a_short_last_one() -> None:
    assert Precision(4, 16, 16, 128).bits(10, 576) == 10 * (576 * 4 + 5 * 16)
    assert Precision(4, 16, 16, -1).bits(10, 576) == 10 * (576 * 4 + 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": "opt", "word_embed_proj_dim": 512}, "opt-350m"),
        ({"model_type": "gpt2"}, "config.json of a gpt2 model has no 'n_embd'"),
    ],
)
def test_unknown_models(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cost.account(SMOLLM2 | change)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["flops", *arguments])


def test_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(uniform("int4").to_config()))
    done = run(str(tmp_path), "--recipe", str(recipe), "--tokens", "128", "--context", "4096", "--json")
    assert json.loads(done.stdout) == json.loads(
        json.dumps(cost.account(SMOLLM2, uniform("int4"), tokens=128, context=4096))
    )
    lines = run(str(tmp_path)).stdout.splitlines()
    assert "params.total: 134,515,008" in lines and "arch.tie: True" in lines
    done = run(str(tmp_path), "--accounting", "seed", "--recipe", str(recipe))
    assert done.exit_code == 0 and "avg_bits: 4.0" in done.stdout
    # A folder that carries a recipe is counted with it.
    (tmp_path / "config.json").write_text(
        json.dumps(SMOLLM2 | {"quantization_config": uniform("int8").to_config()})
    )
    assert "recipe.model_bytes: 163,172,736" in run(str(tmp_path)).stdout


def test_command_refuses(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    for arguments, message in [
        (["--accounting", "seed"], "LLaMA layout"),
        (["--accounting", "rough"], "allowed: exact, seed"),
    ]:
        assert message in str(run(str(tmp_path), *arguments).exception)
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    mixed = {"config_groups": {"down": {"targets": ["down_proj"], "method": "int8"}}}
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    done = run(str(tmp_path), "--accounting", "seed", "--recipe", str(tmp_path / "mixed.json"))
    assert "one precision for a whole block" in str(done.exception)
