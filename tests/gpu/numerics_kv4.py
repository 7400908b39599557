"""`kv4_write`, `kv4_keep_tail` and `kv4_attention`: the reference's cache bytes, its bits on the grid."""

from __future__ import annotations

import pytest
import torch
from attention_cases import grid_table, same
from kv4_cases import batch

from lutserve import luts
from lutserve.kernels import kv4, kv4_attention

H, B = torch.float16, torch.bfloat16

each_dtype = pytest.mark.parametrize("dtype", [H, B])


@pytest.fixture(autouse=True)
def _launchers(served, monkeypatch):
    """Let `kv4_cases` run ours."""
    monkeypatch.setattr(kv4, "write", served("kv4_write"))
    monkeypatch.setattr(kv4, "keep_tail", served("kv4_keep_tail"))
    monkeypatch.setattr(kv4_attention, "kv4_attention", served("kv4_attention"))


def compare(case, steps=None, exact=True):
    (found, cache), (want, expected) = case.run(steps), case.run(steps, reference=True)
    assert torch.equal(cache, expected)
    for a, b in zip(found, want, strict=True):
        if exact:
            assert same(a, b)
        else:
            torch.testing.assert_close(a.float(), b.float(), rtol=2 * torch.finfo(a.dtype).eps, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "family", "dtype"),
    [("int4", "", H), ("axcore", "llama", H), ("axcore", "llama", B), ("axcore", "opt", B)],
)
def test_the_bits_of_the_reference(name, family, dtype):
    """In steps that cut units, the last with a table of reciprocals."""
    recip = luts.lut_table("reciprocal", "nli-2", torch.float16)
    options = {"dtype": dtype, "exp_table": grid_table(), "model_type": family, "recip_table": recip}
    compare(batch(name, (67, 3), (2, 1), 16, **options), [[62, 1], [2, 0], [3, 2]])


@pytest.mark.parametrize(("name", "family", "dtype"), [("nf4", "", H), ("axcore", "llama", B)])
def test_ordinary_numbers(name, family, dtype):
    """Exact exp, a whole and a short group; cache bytes still equal."""
    case = batch(name, (66,), (3, 1), 80, dtype, values="normal", model_type=family, fp16_sum=True)
    compare(case, [[65], [1]], exact=False)


@pytest.mark.parametrize(("name", "family", "dtype"), [("nf4", "", H), ("axcore", "llama", B)])
def test_what_is_not_finite_and_zero(name, family, dtype):
    case = batch(name, (66,), (2, 1), 16, dtype, values="normal", exp_table=grid_table(), model_type=family)
    case.value[0][3], case.key[0][5] = 0, 0
    case.value[0][65, 0, 2] = torch.inf
    found, _ = case.run([[64], [2]])
    want, _ = case.run([[64], [2]], reference=True)
    assert same(found[0].isfinite().half(), want[0].isfinite().half())
    assert found[0][:65].isfinite().all() and not found[0][65].isfinite().all()


@each_dtype
@pytest.mark.parametrize("by_unit", [False, True])
def test_numbers_of_every_size_are_quantised_alike(dtype, by_unit):
    """Patterns from all over as keys and values, in groups of like size, NaN and infinity among them."""
    patterns = torch.arange(0, 65536, 16, dtype=torch.int32).to(torch.int16).view(dtype)
    case = batch("axcore" if by_unit else "nf4", (64,), (1, 1), 64, dtype)
    tokens = patterns.view(64, 1, 64)
    case = case.with_(query=(tokens,), key=(tokens,), value=(tokens.flip(0),))
    assert torch.equal(case.run()[1], case.run(reference=True)[1])
