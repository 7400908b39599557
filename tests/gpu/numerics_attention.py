"""`cache_write` and `lut_attention`: the torch reference's bits wherever sums are exact, else close to it."""

from __future__ import annotations

import pytest
import torch
from attention_cases import batch, grid_table, same, slots_of

from lutserve import luts
from lutserve.kernels import attention
from lutserve.kernels.gpu import attention_steps

MIXED = ((1, 37), (5, 5), (1, 1), (0, 0), (7, 40), (0, 9), (20, 33))
FEW = ((1, 70), (2, 3), (0, 5), (1, 130))

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@pytest.fixture
def attend(served):
    return served("lut_attention")


@each_dtype
@pytest.mark.parametrize("size", [16, 80, 128])
def test_cache_write(served, dtype, size):
    random = torch.Generator().manual_seed(size)
    wide = torch.randn(40, 2, 2, size + 3, generator=random).to(dtype)
    key, value = wide[:, 0, :, :size], wide[:, 1, :, 1 : size + 1]
    slots = torch.randperm(64, generator=random)[:38]
    slots[::5] = -1
    caches = [torch.full((2, 2, 32, 2 * size), torch.nan, dtype=dtype) for _ in range(2)]
    served("cache_write")(key, value, caches[0], slots)
    attention._write_reference(key, value, caches[1], slots)
    assert torch.equal(*(c.view(torch.int16) for c in caches))


CASES = {
    "plain": {},
    "size": {"size": 80},
    "odd group, window": {"heads": (3, 1), "size": 16, "window": 6},
    "wide window, large blocks": {"heads": (2, 2), "size": 16, "window": 30, "block_size": 32},
    "fp16 sum": {"size": 16, "fp16_sum": True},
    "reciprocal": {"size": 16, "recip_table": luts.lut_table("reciprocal", "nli-4", torch.float16)},
}


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_reference(attend, dtype, name):
    case = batch(MIXED, dtype=dtype, exp_table=grid_table(), **CASES[name])
    assert same(case.run(attend), case.run(attention._reference))


@each_dtype
@pytest.mark.parametrize("window", [0, 70])
def test_keys_in_parts(attend, dtype, window):
    """Few rows of long requests are split between programs, prefill of few long ones too."""
    case = batch(FEW, heads=(4, 1), size=16, dtype=dtype, exp_table=grid_table(), window=window)
    case = case.with_(recip_table=luts.lut_table("reciprocal", "nli-2", torch.float16))
    programs = len(case.query) // 4 + len(FEW)
    assert attention_steps.splits_for(programs, case.block_table.shape[1] * 16, 64) > 1
    assert same(case.run(attend), case.run(attention._reference))


@each_dtype
@pytest.mark.parametrize("spec", ["exact", "nli-4"])
def test_ordinary_numbers(attend, dtype, spec):
    table = None if spec == "exact" else luts.lut_table("softmax_exp", spec, torch.float16)
    case = batch(((9, 75), (1, 30)), size=32, dtype=dtype, values="normal", exp_table=table)
    found, want = (case.run(f).float() for f in (attend, attention._reference))
    torch.testing.assert_close(found, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@each_dtype
def test_what_is_not_finite_reaches_only_those_who_see_it(attend, dtype):
    for bad in (torch.nan, torch.inf):
        case = batch(((6, 70),), heads=(2, 1), size=16, dtype=dtype, exp_table=grid_table())
        keys, values = case.keys[0].clone(), case.values[0].clone()
        values[67, 0, 3] = bad
        keys[68, 0, 0] = bad
        attention.cache_write(keys, values, case.cache, slots_of(case.block_table[0], 70, 16))
        found = case.run(attend)
        assert same(found, case.run(attention._reference))
        assert found[:3].isfinite().all() and not found[3, :, 3].isfinite().any()
    # A table that is NaN where nothing is seen, and rows whose only score is their maximum.
    assert same(
        case.with_(exp_table=torch.full((65536,), torch.nan).half()).run(attend), case.query * torch.nan
    )


def test_strided_query_and_padding_behind_the_last_request(served):
    case = batch(FEW, size=16, exp_table=grid_table())
    wide = torch.full((len(case.query) + 3, 4, 40), torch.nan).bfloat16()
    wide[: len(case.query), :, 8:24] = case.query
    padded = case.with_(query=wide[..., 8:24])
    expected = torch.full((len(wide), 4, 16), torch.nan).bfloat16()
    expected[: len(case.query)] = case.run(attention._reference)
    out = torch.full_like(expected, torch.nan)
    served("lut_attention")(
        padded.query, case.cache, case.block_table, case.query_start, case.lengths, out, case.scale, 0,
        case.exp_table, None, False,
    )  # fmt: skip
    assert same(out, expected)
