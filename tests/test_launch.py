"""How our flags become vLLM's."""

from __future__ import annotations

import json

import pytest

from lutserve.errors import UserError
from lutserve.recipe import Recipe, from_flags, parse
from lutserve.server import defaults, launch

GIB = 2**30


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ([], None),
        (["--port", "1"], "1"),
        (["--port=2"], "2"),
        (["--port", "1", "--port=3"], "3"),
        (["--max_model_len", "7"], None),
        (["--port"], None),
    ],
)
def test_value_of(flags: list[str], value: str | None) -> None:
    assert defaults.value_of(flags, "--port") == value


def test_underscores_and_short_names_count_too() -> None:
    assert defaults.value_of(["--tensor_parallel_size", "2"], "--tensor-parallel-size", "-tp") == "2"
    assert defaults.number_of(["-tp", "4"], "--tensor-parallel-size", "-tp", default=1) == 4
    assert defaults.given(["--kv_cache_memory_bytes=1G"], "--kv-cache-memory-bytes")
    assert not defaults.given(["value", "--other"], "--kv-cache-memory-bytes")
    with pytest.raises(UserError, match="--port x: give a whole number"):
        defaults.number_of(["--port", "x"], "--port", default=1)


@pytest.mark.parametrize(("free", "size"), [(GIB // 2, GIB), (4 * GIB, GIB), (20 * GIB, 5 * GIB)])
def test_kv_cache_takes_a_quarter_of_the_free_memory(free: int, size: int) -> None:
    assert defaults.kv_cache_bytes(free) == size


def test_every_default_yields_to_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    added = defaults.cpu_flags([])
    assert {"--dtype", "--kv-cache-memory-bytes", "--enforce-eager"} <= set(added)
    flags = ["--dtype=float16", "--kv-cache-memory-bytes", "1G", "--no-enforce-eager"]
    assert defaults.cpu_flags(flags) == []
    assert "TORCHDYNAMO_DISABLE" in defaults.cpu_environment([])
    assert "TORCHDYNAMO_DISABLE" not in defaults.cpu_environment(["--no-enforce-eager"])
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in defaults.cpu_environment(["-tp", "2"])
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert "--kv-cache-memory-bytes" not in defaults.cpu_flags([])


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "awq"},
        {"quant_method": "gptq"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": {"a": {"format": "int-quantized"}, "b": {"format": "pack-quantized"}},
        },
    ],
)
def test_4_bit_folders_of_others_need_a_cpu_with_their_kernels(
    monkeypatch: pytest.MonkeyPatch, stored: dict[str, object]
) -> None:
    monkeypatch.setattr(launch, "on_cpu", lambda: True)
    config = {"quantization_config": stored}
    for flags, served in ((("avx512f", "avx2"), True), ((), True), (("avx2",), False)):
        monkeypatch.setattr(launch.isa, "cpu_flags", lambda flags=flags: frozenset(flags))
        if served:
            launch.check_int4(config)
        else:
            with pytest.raises(UserError, match="whose kernels vLLM has for CPUs with AVX512 only"):
                launch.check_int4(config)
        launch.check_int4({"quantization_config": {"quant_method": "compressed-tensors"}})
        launch.check_int4({})


def test_weights_that_are_quantised_already_stay_so() -> None:
    stored = parse({"config_groups": {"default": {"method": "mix8", "stored": True}}})
    launch.check_stored(stored, stored, "/m")
    launch.check_stored(None, from_flags(method="mix8"), "/m")
    for served in (from_flags(method="mix8"), from_flags(method="none")):
        with pytest.raises(UserError, match="/m holds weights quantised to mix8; serve it without --method"):
            launch.check_stored(stored, served, "/m")


def test_tensor_parallel_workers_share_the_cores_of_a_small_machine() -> None:
    assert defaults.cpu_binding([0, 1], 1, 1) is None
    assert defaults.cpu_binding(range(8), 2, 2) is None
    assert defaults.cpu_binding([0, 1], 2, 1) == "0|1"
    assert defaults.cpu_binding([2, 3, 6, 7, 8], 2, 1) == "2,3|6,7"
    with pytest.raises(UserError, match="--tensor-parallel-size 4: this process may use 2 cores"):
        defaults.cpu_binding([0, 1], 4, 1)


def test_arguments_carry_the_recipe_and_keep_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "on_cpu", lambda: True)
    served = from_flags(method="mix8", lut="nli-4")
    flags = ["--additional-config", '{"other": 1}', "--served-model-name", "mine", "--host", "0.0.0.0"]
    argv = launch.arguments("alias", "/model", served, ours=True, flags=flags)
    assert defaults.value_of(argv, "--model") == "/model"
    assert defaults.value_of(argv, "--host") == "0.0.0.0"
    assert defaults.value_of(argv, "--served-model-name") == "mine"
    assert defaults.value_of(argv, "--quantization") == "lutserve"
    extra = json.loads(defaults.value_of(argv, "--additional-config") or "")
    assert extra == {"other": 1, "lutserve": served.to_config()}
    plain = launch.arguments("alias", "/model", from_flags(method="none"), ours=False, flags=[])
    assert "--quantization" not in plain
    assert defaults.value_of(plain, "--served-model-name") == "alias"


def test_who_is_asked_about_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "on_cpu", lambda: True)
    needs, llama, mix8, none = (
        launch.needs_our_linears,
        {"hidden_size": 64},
        from_flags(method="mix8"),
        Recipe(),
    )
    slow = ("float16",)
    monkeypatch.setattr(launch.isa, "slow_16_bit", lambda: slow)
    assert needs(llama, mix8, []) and needs({}, mix8, [])
    assert needs(llama, none, [])
    assert not needs(llama, from_flags(linear16="vllm"), [])
    # fp32 layers are not ours, a folder that carries a recipe names us, and one that others quantised them.
    assert not needs(llama, none, ["--dtype", "float32"])
    assert not needs(llama, none, ["--quantization=awq"])
    assert not needs({"quantization_config": mix8.to_config()}, mix8, [])
    assert not needs({"quantization_config": {"quant_method": "awq"}}, none, [])
    # Of a model that is not here yet nobody knows.
    assert not needs({}, none, [])
    slow = ()
    assert not needs(llama, none, [])


def test_environment_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "on_cpu", lambda: True)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("VLLM_PLUGINS", "mine,lutserve")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    import os

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        launch.prepare_environment(local=False, flags=[])
        assert os.environ["OMP_NUM_THREADS"] == "7"
        assert os.environ["VLLM_PLUGINS"] == "mine,lutserve,lutserve_stats,lutserve_http"
        assert os.environ["DO_NOT_TRACK"] == "1"
        assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "capped scores"),
        ({"text_config": {"model_type": "gemma4_text", "attn_logit_softcapping": 50.0}}, "capped scores"),
        ({"model_type": "gpt_oss"}, "attention sinks"),
        ({"model_type": "granite", "attention_sinks": True}, "attention sinks"),
        ({"model_type": "mimo_v2_flash", "add_swa_attention_sink_bias": True}, "attention sinks"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": None}, None),
        ({"model_type": "falcon", "alibi": False}, None),
        ({"model_type": "llama"}, None),
    ],
)
def test_attentions_that_our_softmax_does_not_compute(config: dict[str, object], reason: str | None) -> None:
    """Refused from config.json, before anything is loaded, and only where softmax tables are asked for."""
    launch.check_model(config, from_flags(lut="nli-4", lut_sites="silu,rsqrt"), [])
    for sites in ("softmax_exp", "softmax_recip"):
        if reason is None:
            launch.check_model(config, from_flags(lut="nli-4", lut_sites=sites), [])
            continue
        with pytest.raises(UserError, match=f"{reason}; use --lut-sites without") as refused:
            launch.check_model(config, from_flags(lut="nli-4", lut_sites=sites), [])
        assert "\n" not in str(refused.value)


def test_flags_of_a_four_bit_cache() -> None:
    assert launch.cache_flags("nf4", []) == ["--kv-cache-dtype", "int4_per_token_head"]
    assert launch.cache_flags("axcore", [])[2:] == ["--block-size", "1152"]
    assert launch.cache_flags("axcore", ["--block-size=128"])[2:] == []
    with pytest.raises(UserError, match="--kv nf4 and --kv-cache-dtype: give one"):
        launch.cache_flags("nf4", ["--kv-cache-dtype", "fp8"])
