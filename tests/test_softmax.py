"""The published softmax to the bit, against its golden arrays and a scalar implementation of our own."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import bfloat16, half, single

from lutserve import luts
from lutserve.kernels import attention, library
from lutserve.kernels.softmax import published_softmax

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUND = {torch.float32: single, torch.bfloat16: bfloat16, torch.float16: half}
SMALL = Path(__file__).parent / "data" / "published_softmax_n4.npz"


def tensor(array, name):
    return torch.from_numpy(array.view(np.int32 if name == "fp32" else np.int16)).view(DTYPES[name])


def same(a, b):
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def cases(golden, kind):
    """Yield input, dtype name, implementation and published output."""
    for key in golden.files:
        if key.startswith("out/") and kind in key:
            _, implementation, case, name = key.split("/")
            yield tensor(golden[f"in/{case}/{name}"], name), name, implementation, tensor(golden[key], name)


def scalar_softmax(row, dtype, table):
    """One row in Python's floats; table: list of 65,536 numbers."""
    rounded = ROUND[dtype]
    top = max(row)
    e = []
    for score in row:
        difference = score - top
        x = -math.inf if difference <= -65520 else rounded(difference)
        e.append(table[struct.unpack("<H", struct.pack("<e", half(x)))[0]])
    total = half(sum(e))
    return [rounded(single(x / total)) for x in e]


def test_committed_golden_and_scalar():
    table = luts.lut_table("softmax_exp", "nli-4", torch.float16)
    entries = table.tolist()
    seen = 0
    for x, _, _, want in cases(np.load(SMALL), "fplut"):
        assert same(published_softmax(x, table), want)
        for row, probabilities in zip(x.flatten(0, -2), want.flatten(0, -2), strict=True):
            if not row.isnan().any() and row.max().abs() < 1e30:
                got = torch.tensor(scalar_softmax(row.tolist(), x.dtype, entries), dtype=torch.float64)
                assert same(got.to(x.dtype), probabilities)
                seen += 1
    assert seen > 200


@pytest.mark.parametrize("points", [4, 32])
def test_golden_nli(shared, points):
    table = luts.lut_table("softmax_exp", f"nli-{points}", torch.float16)
    golden = np.load(shared / f"golden/fplut/softmax_cases_n{points}.npz")
    found = list(cases(golden, "fplut"))
    assert len(found) == 24
    for x, name, _, want in found:
        assert same(published_softmax(x, table), want), name


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_golden_nn_lut(shared, name):
    """In fp32 models NN-LUT does not round its input to 16 bits, so no table of 65,536 entries gives it."""
    tables = np.load(shared / f"golden/fplut/nnlut_{name}.npz")
    golden = np.load(shared / "golden/fplut/softmax_cases_n4.npz")
    found = [case for case in cases(golden, "nn_") if case[1] == name]
    assert len(found) == 32
    for x, _, implementation, want in found:
        # The three published folders share one exp table of each size.
        table = tensor(tables[f"nnlut_bench__exp_{implementation[-3:]}"].astype(np.uint16), name)
        assert same(published_softmax(x, table), want), implementation


@pytest.mark.parametrize("points", [4, 32])
@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_golden_attention(shared, points, name):
    """What is served, against published attention, which rounds scores and probabilities to the dtype.

    A score of about 4 is off by up to 2^-9 * 4 in bf16 and so is the logarithm of its weight: two units in
    the last place of the largest output (2.75) cover that and the final rounding.
    """
    library.load()
    golden = np.load(shared / f"golden/fplut/glu_attn_cases_n{points}.npz")
    q, k, v = (tensor(golden[f"attn/{part}/{name}"], name).transpose(1, 2) for part in "qkv")
    want = tensor(golden[f"attn/out/fplut_n{points}/{name}"], name)
    requests, tokens, heads, size = q.shape
    cache = torch.full((requests, k.shape[2], 16, 2 * size), torch.nan, dtype=q.dtype)
    for request in range(requests):
        slots = 16 * request + torch.arange(tokens)
        attention.cache_write(k[request].contiguous(), v[request].contiguous(), cache, slots)
    out = torch.full((requests * tokens, heads, size), torch.nan, dtype=q.dtype)
    attention.lut_attention(
        q.flatten(0, 1).contiguous(),
        cache,
        torch.arange(requests, dtype=torch.int32)[:, None],
        torch.arange(requests + 1, dtype=torch.int32) * tokens,
        torch.full((requests,), tokens, dtype=torch.int32),
        out,
        size**-0.5,
        0,
        luts.lut_table("softmax_exp", f"nli-{points}", torch.float16),
        None,
        True,
    )
    error = (out.view(want.shape).double() - want.double()).abs().max()
    assert 0 < error <= 2 * 2 * torch.finfo(q.dtype).eps
