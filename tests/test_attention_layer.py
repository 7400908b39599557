"""Which attention classes vLLM gets for which recipe, and what our class refuses."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from attention_cases import batch
from tiny import tiny_llama

from lutserve.errors import UserError
from lutserve.recipe import Recipe

pytest.importorskip("vllm")

from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from lutserve import kv_formats, luts, plugin
from lutserve.layers import attention, saturation
from lutserve.layers.sites import REPORTS


@pytest.fixture(autouse=True)
def _clean():
    yield
    REPORTS.clear()
    saturation.COUNTERS.clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def building(model, monkeypatch):
    """A context in which vLLM builds a model with the given recipe."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")

    def make(recipe: Recipe | None, **options):
        extra = {} if recipe is None else {"lutserve": recipe.to_config()}
        config = EngineArgs(model=str(model), dtype="bfloat16", additional_config=extra, **options)
        return set_current_vllm_config(config.create_engine_config())

    return make


@pytest.mark.parametrize(
    ("recipe", "ours"),
    [
        (None, False),
        (Recipe(), False),
        (Recipe(luts={"silu": "nli-4", "rsqrt": "nli-4"}), False),
        (Recipe(luts={"softmax_exp": "exact"}), False),
        (Recipe(luts={r"re:model\.layers\.\d+\.rsqrt": "nli-4"}), False),
        (Recipe(luts={r"re:.*attn\.softmax_exp": "nli-4"}), True),
        (Recipe(luts={"softmax_exp": "nli-4"}), True),
        (Recipe(luts={"layers.1.softmax_recip": "nli-4"}), True),
        (Recipe(softmax_sum="float16"), True),
    ],
)
def test_classes_follow_the_recipe(building, recipe, ours):
    plugin.register()
    plugin.register()
    backend = AttentionBackendEnum.CPU_ATTN.get_class()
    assert backend is attention.LutAttentionBackend
    assert AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.CPU_ATTN
    with building(recipe):
        assert (backend.get_impl_cls() is attention.LutAttentionImpl) == ours
        assert (backend.get_builder_cls() is attention.LutMetadataBuilder) == ours
        if not ours:
            assert backend.get_impl_cls() is cpu_attn.CPUAttentionBackendImpl
            assert backend.get_builder_cls() is cpu_attn.CPUAttentionMetadataBuilder
    assert backend.get_impl_cls() is cpu_attn.CPUAttentionBackendImpl, "outside of any model"


GOOD = {
    "num_heads": 4,
    "head_size": 64,
    "scale": 0.125,
    "num_kv_heads": 2,
    "alibi_slopes": None,
    "sliding_window": None,
    "kv_cache_dtype": "auto",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"sliding_window": 128}, None),
        ({"head_size": 80}, None),
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "capped scores"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
        ({"head_size": 40}, "head size 40"),
        ({"head_size": 512}, "head size 512"),
        ({"kv_cache_dtype": "fp8"}, "fp8 KV cache"),
    ],
)
def test_what_is_not_computed_is_refused_in_one_line(building, changes, message):
    with building(Recipe(luts={"softmax_exp": "nli-4"})):
        if message is None:
            attention.LutAttentionImpl(**GOOD | changes)
            return
        with pytest.raises(UserError, match=message) as refused:
            attention.LutAttentionImpl(**GOOD | changes)
    assert "\n" not in str(refused.value) and "--lut-sites" in str(refused.value)


def test_float32_is_refused(building):
    with building(Recipe(luts={"softmax_exp": "nli-4"})) as _:
        config = attention.get_current_vllm_config()
        config.model_config.dtype = torch.float32
        with pytest.raises(UserError, match=r"dtype torch\.float32"):
            attention.LutAttentionImpl(**GOOD)


@pytest.mark.parametrize(("scheme", "content"), [("nf4", 68), ("axcore", 131)])
def test_a_four_bit_cache(building, scheme, content, monkeypatch):
    """Which classes, how large a page, and what is refused."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    monkeypatch.setattr(attention.LutAttentionBackend, "scheme", None)
    spec = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.uint8)
    good = GOOD | {"kv_cache_dtype": kv_formats.CACHE_DTYPE}
    backend = attention.LutAttentionBackend
    with building(Recipe(kv_cache_scheme=scheme), kv_cache_dtype=kv_formats.CACHE_DTYPE):
        assert backend.get_impl_cls() is attention.Kv4AttentionImpl
        assert backend.get_builder_cls() is attention.LutMetadataBuilder
        for changes, message in (
            ({"kv_cache_dtype": "auto"}, "auto cache.*--kv-cache-dtype int4_per_token_head"),
            ({"sliding_window": 128}, "sliding window"),
            ({"head_size": 40}, "head size 40"),
            ({"kv_sharing_target_layer_name": "x"}, "share a cache"),
        ):
            with pytest.raises(UserError, match=f"--kv {scheme} cannot serve.*{message}") as refused:
                attention.Kv4AttentionImpl(**good | changes)
            assert "\n" not in str(refused.value)
        attention.get_current_vllm_config().cache_config.block_size = 136
        with pytest.raises(UserError, match="--block-size 136"):
            attention.Kv4AttentionImpl(**good)
        attention.get_current_vllm_config().cache_config.block_size = 128
        assert backend.customize_spec(spec) is spec
        attention.Kv4AttentionImpl(**good)
    assert backend.customize_spec(spec).state_content_bytes == content


def test_tables_by_layer():
    recipe = Recipe(luts={"layers.3.softmax_exp": "nli-4", "re:.*[02].softmax_recip": "nli-2"})
    found = {
        layer: attention.load_tables(recipe, f"model.layers.{layer}.self_attn.attn") for layer in (0, 1, 3)
    }
    exp = luts.lut_table("softmax_exp", "nli-4", torch.float16)
    recip = luts.lut_table("reciprocal", "nli-2", torch.float16)
    assert found == {0: (None, recip), 1: (None, None), 3: (exp, None)}
    report = REPORTS["model.layers.3.self_attn.attn", "softmax_exp"]
    assert (report.spec, report.function) == ("nli-4", "softmax_exp")
    assert ("model.layers.1.self_attn.attn", "softmax_exp") not in REPORTS


def outside(b, low, high):
    """Differences from the maximum outside [low, high], key by key."""
    found = 0
    group = b.query.shape[1] // b.cache.shape[1]
    for request, keys in enumerate(b.lengths.tolist()):
        first, last = b.query_start[request : request + 2].tolist()
        for row, head in itertools.product(range(first, last), range(b.query.shape[1])):
            end = keys - (last - row) + 1
            seen = b.keys[request][max(0, end - b.window) if b.window > 0 else 0 : end, head // group]
            scores = [
                sum(x * y for x, y in zip(b.query[row, head].tolist(), k, strict=True)) for k in seen.tolist()
            ]
            scores = [score * b.scale for score in scores]
            found += sum(not low <= score - max(scores) <= high for score in scores)
    return found


CASES = [{}, {"window": 5}, {"dtype": torch.float16}, {"heads": (6, 1), "size": 64}]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("count", [True, False])
def test_saturations_of_the_exponential(building, options, count):
    """Through the layer, for the range of a table that comes with lutserve."""
    b = batch([(1, 40), (20, 20), (0, 7), (3, 33)], **options, scale=32.0)
    recipe = Recipe(luts={"layers.3.softmax_exp": "nnlut:16"}, count_saturations=count)
    heads, kv_heads, size = b.query.shape[1], b.cache.shape[1], b.query.shape[2]
    with building(recipe):
        shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_size": size, "scale": b.scale}
        impl = attention.LutAttentionImpl(**GOOD | shape | {"sliding_window": b.window or None})
    steps = attention.LutMetadata(b.block_table, b.query_start, b.lengths, torch.empty(0).long())
    for name in ("model.layers.3.self_attn.attn", "model.layers.4.self_attn.attn"):
        layer = SimpleNamespace(layer_name=name)
        impl.tables = None
        out = torch.empty_like(b.query)
        impl.forward(layer, b.query, b.query, b.query, b.cache, None, out)  # the warm-up run
        for _ in range(2):
            impl.forward(layer, b.query, b.query, b.query, b.cache, steps, out)
    low, high = luts.input_range("softmax_exp", "nnlut:16")
    expected = outside(b, low, high)
    assert 0 < expected < b.query.shape[1] * (40 + 210 + 96)
    assert saturation.totals() == ({"softmax_exp": 2 * expected} if count else {})


def test_a_reciprocal_cannot_saturate():
    assert saturation.counter("m", "softmax_recip", "reciprocal", "nli-4") is None
