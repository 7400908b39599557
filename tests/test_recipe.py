from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutserve import methods, recipe
from lutserve.errors import UserError
from lutserve.recipe import DEFAULT_SITES, SITES, Recipe, Site, from_flags, parse

QKV = "model.layers.0.self_attn.qkv_proj"
SHARDS = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]


def test_flags_make_a_recipe_for_every_linear_but_the_head() -> None:
    made = from_flags(method="mix8", lut="nli-4")
    assert made.group_for(QKV, SHARDS).method == "mix8"
    assert made.group_for("lm_head").method == "none"
    chosen = {site: made.lut_for(site) for site in get_args(Site)}
    assert chosen == {site: "nli-4" if site in DEFAULT_SITES else "exact" for site in SITES}
    assert {"silu", "gelu"} <= set(DEFAULT_SITES) <= set(SITES)
    assert made.quantizes
    assert not from_flags(method="none").quantizes
    assert not from_flags(lut="nli-2").quantizes


def test_lut_sites_limit_the_table() -> None:
    made = from_flags(lut="nli-2", lut_sites="gelu")
    assert (made.lut_for("silu"), made.lut_for("gelu")) == ("exact", "nli-2")


def test_flags_override_what_a_folder_carries() -> None:
    base = from_flags(method="int8", lut="nli-4")
    over = from_flags(base, lut="exact", lut_sites="silu")
    assert over.group_for(QKV, SHARDS).method == "int8"
    assert (over.lut_for("silu"), over.lut_for("gelu")) == ("exact", "nli-4")
    assert not from_flags(base, method="none").quantizes


@given(
    st.sampled_from(sorted(name for name, method in methods.METHODS.items() if not method.offline)),
    st.sampled_from(["exact", "nli-2", "nli-4", "nli-16", "nli-32"]),
    st.sets(st.sampled_from(SITES), min_size=1),
)
def test_a_recipe_survives_config_json(method: str, lut: str, sites: set[str]) -> None:
    made = from_flags(method=method, lut=lut, lut_sites=",".join(sites))
    assert parse(json.loads(json.dumps(made.to_config()))) == made


def test_a_learned_codebook_needs_its_file_only_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"values": [1, -1, -0.25, 0, 0.5], "name": "five"}))
    made = from_flags(method=f"{file}+a8", group_size="32")
    file.unlink()
    again = parse(json.loads(json.dumps(made.to_config())))
    group = again.group_for(QKV, SHARDS)
    assert again == made and again.quantizes and str(tmp_path) not in json.dumps(made.to_config())
    assert (group.method, group.group_size, group.stored) == ("five+a8", 32, False)
    assert (group.arithmetic.family, group.arithmetic.activations) == ("codebook", 8)
    assert group.codebook.values == (-1, -0.25, 0, 0.5, 1) and group.codebook.name == "five"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"values": [1]}, "has 1 values"),
        ({"values": [1, 2], "name": "none"}, "cannot be called 'none'"),
        ({"values": [1, 2], "name": "a+b"}, "after . a4 or a8"),
        (None, "cannot read codebook"),
    ],
)
def test_bad_codebook_files(tmp_path: Path, content: object, message: str) -> None:
    if content:
        (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        parse({"config_groups": {"default": {"method": str(tmp_path / "mine.json")}}})


def test_first_matching_group_wins_and_fused_parts_must_agree() -> None:
    groups = {
        "down": {"targets": ["re:.*layers\\.[01]\\..*down_proj"], "method": "none"},
        "rest": {"targets": ["Linear"], "method": "mix8"},
    }
    made = parse({"config_groups": groups})
    assert made.group_for("model.layers.1.mlp.down_proj").method == "none"
    assert made.group_for("model.layers.2.mlp.down_proj").method == "mix8"
    split = parse({"config_groups": {"q": {"targets": ["q_proj"], "method": "mix8"}}})
    with pytest.raises(UserError, match=r"qkv_proj is one fused layer.*target qkv_proj"):
        split.group_for(QKV, SHARDS)
    assert parse({"ignore": ["v_proj"], "config_groups": groups}).group_for(QKV, SHARDS).method == "none"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lut": {}}, r"unknown key 'lut'; allowed: .*luts"),
        ({"config_groups": {"a": {"method": "mix8", "bits": 4}}}, r"config_groups.a.bits.*targets, method"),
        ({"config_groups": {"a": {"method": "mix9"}}}, r"unknown method 'mix9'; did you mean 'mix8'"),
        ({"config_groups": {"a": {"method": "mix8", "targets": ["re:("]}}}, r"no regular expression"),
        ({"luts": {"softmin": "nli-4"}}, r"'softmin' names no site; allowed: silu, gelu, softmax_exp"),
        ({"luts": {"layers.3": "nli-4"}}, r"'layers\.3' names no site"),
        ({"luts": {"layers.3.": "nli-4"}}, r"'layers\.3\.' names no site"),
        ({"luts": {"re:layers[": "nli-4"}}, r"no regular expression"),
        ({"softmax_sum": "bfloat16"}, r"softmax_sum='bfloat16'.*float32.*float16"),
        ({"luts": {"silu": "nli-5"}}, r"nli-5.*nli-4"),
        ({"kv_cache_scheme": "int1"}, r"kv_cache_scheme='int1'.*exact"),
        ({"version": 2}, r"version=2"),
        ({"quant_method": "awq"}, r"quant_method='awq'"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "mix"}, "unknown method 'mix'"),
        ({"lut": "nli4"}, "nli4"),
        ({"lut": "nli-4", "lut_sites": "silu,exp"}, "unknown site 'exp' in --lut-sites; allowed: silu, gelu"),
        ({"lut_sites": "silu"}, "needs --lut"),
        ({"kv": "fp2"}, "kv_cache_scheme='fp2'.*exact or axcore"),
        ({"kv": "int5"}, "kv_cache_scheme='int5'"),
        ({"softmax_sum": "fp16"}, "softmax_sum='fp16'"),
    ],
)
def test_bad_flags_are_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_flags(**flags)  # type: ignore[arg-type]


def test_tables_by_layer_and_module() -> None:
    luts = {
        "layers.3.silu": "exact",
        "q_norm.rsqrt": "nli-2",
        "re:model\\.layers\\.[01]\\..*rsqrt": "nli-16",
        "model.norm.rsqrt": "nli-32",
        "silu": "nli-4",
    }
    made = parse({"luts": luts})
    assert made.lut_for("silu", "model.layers.3") == "exact"
    assert made.lut_for("silu", "model.layers.13") == made.lut_for("silu") == "nli-4"
    assert made.lut_for("gelu", "model.layers.3") == "exact"
    layer = "model.layers.1"
    assert made.lut_for("rsqrt", layer, f"{layer}.self_attn.q_norm") == "nli-2"
    assert made.lut_for("rsqrt", layer, f"{layer}.input_layernorm") == "nli-16"
    assert made.lut_for("rsqrt", "model.layers.2", "model.layers.2.input_layernorm") == "exact"
    assert made.lut_for("rsqrt", "", "model.norm") == "nli-32"
    assert [site for site in get_args(Site) if made.may_use(site)] == ["silu", "rsqrt"]
    plain = parse({"luts": {"layers.3.silu": "exact", "silu": "nli-4", "rsqrt": "exact"}})
    assert [site for site in get_args(Site) if plain.may_use(site)] == ["silu"]


@pytest.mark.parametrize(
    ("target", "sites"),
    [
        (r"re:model\.layers\.2[0-9]\.rsqrt", {"rsqrt"}),
        (r"re:transformer\.h\.\d+\.attn\.attn\.softmax_exp$", {"softmax_exp"}),
        (r"re:.*q_norm", {"rsqrt"}),
        (r"re:.*\.norm\.", {"rsqrt"}),
        (r"re:model\.layers\.3\.self_attn\.", {"softmax_exp", "softmax_recip", "rsqrt"}),
        (r"re:model\.layers\.3\.", set(SITES)),
        (r"re:(?!.*silu).*", set(SITES) - {"silu"}),
        (r"re:.*\.softmax_", {"softmax_exp", "softmax_recip"}),
        (r"re:.*layers\.199\.silu", {"silu"}),
        # Names that nothing here knows: better to ask every site than to leave one exact in silence.
        (r"re:blocks\.\d+\.silu", set(SITES)),
    ],
)
def test_a_regular_expression_concerns_the_sites_that_it_can_name(target: str, sites: set[str]) -> None:
    made = parse({"luts": {target: "nli-4"}})
    assert {site for site in get_args(Site) if made.may_use(site)} == sites
    assert not any(parse({"luts": {target: "exact"}}).may_use(site) for site in get_args(Site))


def test_a_flag_goes_before_what_a_folder_carries_for_a_layer() -> None:
    base = parse({"luts": {"layers.3.silu": "exact", "gelu": "nli-2"}})
    over = from_flags(base, lut="nli-32", lut_sites="silu")
    assert over.lut_for("silu", "model.layers.3") == "nli-32"
    assert over.lut_for("gelu", "model.layers.3") == "nli-2"


def test_flags_of_the_softmax_and_the_counters() -> None:
    made = from_flags(softmax_sum="float16", count_saturations="true")
    assert (made.softmax_sum, made.count_saturations) == ("float16", True)
    assert from_flags(made, lut="nli-4").softmax_sum == "float16"
    assert (Recipe().softmax_sum, Recipe().count_saturations) == ("float32", False)


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().version = 1  # type: ignore[misc]


def test_files(tmp_path: Path) -> None:
    made = from_flags(method="mix8")
    alone = tmp_path / "recipe.json"
    alone.write_text(json.dumps(made.to_config()))
    assert recipe.load(alone) == made
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "quantization_config": made.to_config()}))
    assert recipe.load(config) == made
    assert recipe.from_model(recipe.read_json(config)) == made
    assert recipe.from_model({"quantization_config": {"quant_method": "awq", "bits": 4}}) is None
    assert recipe.from_model({"model_type": "llama"}) is None
    with pytest.raises(UserError, match="cannot read"):
        recipe.load(tmp_path / "absent.json")
    alone.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        recipe.load(alone)
    alone.write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        recipe.load(alone)


def test_a_table_for_another_function_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "exp.json"
    regions = {"cut_points": [-float("inf"), 0.0, float("inf")], "slopes": [0.0, 1.0], "biases": [0.0, 1.0]}
    file.write_text(json.dumps({"op": "exp", "hidden": 1} | regions))
    assert parse({"luts": {"softmax_exp": f"nnlut:{file}"}}).lut_for("softmax_exp") == f"nnlut:{file}"
    with pytest.raises(UserError, match="is a table of 'exp', not of 'rsqrt'") as caught:
        parse({"luts": {"layers.1.rsqrt": f"nnlut:{file}"}})
    assert "\n" not in str(caught.value)
