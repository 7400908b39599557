"""How our flags become vLLM's."""

from __future__ import annotations

import json

import pytest

from lutserve.errors import UserError
from lutserve.recipe import from_flags
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


def test_arguments_carry_the_recipe_and_keep_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "on_cpu", lambda: True)
    served = from_flags(method="mix8", lut="nli-4")
    flags = ["--additional-config", '{"other": 1}', "--served-model-name", "mine", "--host", "0.0.0.0"]
    argv = launch.arguments("alias", "/model", served, stored=False, flags=flags)
    assert defaults.value_of(argv, "--model") == "/model"
    assert defaults.value_of(argv, "--host") == "0.0.0.0"
    assert defaults.value_of(argv, "--served-model-name") == "mine"
    assert defaults.value_of(argv, "--quantization") == "lutserve"
    extra = json.loads(defaults.value_of(argv, "--additional-config") or "")
    assert extra == {"other": 1, "lutserve": served.to_config()}
    plain = launch.arguments("alias", "/model", from_flags(method="none"), stored=False, flags=[])
    assert "--quantization" not in plain
    assert defaults.value_of(plain, "--served-model-name") == "alias"
    # A folder that carries a recipe selects the method by itself.
    assert "--quantization" not in launch.arguments("alias", "/model", served, stored=True, flags=[])


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


def test_flags_of_a_four_bit_cache() -> None:
    assert launch.cache_flags("nf4", []) == ["--kv-cache-dtype", "int4_per_token_head"]
    assert launch.cache_flags("axcore", [])[2:] == ["--block-size", "1152"]
    assert launch.cache_flags("axcore", ["--block-size=128"])[2:] == []
    with pytest.raises(UserError, match="--kv nf4 and --kv-cache-dtype: give one"):
        launch.cache_flags("nf4", ["--kv-cache-dtype", "fp8"])
