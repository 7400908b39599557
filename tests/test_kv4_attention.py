"""`lutserve::kv4_attention`: scalar rule, torch reference, kernels at two levels, steps, poison, threads."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from attention_cases import grid_table, same
from kv4_cases import batch, oracle

from lutserve import luts
from lutserve.kernels import isa, kv4, kv4_attention, library

H, B = torch.float16, torch.bfloat16
#: scheme and model type
SCHEMES = (("int4", ""), ("e2m1", ""), ("axcore", "llama"), ("axcore", "opt"))

each_dtype = pytest.mark.parametrize("dtype", [H, B])
each_scheme = pytest.mark.parametrize(("name", "family"), SCHEMES)


@pytest.fixture(autouse=True, scope="module")
def _loaded():
    library.load()


def all_same(found, want):
    return all(same(a, b) for a, b in zip(found, want, strict=True))


@each_dtype
@each_scheme
def test_grid_equals_the_scalar_rule(name, family, dtype):
    """Twice: in one step, and in steps that cut units, with a table and with one of reciprocals."""
    case = batch(name, (67, 3), (2, 1), 16, dtype, exp_table=grid_table(), model_type=family)
    want = oracle(case)
    assert all_same(case.run()[0], want) and all_same(case.run(reference=True)[0], want)
    steps = [[10, 1], [53, 0], [1, 1], [3, 1]]
    assert all_same(case.run(steps)[0], want) and all_same(case.run(steps, reference=True)[0], want)
    recip = luts.lut_table("reciprocal", "nli-2", torch.float16)
    short = batch(name, (5,), (2, 1), 80, dtype, exp_table=grid_table(), model_type=family)
    short = short.with_(recip_table=recip, fp16_sum=True)
    assert all_same(short.run()[0], oracle(short))


def grid_cases(dtype):
    for name, family in SCHEMES:
        for size, heads, block in ((32, (4, 2), 64), (64, (9, 3), 128), (80, (5, 1), 192), (128, (2, 2), 64)):
            options = {"exp_table": grid_table(), "model_type": family}
            yield batch(name, (130, 1, 64), heads, size, dtype, block, **options)
        yield batch(name, (600,), (2, 1), 16, dtype, 128, exp_table=grid_table(), model_type=family)


def digest(dtype, reference=False):
    total = hashlib.sha256()
    for case in grid_cases(dtype):
        for y in case.run(reference=reference)[0]:
            total.update(torch.where(y.isnan(), torch.nan, y).view(torch.int16).numpy().tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def expected():
    return [digest(H, reference=True), digest(B, reference=True)]


@pytest.mark.parametrize("level", isa.LEVELS)
def test_every_level_agrees_with_the_reference(level, expected):
    if lacking := isa.missing(isa.LEVELS[level]):
        pytest.skip(f"this CPU lacks {' '.join(lacking)}")
    environment = {**os.environ, "LUTSERVE_ISA": level, "LUTSERVE_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [f"cpu/{level}", *expected]


@each_dtype
@pytest.mark.parametrize("name", ["nf4", "axcore"])
@pytest.mark.parametrize("table", [None, "nli-4"])
def test_steps_and_threads_change_no_bits(name, dtype, table):
    """However a prompt is cut, alone or beside another, with one thread or three."""
    table = table and luts.lut_table("softmax_exp", table, torch.float16)
    case = batch(name, (600, 100), (3, 1), 32, dtype, 192, values="normal", exp_table=table)
    want, cache = case.run()
    threads = torch.get_num_threads()
    steps = ([[64, 0], [1, 100], [447, 0], [65, 0], [23, 0]], [[599, 99], [1, 1]], [[0, 63], [600, 37]])
    try:
        for count, step in enumerate(steps, start=1):
            torch.set_num_threads(count)
            found, other = case.run(step)
            assert all_same(found, want), step
            if not case.scheme.by_unit:
                assert torch.equal(other, cache)
    finally:
        torch.set_num_threads(threads)


@each_dtype
@each_scheme
def test_what_nobody_has_written_changes_nothing(name, family, dtype):
    """Also where it reads as scales that are NaN (0xFF) or infinite (0x7C)."""
    case = batch(name, (70, 5), dtype=dtype, values="normal", model_type=family)
    want = case.run()[0]
    for fill in (0x00, 0x7C, 0xFF):
        for step in (None, [[40, 5], [30, 0]]):
            assert all_same(case.with_(fill=fill).run(step)[0], want)


@each_dtype
@each_scheme
def test_kernel_and_reference_are_close_off_the_grid(name, family, dtype):
    case = batch(name, (150,), (6, 2), 80, dtype, values="normal", model_type=family)
    y, want = case.run()[0][0].double(), case.run(reference=True)[0][0].double()
    ulp = torch.finfo(dtype).eps
    # In bf16 models the two exponentials may round a weight to one of two neighbours.
    slack = ulp if dtype == B else 2e-5
    assert ((y - want).abs() <= 2 * ulp * want.abs() + slack).all()
    assert (y - want).abs().mean() < 0.02 * ulp


@pytest.mark.parametrize(("name", "most"), [("nf4", 0.13), ("int4", 0.2), ("axcore", 0.25)])
def test_four_bits_are_close_to_sixteen(name, most):
    case = batch(name, (300,), values="normal")
    query, key, value = (x[0].float().transpose(0, 1) for x in (case.query, case.key, case.value))
    key, value = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=case.scale
    )
    found = case.run()[0][0].float().transpose(0, 1)
    error = ((found - want).norm() / want.norm()).item()
    assert 0.01 < error < most


@each_dtype
@pytest.mark.parametrize("name", ["nf4", "axcore"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_invalid_values_reach_only_those_who_see_them(name, bad, dtype):
    case = batch(name, (100,), dtype=dtype, values="normal")
    clean = case.run()[0][0]
    for steps in (None, [[30], [70]]):
        for kind in ("key", "value"):
            spoilt = getattr(case, kind)[0].clone()
            spoilt[20, 0, 3] = bad
            for reference in (False, True):
                y = case.with_(**{kind: (spoilt,)}).run(steps, reference)[0][0]
                assert reference or same(y[:20], clean[:20])
                assert reference or same(y[:, 2:].contiguous(), clean[:, 2:].contiguous()), "another kv head"
                assert not y[20:, :2, 3].isfinite().any()


def arguments(case):
    """Those of one call, by name."""
    seen = {}

    original = kv4_attention.kv4_attention

    def spy(*values):
        names = (argument.name for argument in original._schema.arguments)
        seen.update(zip(names, values, strict=True))

    try:
        kv4_attention.kv4_attention = spy
        case.run()
    finally:
        kv4_attention.kv4_attention = original
    return seen | {"block_table": seen["block_table"].clamp(max=len(seen["cache"]) - 1)}


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_wrong_arguments(implementation):
    run = kv4_attention._reference if implementation == "reference" else kv4_attention.kv4_attention
    good = arguments(batch("axcore", (3, 2)))
    run(*good.values())
    for changes, message in (
        ({"query": good["query"].float()}, "float16 or bfloat16"),
        ({"query": good["query"].half()}, "alike|tables"),
        ({"cache": good["cache"][..., :-1]}, "bytes a token"),
        ({"cache": good["cache"].view(torch.int8)}, "uint8"),
        ({"value": None}, "bytes a token"),
        ({"value": good["value"][:, :1]}, "by unit"),
        ({"out": good["out"][:-1]}, "alike"),
        ({"offsets": None}, "tables"),
        ({"key_tables": good["key_tables"].half()}, "alike|tables"),
        ({"exp_table": torch.ones(7).half()}, "table"),
        ({"lengths": good["lengths"].long()}, "int32"),
    ):
        with pytest.raises(RuntimeError, match=f"kv4_attention.*({message})"):
            run(*(good | changes).values())


@each_dtype
@pytest.mark.parametrize("name", ["nf4", "axcore"])
def test_opcheck(name, dtype):
    case = batch(name, (20, 5), dtype=dtype, values="normal", fill=0)
    good = arguments(case) | {"out": torch.zeros_like(torch.cat(case.query))}
    torch.library.opcheck(kv4_attention.kv4_attention, tuple(good.values()))
    slots = torch.arange(20)
    divisors = (case.scheme.keys.divisor, case.scheme.values.divisor, case.scheme.by_unit)
    bounds = torch.tensor([case.scheme.keys.bounds, case.scheme.values.bounds], dtype=torch.float32)
    writing = (case.key[0], case.value[0], good["cache"], slots, bounds, *divisors)
    torch.library.opcheck(kv4.write, writing)
    if case.scheme.by_unit:
        torch.library.opcheck(kv4.keep_tail, (case.value[0], good["cache"], slots))


if __name__ == "__main__":
    library.load()
    print(json.dumps([library.backend_for("kv4_attention"), digest(H), digest(B)]))
