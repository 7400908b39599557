"""`lutserve::lut_attention`: kernels at every level, torch reference, scalar rule, float64, vLLM's own."""

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from attention_cases import (
    DTYPES,
    Batch,
    batch,
    grid_table,
    quotient,
    same,
    scalar_oracle,
    slots_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lutserve import luts
from lutserve.kernels import attention, isa, library
from lutserve.luts import bits

MIXED = ((1, 37), (5, 5), (1, 1), (0, 0), (7, 40), (0, 9), (20, 33))
SIZES = (16, 64, 80, 96, 128, 256)
GROUPS = ((1, 1), (4, 2), (9, 3), (5, 1), (7, 1), (8, 1))

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@cache
def nli():
    return luts.lut_table("softmax_exp", "nli-4", torch.float16)


@pytest.fixture(params=["kernel", "reference"])
def implementation(request):
    """The operator as it is served (C++ where it can be compiled), and its plain-torch reference."""
    library.load()
    return attention._reference if request.param == "reference" else attention.lut_attention


def grid_cases(dtype):
    """Batches whose results have the same bits for every order of summation."""
    options = {"dtype": dtype, "exp_table": grid_table()}
    for size in SIZES:
        yield batch(MIXED, size=size, **options)
    for heads in GROUPS:
        for window in (0, 1, 6, 16, 30):
            yield batch(MIXED, heads=heads, size=16, block_size=32, window=window, **options)
    recip = luts.lut_table("reciprocal", "nli-4", torch.float16)
    long = ((1, 1100), (30, 530), (1, 513), (3, 512))
    for more in ({}, {"fp16_sum": True}, {"recip_table": recip}, {"window": 600, "recip_table": recip}):
        yield batch(long, size=16, block_size=128, **options, **more)
    yield batch(MIXED, dtype=dtype, exp_table=torch.ones(65536).half())


def digest(dtype, function):
    """Sha256 over the results of all grid cases, one NaN for all."""
    total = hashlib.sha256()
    for case in grid_cases(dtype):
        y = case.run(function)
        total.update(torch.where(y.isnan(), torch.nan, y).view(torch.int16).numpy().tobytes())
    return total.hexdigest()


@each_dtype
@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("window", [0, 5, 17])
def test_grid_equals_the_scalar_rule(implementation, dtype, size, window):
    case = batch(MIXED, size=size, dtype=dtype, window=window, exp_table=grid_table())
    assert same(case.run(implementation), scalar_oracle(case))


@each_dtype
@pytest.mark.parametrize("fp16_sum", [False, True])
def test_reciprocal_table_equals_the_scalar_rule(implementation, dtype, fp16_sum):
    recip = luts.lut_table("reciprocal", "nli-2", torch.float16)
    options = {"exp_table": grid_table(), "recip_table": recip, "fp16_sum": fp16_sum}
    case = batch(MIXED, size=16, dtype=dtype, **options)
    assert same(case.run(implementation), scalar_oracle(case))
    assert not same(case.run(implementation), case.with_(recip_table=None).run(implementation))


LEVELS = [
    pytest.param(
        level.name,
        marks=pytest.mark.skipif(
            bool(isa.missing(level)), reason=f"this CPU lacks {' '.join(isa.missing(level))}"
        ),
    )
    for level in isa.LEVELS.values()
]


@pytest.fixture(scope="module")
def expected_digests():
    return {name: digest(dtype, attention._reference) for dtype, name in DTYPES.items()}


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_agrees_on_the_grid(level, expected_digests):
    """And is close to float64 off it, see `__main__`."""
    environment = {**os.environ, "LUTSERVE_ISA": level, "LUTSERVE_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"backend": f"cpu/{level}", **expected_digests}


def exact_oracle(b: Batch):
    """softmax(q k^T) v in float64, and the sum of |weight * value|: [tokens, heads, head size] each."""
    out = torch.full(b.query.shape, torch.nan, dtype=torch.float64)
    sums = torch.zeros_like(out)
    group = b.query.shape[1] // b.cache.shape[1]
    for request, keys in enumerate(b.lengths.tolist()):
        first, last = b.query_start[request : request + 2].tolist()
        if first == last:
            continue
        k, v = (x[request].double().repeat_interleave(group, 1).transpose(0, 1) for x in (b.keys, b.values))
        scores = b.query[first:last].double().transpose(0, 1) @ k.transpose(1, 2) * b.scale
        row, column = torch.arange(keys - last + first, keys)[:, None], torch.arange(keys)
        hidden = (column > row) | ((b.window > 0) & (column <= row - b.window))
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[first:last] = (p @ v).transpose(0, 1)
        sums[first:last] = (p @ v.abs()).transpose(0, 1)
    return out, sums


def assert_close_to_float64(b: Batch, y):
    """Exact exp: scores to 1e-5, weights and result rounded to the dtype."""
    want, sums = exact_oracle(b)
    # bf16 rounds weights and result to 8 bits, fp16 only the result to 11.
    weight, last = (2**-8, 2**-8) if b.query.dtype == torch.bfloat16 else (0, 2**-11)
    bound = (weight + 2e-5) * sums + last * want.abs() + 1e-7
    assert (y.isnan() == want.isnan()).all()
    error = (y.double() - want).abs()
    assert (error <= bound)[~want.isnan()].all(), (error / bound).nan_to_num().max()


@each_dtype
@pytest.mark.parametrize("size", SIZES)
def test_exact_is_close_to_float64(implementation, dtype, size):
    case = batch(((1, 530), (20, 50)), size=size, dtype=dtype, values="normal", window=size % 96)
    assert_close_to_float64(case, case.run(implementation))


@each_dtype
def test_large_scores(implementation, dtype):
    """Differences beyond fp16's range saturate: exact exp gives the largest score everything."""
    case = batch(MIXED, size=16, dtype=dtype, scale=4096.0, values="normal")
    assert_close_to_float64(case, case.run(implementation))
    table = nli().clone()
    table[0xFC00] = torch.nan  # the entry of minus infinity is never read
    tabled = case.with_(exp_table=table).run(implementation)
    assert same(tabled, case.with_(exp_table=nli()).run(implementation))
    assert_close_to_float64(case, tabled)


@each_dtype
def test_table_is_close_to_float64(implementation, dtype):
    """nli-4 is within 2.8e-3 of exp, so weights are within that of exact ones (the largest of which is 1)."""
    case = batch(((1, 530), (20, 50)), size=64, dtype=dtype, values="normal")
    want, sums = exact_oracle(case)
    error = (case.with_(exp_table=nli()).run(implementation).double() - want).abs()
    assert (error <= 0.02 * sums + 0.02).all()
    assert error.max() > 1e-4  # it is a table


@each_dtype
@pytest.mark.parametrize("table", [None, "nli-4"])
def test_kernel_and_reference_agree_off_the_grid(dtype, table):
    """Sums in another order move scores by 1e-6, which a table may turn into one entry more or less."""
    library.load()
    table = table and luts.lut_table("softmax_exp", table, torch.float16)
    case = batch(((1, 600), (20, 150)), heads=(6, 2), size=80, dtype=dtype, values="normal", exp_table=table)
    y, want = case.run().double(), case.run(attention._reference).double()
    _, sums = exact_oracle(case)
    ulp = torch.finfo(dtype).eps
    assert ((y - want).abs() <= ulp * want.abs() + (1e-5 if table is None else 1e-3) * sums + 1e-6).all()
    assert (y - want).abs().mean() < 0.01 * ulp


@pytest.fixture(scope="module")
def vllm_ops():
    return pytest.importorskip("vllm._custom_ops")


@each_dtype
@pytest.mark.parametrize("window", [0, 1, 40])
def test_exact_agrees_with_vllm(vllm_ops, dtype, window):
    """Same shapes, same inputs, vLLM's own cache and kernel."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    library.load()
    heads, size, block_size = (8, 2), 64, 32
    case = batch(
        ((1, 200), (60, 150), (33, 33)), heads, size, dtype, block_size, values="normal", window=window
    )
    level = _get_attn_isa(dtype, block_size, size)
    halves = (
        torch.zeros_like(case.cache).view(len(case.cache), heads[1], 2 * block_size, size).chunk(2, dim=2)
    )
    for row, (k, v) in enumerate(zip(case.keys, case.values, strict=True)):
        slots = slots_of(case.block_table[row], len(k), block_size)
        vllm_ops.cpu_attn_reshape_and_cache(k, v, *halves, slots, level)
    blocks = torch.where(case.block_table < len(case.cache), case.block_table, 0)
    window = window or -1
    plan = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(case.lengths),
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=size,
        seq_lens=case.lengths,
        dtype=dtype,
        query_start_loc=case.query_start,
        causal=True,
        sliding_window_size=window,
        isa=level,
        enable_kv_split=True,
    )
    want = torch.empty_like(case.query)
    vllm_ops.cpu_attention_with_kv_cache(
        query=case.query,
        key_cache=halves[0],
        value_cache=halves[1],
        output=want,
        query_start_loc=case.query_start,
        seq_lens=case.lengths,
        scale=case.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=window,
        block_table=blocks,
        softcap=0,
        scheduler_metadata=plan,
        s_aux=None,
    )
    _, sums = exact_oracle(case)
    error = (case.run().double() - want.double()).abs()
    assert (error <= torch.finfo(dtype).eps * (sums + want.double().abs()) + 1e-5).all()


@each_dtype
@pytest.mark.parametrize("table", [None, "nli-4"])
@pytest.mark.parametrize("window", [0, 100])
def test_a_row_does_not_depend_on_its_company(dtype, table, window):
    """The same bits alone, in a batch, in chunks, and with any number of threads."""
    library.load()
    options = {"exp_table": table and nli(), "window": window}
    keys = 1200
    whole = batch(((keys, keys),), (6, 2), 32, dtype, values="normal", **options)
    want = whole.run()
    threads = torch.get_num_threads()
    try:
        for count, cuts in ((1, (0, 1, 700, 701, 1199, keys)), (2, (0, 513, 1150, keys)), (3, (0, keys))):
            torch.set_num_threads(count)
            for first, last in pairwise(cuts):
                part = whole.with_(
                    query=whole.query[first:last],
                    query_start=torch.tensor([0, last - first], dtype=torch.int32),
                    lengths=torch.tensor([last], dtype=torch.int32),
                )
                assert same(part.run(), want[first:last]), (count, first, last)
            # Every row as a request of its own that decodes.
            rows = range(3, keys, 171)
            decode = whole.with_(
                query=whole.query[3::171],
                query_start=torch.arange(len(rows) + 1, dtype=torch.int32),
                lengths=torch.tensor(rows, dtype=torch.int32) + 1,
                block_table=whole.block_table.expand(len(rows), -1).contiguous(),
            )
            assert same(decode.run(), want[3::171])
    finally:
        torch.set_num_threads(threads)


@each_dtype
@pytest.mark.parametrize("window", [0, 2000])
def test_sharing_chunks_changes_no_bits(dtype, window):
    """Three tiles of 3,000 keys: one thread takes whole tiles, two share their chunks."""
    library.load()
    requests = ((1, 3000),)
    case = batch(requests, (6, 3), 256, dtype, 128, values="normal", exp_table=nli(), window=window)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = case.run()
        torch.set_num_threads(2)
        assert same(case.run(), want)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ragged_batches(data):
    """Kernel, reference: equal bits whatever the shapes."""
    library.load()
    requests = data.draw(
        st.lists(st.integers(0, 70).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), max_size=5)
    )
    group = data.draw(st.integers(1, 8))
    kv_heads = data.draw(st.integers(1, 3))
    case = batch(
        requests,
        heads=(group * kv_heads, kv_heads),
        size=16 * data.draw(st.integers(1, 6)),
        dtype=data.draw(st.sampled_from(list(DTYPES))),
        block_size=data.draw(st.sampled_from((16, 32, 128))),
        window=data.draw(st.sampled_from((0, 0, 1, 3, 16, 50))),
        exp_table=grid_table(),
        seed=data.draw(st.integers(0, 9)),
    )
    assert same(case.run(), case.run(attention._reference))


@each_dtype
def test_rows_of_no_request_are_not_written(implementation, dtype):
    case = batch(((3, 20), (2, 2)), dtype=dtype, exp_table=grid_table())
    out = torch.full((9, *case.query.shape[1:]), 7.0, dtype=dtype)
    padded = torch.cat([case.query, torch.full_like(out[:4], torch.nan)])
    arguments = (case.cache, case.block_table, case.query_start, case.lengths)
    implementation(padded, *arguments, out, case.scale, 0, case.exp_table, None, False)
    assert same(out[:5], case.run(implementation)) and (out[5:] == 7).all()


@each_dtype
def test_strided_query_and_output(implementation, dtype):
    """As vLLM gives them: the query is a slice of the fused projection's result."""
    case = batch(((6, 20), (1, 30)), heads=(4, 2), size=32, dtype=dtype, exp_table=grid_table())
    fused = torch.full((7, 8 * 32), torch.nan, dtype=dtype)
    fused[:, 64:192] = case.query.flatten(1)
    wide = torch.full((7, 5, 32), 3.0, dtype=dtype)
    rest = (case.cache, case.block_table, case.query_start, case.lengths, wide[:, 1:])
    implementation(fused[:, 64:192].view(7, 4, 32), *rest, case.scale, 0, case.exp_table, None, False)
    assert same(wide[:, 1:].contiguous(), case.run(implementation)) and (wide[:, 0] == 3).all()


@each_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_invalid_values_reach_only_those_who_see_them(implementation, dtype, bad):
    table = grid_table()
    table[0x7C01:0x8000] = 1.0  # what the table says about NaN changes nothing
    table[0xFC01:] = 1.0
    clean = batch(((40, 40),), dtype=dtype, window=25, exp_table=table)
    want = clean.run(implementation)
    at = places_of(clean, 10)
    for name, place in zip(("key", "value"), at, strict=True):
        spoilt = clean.cache.clone()
        spoilt[clean.block_table[0, 0]].view(2, -1)[0, place[3]] = bad
        y = clean.with_(cache=spoilt).run(implementation)
        assert same(y[:10], want[:10]) and same(y[35:], want[35:]), name
        assert same(y[:, 2:], want[:, 2:]), "another kv head"
        if name == "value":
            touched = torch.zeros(32, dtype=torch.bool).index_fill(0, torch.tensor(3), True)
            assert not y[10:35, :2][..., touched].isfinite().any()
            assert same(y[10:35, :2][..., ~touched], want[10:35, :2][..., ~touched])
        elif bad != bad:
            assert y[10:35, :2].isnan().all()
        else:  # scores are plus or minus infinity, or NaN where the query is 0 there
            q = clean.query[10:35, :2, 3].float() * bad
            assert (y[10:35, :2].isnan().all(-1) == ((q == torch.inf) | q.isnan())).all()


def places_of(b: Batch, token):
    """Where a token's key and value lie in its block and head."""
    places = attention.places(b.cache.dtype, b.cache.shape[2], b.query.shape[2])
    return tuple(place[token] for place in places)


@each_dtype
def test_hostile_tables(implementation, dtype):
    """Zeros divide to NaN, negative and huge entries go through; nobody reads outside the table."""
    case = batch(MIXED, dtype=dtype, exp_table=torch.zeros(65536).half())
    y = case.run(implementation)
    assert y.isnan().all()
    case, twin = case.with_(exp_table=-grid_table()), case.with_(exp_table=grid_table())
    assert torch.equal(case.run(implementation).nan_to_num(7), twin.run(implementation).nan_to_num(7))
    case = case.with_(exp_table=torch.full((65536,), 65504.0).half())
    even = case.with_(exp_table=torch.ones(65536).half()).run(implementation).double()
    assert torch.allclose(case.run(implementation).double(), even, rtol=2**-7, atol=1e-6, equal_nan=True)
    random = np.random.default_rng(3).integers(0, 65536, 65536, dtype=np.uint16).view(np.int16)
    case.with_(exp_table=torch.from_numpy(random).view(torch.float16)).run(implementation)


def test_sums_are_exact_saturated_and_inverted(implementation):
    """Weights of 1 make the sum the number of keys, and values of 1 the result its inverse times that."""
    counts = (1, 2, 3, 1023, 1025, 2047, 2049, 4097, 70000)
    case = batch(
        tuple((1, n) for n in counts),
        heads=(1, 1),
        size=16,
        dtype=torch.float16,
        block_size=128,
        exp_table=torch.ones(65536).half(),
    )
    for k, v in zip(case.keys, case.values, strict=True):
        v.fill_(1.0)
        slots = slots_of(case.block_table[len(v) and case.lengths.tolist().index(len(v))], len(v), 128)
        attention.cache_write(k, v, case.cache, slots)
    recip = luts.lut_table("reciprocal", "nli-4", torch.float16)
    for table in (None, recip):
        for fp16_sum in (False, True):
            y = case.with_(recip_table=table, fp16_sum=fp16_sum).run(implementation)
            want = [quotient(float(n), float(n), table, fp16_sum) for n in counts]
            assert same(y, torch.tensor(want).half()[:, None, None].expand(y.shape).contiguous())


def test_divide_equals_the_scalar_rule():
    special = [0.0, -0.0, 1e-45, -3.0, np.inf, -np.inf, np.nan, 2.0**-126, 3e38, 65519.0, 65520.0, -65520.0]
    random = np.random.default_rng(5)
    totals = torch.tensor([*special, *random.uniform(0, 3000, 500), *2.0 ** random.uniform(-120, 120, 200)])
    totals = totals.float()
    weighted = torch.from_numpy(random.normal(size=len(totals))).float()
    for table in (None, luts.lut_table("reciprocal", "nli-2", torch.float16)):
        for fp16_sum in (False, True):
            y = attention.divide(weighted, totals, table, fp16_sum)
            want = [
                quotient(a, b, table, fp16_sum)
                for a, b in zip(weighted.tolist(), totals.tolist(), strict=True)
            ]
            with np.errstate(over="ignore"):
                want = torch.from_numpy(np.array(want).astype(np.float32))
            assert torch.equal(y.nan_to_num(7), want.nan_to_num(7)) and torch.equal(y.isnan(), want.isnan())


def test_reference_serves_where_no_kernel_is_loaded():
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "reciprocal_table and kernel"]
    environment = {**os.environ, "LUTSERVE_BACKEND": "reference"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_bits_of_the_scalar_helpers():
    """The oracle's own roundings against `luts.bits`, which has tests of its own."""
    from attention_cases import bfloat16, half

    values = np.random.default_rng(2).normal(size=2000).astype(np.float32)
    for fmt, function in (("float16", half), ("bfloat16", bfloat16)):
        want = bits.decode(bits.encode(values, fmt), fmt)
        assert [function(float(x)) for x in values] == want.tolist()


if __name__ == "__main__":
    library.load()
    for off_grid in DTYPES:
        example = batch(((1, 600), (40, 90)), (3, 1), 80, off_grid, values="normal")
        assert_close_to_float64(example, example.run())
    served = {name: digest(dtype, None) for dtype, name in DTYPES.items()}
    print(json.dumps({"backend": library.backend_for("lut_attention"), **served}))
