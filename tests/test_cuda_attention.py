"""Our attention backend on CUDA, as far as it can be asked without a device; its kernels: tests/gpu."""

import itertools
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm")

from tiny import tiny_llama
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from lutserve import kv_formats
from lutserve.errors import UserError
from lutserve.layers import attention, cuda_attention
from lutserve.layers.cuda_attention import LutCudaAttentionBackend as Backend
from lutserve.recipe import Recipe
from lutserve.server import launch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def building(model, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr(attention.LutAttentionBackend, "scheme", None)

    def make(recipe, **options):
        extra = {"lutserve": recipe.to_config()}
        config = EngineArgs(model=str(model), dtype="bfloat16", additional_config=extra, **options)
        return set_current_vllm_config(config.create_engine_config())

    return make


def test_vllm_knows_it_by_its_name():
    member = cuda_attention.member()
    assert member is cuda_attention.member() is AttentionBackendEnum["LUTSERVE"]
    assert member.get_class() is Backend and Backend.get_name() == member.name


@pytest.mark.slow
def test_its_name_reaches_processes_that_have_not_loaded_plugins():
    program = (
        "import pickle, sys; member = pickle.load(sys.stdin.buffer); print(member.name, member.get_path())"
    )
    sent = pickle.dumps(cuda_attention.member())
    done = subprocess.run([sys.executable, "-c", program], input=sent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.split()[-2:] == [b"LUTSERVE", f"{Backend.__module__}.{Backend.__qualname__}".encode()]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"kv_cache_dtype": kv_formats.CACHE_DTYPE, "has_sliding_window": True}, ""),
        ({"head_size": 80, "dtype": torch.float16, "block_size": 48}, ""),
        ({"head_size": 40}, "head_size"),
        ({"dtype": torch.float32}, "dtype"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"block_size": 24}, "block_size"),
        ({"has_sink": True}, "sinks"),
        ({"use_mla": True}, "MLA"),
        ({"device_capability": DeviceCapability(7, 5)}, "compute capability"),
        ({"attn_type": "encoder_only"}, "attention type"),
    ],
)
def test_what_vllm_may_give_it(changes, reason):
    good = {
        **{"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16},
        **{"use_mla": False, "has_sink": False, "use_sparse": False, "use_mm_prefix": False},
        **{"use_per_head_quant_scales": False, "device_capability": DeviceCapability(8, 0)},
        **{"attn_type": "decoder"},
    }
    reasons = Backend.validate_configuration(**good | changes)
    assert bool(reasons) == bool(reason) and reason in "".join(reasons)


def test_classes_follow_the_recipe(building):
    with building(Recipe(luts={"softmax_exp": "nli-4"})):
        assert Backend.get_impl_cls() is attention.LutAttentionImpl
        assert Backend.get_builder_cls() is attention.LutMetadataBuilder
    with (
        building(Recipe(luts={"silu": "nli-4"})),
        pytest.raises(UserError, match=r"--attention-backend LUTSERVE .* leave the flag away"),
    ):
        Backend.get_impl_cls()
    with building(Recipe(kv_cache_scheme="axcore"), kv_cache_dtype=kv_formats.CACHE_DTYPE):
        impl = Backend.get_impl_cls()
        assert impl is attention.Kv4AttentionImpl
        impl(4, 64, 0.125, 2, None, None, kv_formats.CACHE_DTYPE)
    assert [size.base for size in Backend.get_supported_kernel_block_sizes()] == [64]


@pytest.mark.parametrize(
    ("recipe", "flags", "added"),
    [
        (Recipe(luts={"softmax_exp": "nli-4"}), [], True),
        (Recipe(kv_cache_scheme="nf4"), [], True),
        (Recipe(luts={"softmax_exp": "nli-4"}), ["--attention-backend", "TRITON_ATTN"], False),
        (Recipe(luts={"silu": "nli-4"}), [], False),
    ],
)
def test_the_launcher_asks_for_it_on_cuda_alone(monkeypatch, recipe, flags, added):
    def pairs():
        argv = launch.arguments("m", "m", recipe, False, flags)
        return list(itertools.pairwise(argv))

    assert ("--attention-backend", "LUTSERVE") not in pairs()
    monkeypatch.setattr(launch, "on_cpu", lambda: False)
    assert (("--attention-backend", "LUTSERVE") in pairs()) == added
