from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutserve import formats
from lutserve.errors import UserError
from lutserve.formats import Codebook, quantile

# First sixteen hexadecimal digits of the sha256 of values and midpoints (little-endian float32), made from
# the lists published with arXiv 2405.03103.
DIGESTS = {
    "nf4": "f03ba86ccaeca883",
    "nf3": "263572916188205a",
    "nf3_nz": "f782eec23f2b95b5",
    "sf4_3": "33c33f9073d8ef88",
    "sf3_3": "471922a396eee49c",
    "sf3_3_nz": "c3f6318d874129fe",
    "sf4_4": "2e6a0f232a2d2925",
    "sf3_4": "8e97d7b9f9b35034",
    "sf3_4_nz": "aa09477cf43dc970",
    "sf4_5": "72c428705ea26fd4",
    "sf3_5": "e5e82e8636a4d0a9",
    "sf3_5_nz": "9b2ef7a52715a643",
    "sf4_6": "ef26a15b3dd3908b",
    "sf3_6": "b935cacf6dd9237f",
    "sf3_6_nz": "56d90fea6841fe93",
    "sf4_7": "2ad6ce9934ca93ff",
    "fp4": "a26d35104e53401a",
    "fp4_e2m1_bnb": "a26d35104e53401a",
    "fp4_e1m2": "baa575edc1617ec2",
    "fp4_e2m1": "98b5d0b332a1bb9f",
    "fp4_basic": "a3bae03e923066c7",
    "fp4_no_sub": "7e50b4eeaa695119",
    "fp4_range": "e1ae77d5cc86cc89",
    "fp4_prec1": "4d6ea83bed0d5d77",
    "fp4_prec2": "9a28e653a8c7b95e",
    "fp4_log": "044f769296e772ad",
    "fp3_log": "9b8da46d4d07d89e",
    "en_25": "d68673da95d7dde0",
    "apot4": "ed0f4257761dc145",
    "apot4-sp": "aaeecf4e79a7f4d1",
    "mokey": "89421ddc3abfa650",
    "denorm4": "ced3e1f9ca813c88",
}

EXACT_IN_INT8 = {
    "fp4_basic": 2,
    "fp4_no_sub": 4,
    "fp4_e2m1": 16,
    "fp4_range": 2,
    "fp4_prec1": 2,
    "fp4_prec2": 2,
    "fp4_e1m2": 4,
    "fp4_log": 4,
    "fp3_log": 1,
    "apot4": 10,
    "apot4-sp": 10,
    "mokey": 1,
    "denorm4": 2,
    "int2": 1,
    "int3": 1,
    "int4": 1,
}
SMALL = [name for name in formats.NAMES if name not in ("int5", "int6", "int7", "int8")]


def f32(x: float) -> float:
    return struct.unpack("<f", struct.pack("<f", x))[0]


def digest(codebook: Codebook) -> str:
    numbers = [*codebook.values, *codebook.midpoints]
    return hashlib.sha256(struct.pack(f"<{len(numbers)}f", *numbers)).hexdigest()[:16]


# --- the values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIGESTS)
def test_published_values(name):
    assert digest(formats.get(name)) == DIGESTS[name]


def test_every_catalogue_entry_has_a_digest():
    assert set(DIGESTS) == set(formats.catalogue.CATALOGUE)


def test_golden_values(shared):
    golden = json.loads((shared / "golden/datatypes/datatypes.json").read_text())
    assert len(golden) >= 32
    for name, expected in golden.items():
        codebook = formats.get(name)
        assert codebook.name == name
        assert list(codebook.values) == expected["values"]
        assert [struct.pack(">f", v).hex() for v in codebook.values] == expected["values_f32_hex"]
        assert list(codebook.midpoints) == expected["midpoints_f32"]
        assert (codebook.divisor, codebook.gptq_divisor) == (
            expected["rtn_divisor"],
            expected["gptq_divisor"],
        )


def test_golden_generated_values(shared):
    golden = json.loads((shared / "golden/datatypes/sf_generated.json").read_text())
    for name, expected in golden.items():
        bits, _, rest = name.removeprefix("sf").partition("_")
        nu, _, delta = rest.partition("(")
        if not name.startswith("sf"):
            continue
        mass = quantile.DELTA3 if delta == "delta3)" else quantile.DELTA4
        negative, positive = (7, 8) if bits == "4" else (3, 4)
        assert quantile.with_zero(float(nu), mass, negative, positive) == pytest.approx(expected, abs=1e-14)


def bisected(nu, p):
    """Quantile of Student's t (nu) or the normal distribution (None) from its distribution function."""
    stats = pytest.importorskip("scipy.stats")
    below = stats.norm.cdf if nu is None else stats.t(nu).cdf
    low, high = -1e3, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < p else (low, middle)
    return low


@pytest.mark.parametrize(
    ("name", "nu", "error"),
    [
        *((f"sf4_{v}", v, 5.1e-7) for v in (3, 4, 5, 6)),  # published with six decimals
        ("sf4_7", 7, 7e-11),
        ("nf4", None, 2e-7),
        ("nf3", None, 1e-9),
        *((f"sf3_{v}", v, 1e-9) for v in (3, 4, 5, 6)),
        ("nf3_nz", None, 2e-10),
        *((f"sf3_{v}_nz", v, 1e-9) for v in (3, 4, 5, 6)),
    ],
)
def test_quantile_lists_follow_their_rule(name, nu, error):
    count = len(formats.get(name).values)
    if name.endswith("_nz"):
        delta = (1 / 16 + 1 / 14) / 2
        ps = [delta + i * (1 - 2 * delta) / 7 for i in range(8)]
        raw = [bisected(nu, p) for p in ps]
    else:
        # The published three-bit t lists use the four-bit mass.
        delta = (1 / 16 + 1 / 14) / 2 if name == "nf3" else (1 / 32 + 1 / 30) / 2
        half = count // 2
        low = [delta + i * (0.5 - delta) / (half - 1) for i in range(half - 1)]
        high = [0.5 + i * (0.5 - delta) / half for i in range(1, half + 1)]
        raw = [*(bisected(nu, p) for p in low), 0.0, *(bisected(nu, p) for p in high)]
    largest = max(abs(v) for v in raw)
    assert formats.get(name).values == pytest.approx([v / largest for v in raw], abs=error)


@given(st.floats(0.1, 1e4))
def test_student_lists_of_any_order(nu):
    for bits, zero in ((4, 7), (3, 3)):
        codebook = formats.get(f"sf{bits}_{nu:.4f}")
        assert len(codebook.values) == 2**bits
        assert (codebook.values[0], codebook.values[zero], codebook.values[-1]) == (-1, 0, 1)
        assert codebook.zero == zero and codebook.bits == bits
    symmetric = formats.get(f"sf3_{nu:.4f}_nz").values
    assert symmetric == tuple(-v for v in reversed(symmetric)) and 0 not in symmetric


def test_heavier_tails_draw_values_inwards():
    lists = [formats.get(name).values for name in ("sf4_2", "sf4_2.5", "sf4_5", "sf4_20", "nf4")]
    for narrow, wide in itertools.pairwise(lists):
        assert all(abs(a) < abs(b) for a, b in zip(narrow[1:7], wide[1:7], strict=True))


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("SF4_5", "sf4_5"),
        ("sf4", "sf4_5"),
        ("sf4_5.0", "sf4_5"),
        ("E2M1", "fp4_basic"),
        ("e2m1-i", "fp4_e2m1"),
        ("e2m1-sr", "fp4_range"),
        ("e2m1-sp", "fp4_prec2"),
        ("e3m0", "fp4_log"),
        ("apot4_sp", "apot4-sp"),
        ("sf3_6.00_nz", "sf3_6_nz"),
    ],
)
def test_other_names(name, known):
    assert formats.get(name) is formats.get(known)
    assert formats.get(name).name == known


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nf5", "unknown format 'nf5'; did you mean nf4"),
        ("sf4_x", "unknown format 'sf4_x'"),
        ("sf4_5_nz", "unknown format 'sf4_5_nz'"),
        ("sf4_0", "allowed: 0.1 to 1000000"),
        ("int9", "unknown format 'int9'"),
        ("no/such.json", "cannot read codebook no/such.json"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        formats.get(name)


def test_integers():
    for bits in range(2, 9):
        codebook = formats.get(f"int{bits}")
        assert codebook.integer and codebook.values == tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
        assert codebook.divisor == 2 ** (bits - 1) - 1
        assert codebook.gptq_divisor == (2**bits - 1) / 2
        assert codebook.values[codebook.zero] == 0


def test_formats_need_no_torch():
    code = "import sys, lutserve; lutserve.formats.get('sf4_2.5'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


# --- codebooks ----------------------------------------------------------------------------------------------


def test_a_codebook_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        formats.get("nf4").values = ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.0,), "has 1 values; allowed: 2 to 16"),
        (tuple(range(1, 18)), "has 17 values"),
        ((0.0, 0.0, 1.0), "must increase"),
        ((1.0, 1.0 + 1e-9), "must increase"),
        ((0.0, 1e39), "not finite"),
        ((float("nan"), 1.0), "not finite"),
        ((-2.0, -1.0), "must be positive"),
    ],
)
def test_what_is_no_codebook(values, message):
    with pytest.raises(UserError, match=message):
        Codebook("mine", values)


@given(st.sets(st.floats(-100, 100, width=32), min_size=2, max_size=16))
def test_midpoints_lie_between(values):
    values = sorted(values)
    if values[-1] <= 0:
        values[-1] = 1.0
    codebook = Codebook("mine", tuple(values))
    for low, high, middle in zip(values, values[1:], codebook.midpoints, strict=False):
        assert low <= middle <= high
        assert middle == f32((low + high) / 2)
    nearest = min(abs(v) for v in values)
    assert abs(codebook.values[codebook.zero]) <= nearest + 1e-5 * max(abs(v) for v in values)


def test_divisors_differ_where_the_largest_magnitude_is_negative():
    assert (formats.get("denorm4").divisor, formats.get("denorm4").gptq_divisor) == (6, 7)


@pytest.mark.parametrize("name", SMALL)
def test_int8_table(name):
    codebook, image = formats.get(name), formats.get(name).int8_table()
    assert len(image.values) == len(codebook.table) == 16
    assert all(isinstance(v, int) and -127 <= v <= 127 for v in image.values)
    assert image.exact == (name in EXACT_IN_INT8)
    largest = max(abs(v) for v in codebook.values)
    for value, stored in zip(codebook.table, image.values, strict=True):
        if image.exact:
            assert stored == pytest.approx(value * EXACT_IN_INT8[name], abs=1e-9)
            assert f32(stored * image.scale) == pytest.approx(value, rel=1e-7)
        else:
            assert abs(stored * image.scale - value) <= largest / 254 * (1 + 1e-9)
    if not image.exact:
        assert max(abs(v) for v in image.values) == 127


def test_int8_table_finds_any_unit():
    image = Codebook("mine", (-0.9, -0.3, 0.0, 0.6)).int8_table()
    assert image.exact and image.values[:4] == (-3, -1, 0, 2) and set(image.values[4:]) == {2}
    assert image.scale == pytest.approx(0.3)


def test_a_long_list_is_no_table():
    with pytest.raises(UserError, match="int8 has 256 values"):
        formats.get("int8").int8_table()


# --- learned codebooks --------------------------------------------------------------------------------------


def test_learned_codebook(tmp_path):
    file = tmp_path / "learned.json"
    file.write_text(json.dumps({"values": [1, -0.5, 0, 0.25]}))
    codebook = formats.get(str(file))
    assert codebook == Codebook("learned", (-0.5, 0.0, 0.25, 1.0), 2, "", "learned.json")
    file.write_text(json.dumps({"values": [1, -1], "name": "sign", "bits": 1, "source": "k-means"}))
    assert formats.load(file) == Codebook("sign", (-1.0, 1.0), 1, "", "k-means")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[1, 2]", 'must hold an object with "values"'),
        ('{"values": [0, "a"]}', "values must be numbers"),
        ('{"values": [0, true]}', "values must be numbers"),
        ('{"values": [0, 1], "size": 3}', "unknown key 'size'"),
        ('{"values": [0, 1], "bits": "4"}', "bits must be a int"),
        ('{"values": [0, 1], "bits": 5}', "allowed: 1 to 4"),
        ('{"values": [0, 1, 2], "bits": 1}', "has 3 values; allowed: 2 to 2"),
        ('{"values": [1, 1]}', "must increase"),
        ('{"values": []}', "has 0 values"),
    ],
)
def test_broken_files(tmp_path, text, message):
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        formats.load(file)


# --- lutserve formats ---------------------------------------------------------------------------------------


def lutserve(*args):
    command = [sys.executable, "-m", "lutserve.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_command_prints_one_format():
    done = lutserve("formats", "e2m1-sp")
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["15", "6", "1.000000", "inf", "12"] in rows
    assert ["7", "0", "0.000000", "0.25", "0"] in rows
    assert "int8 table exact, times 0.5" in done.stdout


def test_command_answers_in_json():
    done = lutserve("formats", "sf4_5", "--json")
    row = json.loads(done.stdout)
    assert tuple(row["values"]) == formats.get("sf4_5").values
    assert row["divisor"] == 1 and row["zero"] == 7 and row["int8"]["exact"] is False
    # The published headlines for groups of 128, to the digit.
    expected = {"normal": 19.54, "t5": 18.89, "t3": 17.60, "relu_t5": 20.17}
    assert row["sqnr_db"] == pytest.approx(expected, abs=0.005)


def test_command_refuses_in_one_line():
    done = lutserve("formats", "nf9")
    assert done.returncode == 2 and done.stderr.startswith("lutserve: error: unknown format 'nf9'")
    assert done.stderr.count("\n") == 1
