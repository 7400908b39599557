"""The norm operators: a scalar implementation, the torch reference and the C++ at every level, bit by bit.

Run as a script this file prints the digest of all cases, so that each level gets a process of its own.
"""

import hashlib
import json
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_act_and_mul import DTYPES, LEVELS, canonical, random_bits

from lutserve import luts
from lutserve.kernels import library, norm
from lutserve.luts import bits

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def f32(value):
    """A float64 rounded to fp32. Sums, products and quotients of fp32 numbers are rounded once by this."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def scalar_rsqrt(v, table):
    """1 / sqrt(v) from the definition: v to eleven bits, v = m * 4**e, table[m] * 2**-e."""
    if math.isnan(v) or v < 0:
        return math.nan
    if v in (0, math.inf):
        return math.inf if v == 0 else 0.0
    fraction, exponent = math.frexp(v)  # fraction in [0.5, 1)
    m, e = round(fraction * 2048) / 2048 * 2, exponent - 1  # round() takes ties to even
    if m == 2:
        m, e = 1.0, e + 1
    if e % 2:
        m, e = 2 * m, e - 1
    index = int(np.float16(m).view(np.uint16))
    return math.ldexp(float(table[index]), -e // 2)


def scalar_sum(values):
    """64 sums of every 64th value, then halved."""
    lanes = [0.0] * 64
    for i, value in enumerate(values):
        lanes[i % 64] = f32(lanes[i % 64] + value)
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [f32(a + b) for a, b in zip(lanes[:half], lanes[half:], strict=True)]
    return lanes[0]


def to(dtype, value):
    """Round an fp32 number to a 16-bit dtype, as a float."""
    return float(
        bits.decode(bits.encode(np.array([value], dtype=np.float32), DTYPES[dtype]), DTYPES[dtype])[0]
    )


def scalar_norm(kind, x, table, eps, weight=None, bias=None, residual=None):
    """One row, lists of floats; returns the row and, with a residual, the rounded sum."""
    dtype = x.dtype
    row = [float(a) for a in x]
    if residual is not None:
        row = [f32(a + float(b)) for a, b in zip(row, residual, strict=True)]
    added = [to(dtype, a) for a in row]
    if kind == "layer":
        mean = f32(scalar_sum(row) / len(row))
        row = [f32(a - mean) for a in row]
    squares = f32(scalar_sum([f32(a * a) for a in row]) / len(row))
    r = scalar_rsqrt(f32(squares + f32(eps)), table)
    row = [f32(a * r) for a in row]
    if weight is not None:
        if kind == "rms" and weight.dtype == dtype:
            row = [to(dtype, a) for a in row]
        row = [f32(a * float(w)) for a, w in zip(row, weight, strict=True)]
    if bias is not None:
        row = [f32(a + float(b)) for a, b in zip(row, bias, strict=True)]
    return [to(dtype, a) for a in row], added


def random_table(seed=3):
    """Random finite entries, none of them near the true function: a wrong index shows."""
    values = np.random.default_rng(seed).uniform(0.3, 1.7, 65536).astype(np.float16)
    return torch.from_numpy(values)


def normal(shape, dtype, seed=1, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def weights(kind, columns, dtype):
    """None, one of x's dtype, or fp32."""
    return {"none": None, "same": normal(columns, dtype, 2), "wide": normal(columns, torch.float32, 3)}[kind]


@pytest.fixture(params=["kernel", "reference"])
def ops(request):
    """The operators as they are served, and their plain-torch references."""
    if request.param == "reference":
        return norm._reference, norm._add_reference, norm._layer_reference
    library.load()
    return norm.rms_norm, norm.add_rms_norm, norm.layer_norm


def same(got, rows, dtype):
    """Whether a tensor [rows, columns] has exactly the bits of rows of floats, all NaNs alike."""
    expected = bits.encode(np.array(rows, dtype=np.float32), DTYPES[dtype])
    return np.array_equal(canonical(got), expected)


@each_dtype
@pytest.mark.parametrize("columns", [1, 7, 16, 17, 63, 64, 65, 80, 130, 576])
@pytest.mark.parametrize("weight", ["none", "same", "wide"])
def test_rows_against_scalars(ops, dtype, columns, weight):
    rms, add, layer = ops
    table, eps = random_table(), 1e-5
    x, residual = normal((2, columns), dtype, 4), normal((2, columns), dtype, 5, 3.0)
    w = weights(weight, columns, dtype)
    b = None if w is None else normal(columns, w.dtype, 6)
    assert same(rms(x, w, table, eps), [scalar_norm("rms", row, table, eps, w)[0] for row in x], dtype)
    y, total = add(x, residual, w, table, eps)
    pairs = [scalar_norm("rms", a, table, eps, w, None, r) for a, r in zip(x, residual, strict=True)]
    assert same(y, [row for row, _ in pairs], dtype)
    assert same(total, [added for _, added in pairs], dtype)
    assert same(
        layer(x, w, b, table, eps), [scalar_norm("layer", row, table, eps, w, b)[0] for row in x], dtype
    )


def every_exponent():
    """fp32 numbers of every exponent, around every border of the rounding and of [1, 4)."""
    words = [
        e << 23 | m for e in range(256) for m in (0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FEFFF, 0x7FF000)
    ]
    words += [e << 23 | 0x7FFFFF for e in range(255)]
    words += np.random.default_rng(1).integers(0, 0x7F800000, 20000).tolist()
    return np.array(words, dtype=np.uint32).view(np.float32)


def test_rsqrt_of_every_exponent():
    """The reference against scalars; the kernel has the same function, reached below through rows of one."""
    v, table = every_exponent(), random_table()
    got = norm.rsqrt(torch.from_numpy(v), table).numpy()
    entries = table.tolist()
    expected = np.array([scalar_rsqrt(float(a), entries) for a in v], dtype=np.float32)
    assert np.array_equal(got, expected, equal_nan=True)


def test_rsqrt_of_what_is_no_positive_number():
    v = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -1.0])
    got = norm.rsqrt(v, random_table()).tolist()
    assert got[:3] == [math.inf, math.inf, 0.0] and all(map(math.isnan, got[3:]))


@each_dtype
def test_every_mean_square_reaches_the_kernel(ops, dtype):
    """Rows of one column, whose mean square is its square: all 65,536 patterns, eps 0 and 1e-6."""
    x = torch.from_numpy(bits.PATTERNS.view(np.int16)).view(dtype)[:, None].contiguous()
    table = random_table()
    entries = table.tolist()
    for eps in (0.0, 1e-6):
        rows = []
        for a in x[:, 0].tolist():
            r = scalar_rsqrt(f32(f32(a * a) + f32(eps)), entries)
            rows.append([f32(a * r)])
        assert same(ops[0](x, None, table, eps), rows, dtype)


@pytest.mark.parametrize("spec", ["exact", "nli-4", "nli-32"])
@pytest.mark.parametrize("power", range(-8, 9, 2))
def test_error_from_tiny_to_huge_mean_squares(spec, power):
    """Relative error from mean square 1e-8 to 1e8: table and rounding of v (2^-11 each) and bf16's own."""
    library.load()
    x = normal((8, 576), torch.bfloat16, power + 20, 10 ** (power / 2))
    y = norm.rms_norm(x, None, luts.lut_table("rsqrt", spec, torch.float16), 1e-12).double()
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-12).sqrt()
    assert ((y / exact - 1).abs().nan_to_num()).max() < 2**-8 + 2**-10


@each_dtype
def test_odd_rows(ops, dtype):
    """Zeros, an infinity, a NaN: like the exact norm, and the rows beside them do not notice."""
    rms, add, layer = ops
    table = luts.lut_table("rsqrt", "nli-4", torch.float16)
    x = normal((5, 100), dtype)
    clean = rms(x, None, table, 1e-6)[4]
    x[0] = 0
    x[1, 7] = torch.inf
    x[2, 99] = torch.nan
    x[3] = -0.0
    for y in (rms(x, None, table, 1e-6), add(x, torch.zeros_like(x), None, table, 1e-6)[0]):
        assert (y[0] == 0).all() and (y[3] == 0).all()
        assert y[1, 7].isnan() and (y[1, :7] == 0).all() and y[2].isnan().all()
        assert torch.equal(y[4], clean)
    y = layer(x, None, None, table, 1e-6)
    assert (y[0] == 0).all() and y[1].isnan().all() and y[2].isnan().all() and y[4].isfinite().all()


@each_dtype
def test_strides(ops, dtype):
    rms, add, layer = ops
    table, wide = random_table(), normal((6, 5, 160), dtype)
    views = {
        "rows of a wider tensor": wide[0, :, 10:90],
        "every second row": wide[:, 1, :][::2],
        "heads inside tokens": wide[:, 1:4, 8:72],
        "uniform rows": wide[:, :, 7:107],
        "swapped leading dimensions": wide.transpose(0, 1),
        "three uneven leading dimensions": wide.view(2, 3, 5, 160)[:, :2, :4, :30],
        "strided last dimension": wide[:, :, ::2],
        "transposed": wide[0].T,
        "broadcast rows": wide[0, :1].expand(4, 160),
        "one row": wide[0, 0],
        "one column": wide[:, :, :1],
        "no rows": wide[:0],
    }
    for name, x in views.items():
        w, dense = normal(x.shape[-1], dtype, 9), x.contiguous()
        r = torch.ones_like(x.flip(0))  # strides that are not x's
        expected = norm._reference(dense, w, table, 1e-5)
        got = rms(x, w, table, 1e-5)
        assert got.is_contiguous() and got.shape == x.shape and torch.equal(got, expected), name
        for a, b in zip(
            add(x, r, w, table, 1e-5),
            norm._add_reference(dense, r.contiguous(), w, table, 1e-5),
            strict=True,
        ):
            assert a.is_contiguous() and torch.equal(a, b), name
        got = layer(x, w, w, table, 1e-5)
        assert got.is_contiguous() and torch.equal(got, norm._layer_reference(dense, w, w, table, 1e-5)), name


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_scaling_by_four_only_moves_the_exponent(columns, seed):
    """With eps 0, norm(2 x) = norm(x): the range reduction has no seam."""
    library.load()
    x = normal((1, columns), torch.float32, seed).bfloat16()
    table = luts.lut_table("rsqrt", "nli-2", torch.float16)
    y = norm.rms_norm(x, None, table, 0.0)
    for power in (-20, -1, 1, 20):
        assert torch.equal(norm.rms_norm(x * 2.0**power, None, table, 0.0), y)


@each_dtype
def test_inputs_are_not_written(ops, dtype):
    x, r, table = normal((3, 70), dtype), normal((3, 70), dtype, 2), random_table()
    before = x.clone(), r.clone()
    ops[0](x, None, table, 1e-5), ops[1](x, r, None, table, 1e-5), ops[2](x, None, None, table, 1e-5)
    assert torch.equal(x, before[0]) and torch.equal(r, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, "float16 or bfloat16"),
        ({"x": torch.zeros(()).half()}, "columns"),
        ({"x": torch.zeros(2, 0).half()}, "columns"),
        ({"table": torch.zeros(65536).bfloat16()}, "float16"),
        ({"table": torch.zeros(256).half()}, "65536"),
        ({"table": torch.zeros(131072).half()[::2]}, "contiguous"),
        ({"weight": torch.ones(5).half()}, "weight"),
        ({"weight": torch.ones(4).bfloat16()}, "weight"),
        ({"weight": torch.ones(8).half()[::2]}, "weight"),
    ],
)
def test_wrong_arguments(ops, change, message):
    rms, add, layer = ops
    given = {"x": torch.zeros(2, 4).half(), "weight": torch.ones(4).half(), "table": random_table()} | change
    x, w, table = given["x"], given["weight"], given["table"]
    for call in (
        lambda: rms(x, w, table, 1e-5),
        lambda: add(x, x, w, table, 1e-5),
        lambda: layer(x, w, None, table, 1e-5),
        lambda: layer(x, None, w, table, 1e-5) if "weight" in change else rms(x, w, table, 1e-5),
    ):
        with pytest.raises(RuntimeError, match=f"norm.*{message}"):
            call()


def test_wrong_residual(ops):
    x = torch.zeros(2, 4).half()
    for residual in (torch.zeros(4).half(), torch.zeros(4, 2).half(), torch.zeros(2, 4).bfloat16()):
        with pytest.raises(RuntimeError, match="residual"):
            ops[1](x, residual, None, random_table(), 1e-5)


@each_dtype
def test_opcheck(dtype):
    library.load()
    table, x, w = random_table(), normal((3, 2, 34), dtype), normal(34, dtype)
    torch.library.opcheck(norm.rms_norm, (x, w, table, 1e-5))
    torch.library.opcheck(norm.rms_norm, (x[:, :, ::2], None, table, 1e-5))
    torch.library.opcheck(norm.add_rms_norm, (x, x.clone(), w.float(), table, 1e-5))
    torch.library.opcheck(norm.layer_norm, (x, w, w.clone(), table, 1e-5))


def cases(dtype):
    """Results that must not depend on the level, as bit patterns."""
    table = random_table()
    for shape in ((3, 64), (5, 100), (40, 577), (2, 3, 33), (300, 128)):
        for x in (normal(shape, dtype), random_bits(shape, dtype)):
            w = normal(shape[-1], dtype, 2)
            yield norm.rms_norm(x, w, table, 1e-5)
            yield norm.rms_norm(x, w.float(), table, 1e-5)
            yield from norm.add_rms_norm(x, x.flip(0), w, table, 1e-5)
            yield norm.layer_norm(x, w, w.flip(0), table, 1e-5)


def digests():
    result = {}
    for dtype, name in DTYPES.items():
        digest = hashlib.sha256()
        for y in cases(dtype):
            digest.update(canonical(y).astype(np.uint16).tobytes())
        result[name] = digest.hexdigest()
    return result


@pytest.fixture(scope="module")
def reference_digests():
    return _run({"LUTSERVE_BACKEND": "reference"})


def _run(environment):
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_agrees_with_the_reference(level, reference_digests):
    served = _run({"LUTSERVE_ISA": level, "LUTSERVE_BACKEND": "cpu"})
    assert served.pop("backend") == f"cpu/{level}"
    assert served == {key: value for key, value in reference_digests.items() if key != "backend"}
    assert reference_digests["backend"] == "reference"


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("case", ["unit", "small", "large"])
def test_against_the_published_tables_without_range_reduction(shared, case, name):
    """The golden composition reads a whole-range table; ours must be at least as near to the exact norm."""
    library.load()
    golden = np.load(shared / "golden/fplut/rmsnorm_OURS_not_reference.npz")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    x, w, exact, lut = (
        torch.from_numpy(golden[f"{case}/{name}/{key}"].view(np.int16)).view(dtype)
        for key in ("x", "w", "y_exact", "y_lut")
    )
    true = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * w.double()

    def error(y):
        return (y.double() / true - 1).abs().nan_to_num()

    y = norm.rms_norm(x, w, luts.lut_table("rsqrt", "nli-32", torch.float16), 1e-6)
    assert error(y).max() <= 1.05 * error(lut).max() and error(y).mean() <= 1.05 * error(lut).mean()
    assert error(y).max() <= error(exact).max() + 2**-11 + 2**-12


if __name__ == "__main__":
    library.load()
    print(json.dumps({"backend": library.backend_for("lut_rms_norm"), **digests()}))
