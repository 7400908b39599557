"""`lutserve::act_and_mul`: the C++ kernel at every instruction-set level and the torch reference, bit by bit.

Run as a script this file prints the digests of all cases, so that each level gets a process of its own.
"""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lutserve import luts
from lutserve.kernels import activation, isa, library
from lutserve.luts import bits

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
# As bit patterns these are zeros, ones, subnormals, the largest numbers, infinities and NaNs of both dtypes.
SPECIAL_UPS = (0x0000, 0x8000, 0x0001, 0x03FF, 0x0080, 0x3C00, 0x3F80, 0xBF80, 0x7BFF, 0x7F7F, 0x7C00, 0xFF80)
SHAPES = (
    (1, 2),
    (3, 6),
    (2, 62),
    (5, 64),
    (3, 66),
    (4, 200),
    (0, 8),
    (4, 0),
    (2, 3, 100),
    (1, 2, 2, 34),
    (62,),
)


def random_table(dtype):
    """Every bit pattern once, in a random order, so that every table value meets every up."""
    order = torch.from_numpy(np.random.default_rng(7).permutation(65536).astype(np.uint16).view(np.int16))
    return order.view(dtype)


def every_gate(dtype):
    """All 65,536 gates against 24 ups: [24, 131072]."""
    random = np.random.default_rng(8).integers(0, 65536, 24 - len(SPECIAL_UPS), dtype=np.uint16)
    ups = np.concatenate([np.array(SPECIAL_UPS, dtype=np.uint16), random])
    x = np.stack([np.concatenate([bits.PATTERNS, np.full(65536, up, dtype=np.uint16)]) for up in ups])
    return torch.from_numpy(x.view(np.int16)).view(dtype)


def random_bits(shape, dtype, seed=9):
    """Uniformly random bit patterns: NaNs, infinities and subnormals among them."""
    values = np.random.default_rng(seed).integers(0, 65536, shape, dtype=np.uint16)
    return torch.from_numpy(values.view(np.int16)).view(dtype)


def oracle(x, table):
    """numpy: fp32 product of the two exact values, rounded to nearest even by `bits.encode`."""
    fmt = DTYPES[x.dtype]
    patterns = x.contiguous().view(torch.int16).numpy().view(np.uint16)
    gate, up = np.split(patterns, 2, axis=-1)
    entry = table.view(torch.int16).numpy().view(np.uint16)[gate]
    with np.errstate(all="ignore"):
        return bits.encode(bits.decode(entry, fmt) * bits.decode(up, fmt), fmt)


def canonical(y):
    """Bit patterns of a result with one NaN, to be compared with the oracle's."""
    patterns = y.contiguous().view(torch.int16).numpy().view(np.uint16)
    return np.where(y.isnan().numpy(), 0x7E00 if y.dtype == torch.float16 else 0x7FC0, patterns)


def cases(dtype):
    """All inputs whose results are compared between levels."""
    yield every_gate(dtype)
    for shape in SHAPES:
        yield random_bits(shape, dtype)
    yield random_bits((64, 4098), dtype)  # several threads, and a tail


def digests(function):
    """One sha256 a dtype over the results of all cases."""
    result = {}
    for dtype, name in DTYPES.items():
        digest = hashlib.sha256()
        for x in cases(dtype):
            digest.update(function(x, random_table(dtype)).astype(np.uint16).tobytes())
        result[name] = digest.hexdigest()
    return result


@pytest.fixture(params=["kernel", "reference"])
def act_and_mul(request):
    """The operator as it is served (C++ where it can be compiled), and its plain-torch reference."""
    if request.param == "reference":
        return activation._reference
    library.load()
    return activation.act_and_mul


each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@each_dtype
def test_every_gate(act_and_mul, dtype):
    x, table = every_gate(dtype), random_table(dtype)
    assert np.array_equal(canonical(act_and_mul(x, table)), oracle(x, table))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(act_and_mul, dtype, shape):
    x, table = random_bits(shape, dtype), random_table(dtype)
    y = act_and_mul(x, table)
    assert y.shape == (*shape[:-1], shape[-1] // 2) and y.dtype == dtype and y.is_contiguous()
    assert np.array_equal(canonical(y), oracle(x, table))


@each_dtype
def test_every_tail(act_and_mul, dtype):
    """Widths around the 16 lanes and the 1,024 columns that one step of the loop does."""
    table = random_table(dtype)
    for d in (*range(1, 50), 1023, 1024, 1025, 1040, 2047, 2049):
        x = random_bits((3, 2 * d), dtype, seed=d)
        assert np.array_equal(canonical(act_and_mul(x, table)), oracle(x, table)), d


@pytest.fixture(params=["kernel", "reference"])
def unary(request):
    """`lut_unary` as it is served, and its reference."""
    if request.param == "reference":
        return activation._unary_reference
    library.load()
    return activation.unary


def patterns_of(y):
    """Bit patterns of a tensor; a gather keeps even the payloads of NaNs."""
    return y.contiguous().view(torch.int16).numpy().view(np.uint16)


@each_dtype
def test_unary_is_a_gather(unary, dtype):
    """Every pattern, odd lengths, strides and empty tensors: the table's own bits come out."""
    table, wide = random_table(dtype), random_bits((6, 5, 160), dtype)
    entries = patterns_of(table)
    every = torch.from_numpy(bits.PATTERNS.view(np.int16)).view(dtype)
    views = [
        every,
        every.view(256, 256).T,
        wide,
        wide[:, 1:4, :100],
        wide[:, :, ::2],
        wide[0, :1].expand(4, 160),
    ]
    views += [wide[0, 0, 0], wide[:0], *(wide[0, 0, :n] for n in (1, 15, 16, 17, 33))]
    for x in (*views, random_bits((64, 4098), dtype)):
        y = unary(x, table)
        assert y.shape == x.shape and y.dtype == dtype and y.is_contiguous()
        assert np.array_equal(patterns_of(y), entries[patterns_of(x)])


def test_unary_refuses(unary):
    for x, table, message in (
        (torch.zeros(4), torch.zeros(65536), "float16 or bfloat16"),
        (torch.zeros(4).half(), torch.zeros(65536).bfloat16(), "x's dtype"),
        (torch.zeros(4).half(), torch.zeros(256).half(), "65536"),
        (torch.zeros(4).half(), torch.zeros(131072).half()[::2], "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=f"lut_unary.*{message}"):
            unary(x, table)


@each_dtype
def test_strides(act_and_mul, dtype):
    table, wide = random_table(dtype), random_bits((6, 5, 160), dtype)
    views = {
        "rows of a wider tensor": wide[0, :, 10:90],
        "every second row": wide[:, 1, :][::2],
        "three dimensions, uniform rows": wide[:, :, 7:107],
        "three dimensions, uneven rows": wide[:, 1:4, :100],
        "swapped leading dimensions": wide.transpose(0, 1),
        "strided last dimension": wide[:, :, ::2],
        "transposed": wide[0].T[:100],
        "broadcast rows": wide[0, :1].expand(4, 160),
        "broadcast inner rows": wide[:, :1].expand(6, 4, 160),
        "broadcast outer rows": wide[:1].expand(3, 5, 160),
    }
    for name, x in views.items():
        x = x if x.shape[-1] % 2 == 0 else x[..., :-1]
        assert np.array_equal(canonical(act_and_mul(x, table)), oracle(x, table)), name


@each_dtype
def test_input_is_not_written(act_and_mul, dtype):
    x, table = random_bits((3, 70), dtype), random_table(dtype)
    before = x.clone()
    act_and_mul(x, table)
    assert torch.equal(x.view(torch.int16), before.view(torch.int16))


@each_dtype
def test_threads_do_not_change_the_result(act_and_mul, dtype):
    x, table = random_bits((33, 3000), dtype), random_table(dtype)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert np.array_equal(canonical(act_and_mul(x, table)), oracle(x, table)), count
    finally:
        torch.set_num_threads(threads)


@each_dtype
def test_silu_table(act_and_mul, dtype):
    """With the exact table the result is the gated activation, within one rounding of each factor."""
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    y = act_and_mul(x, luts.lut_table("silu", "exact", dtype)).double()
    assert torch.allclose(y, expected, rtol=1.1 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "table", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(65536), "float16 or bfloat16"),
        (torch.zeros(2, 5).half(), torch.zeros(65536).half(), "even"),
        (torch.zeros(()).half(), torch.zeros(65536).half(), "even"),
        (torch.zeros(2, 4).half(), torch.zeros(65536).bfloat16(), "x's dtype"),
        (torch.zeros(2, 4).half(), torch.zeros(256).half(), "65536"),
        (torch.zeros(2, 4).half(), torch.zeros(256, 256).half(), "65536"),
        (torch.zeros(2, 4).half(), torch.zeros(131072).half()[::2], "contiguous"),
    ],
)
def test_wrong_arguments(act_and_mul, x, table, message):
    with pytest.raises(RuntimeError, match=f"act_and_mul.*{message}"):
        act_and_mul(x, table)
    with pytest.raises(RuntimeError, match=f"act_and_mul.*{message}"):
        activation.act_and_mul(
            *(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (x, table))
        )


@each_dtype
def test_opcheck(dtype):
    library.load()
    table = luts.lut_table("silu", "nli-4", dtype)
    for x in (torch.randn(3, 8), torch.randn(2, 3, 34), torch.randn(4, 20)[:, 3:13]):
        torch.library.opcheck(activation.act_and_mul, (x.to(dtype), table))
        torch.library.opcheck(activation.unary, (x.to(dtype), table))


@each_dtype
def test_compiled_whole(dtype):
    def layer(x, table):
        return activation.act_and_mul(x + 1, table) * 2

    library.load()
    table = luts.lut_table("silu", "nli-4", dtype)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 5, 17):
        x = torch.randn(rows, 66).to(dtype)
        assert torch.equal(compiled(x, table), layer(x, table))


def test_reference_is_an_operator_too():
    """Where no kernel is loaded the dispatcher takes the reference, in eager mode and compiled."""
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "opcheck or compiled or backend_named"]
    environment = {**os.environ, "LUTSERVE_BACKEND": "reference"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_backend_named():
    """In the process that the test above starts this is the reference."""
    pinned = os.environ.get("LUTSERVE_BACKEND") == "reference"
    assert (library.backend_for("act_and_mul") == "reference") == (pinned or library.load() == "reference")


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
    return digests(oracle)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_agrees(level, expected_digests):
    environment = {**os.environ, "LUTSERVE_ISA": level, "LUTSERVE_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"backend": f"cpu/{level}", **expected_digests}


if __name__ == "__main__":
    library.load()
    served = digests(lambda x, table: canonical(activation.act_and_mul(x, table)))
    print(json.dumps({"backend": library.backend_for("act_and_mul"), **served}))
