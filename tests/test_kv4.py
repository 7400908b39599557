"""4-bit caches: codings, the layout of a page, and what `kv4_write` and `kv4_keep_tail` put where."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from attention_cases import half, single
from kv4_cases import COMPENSATION, fp4_code, number

from lutserve import formats, kv_formats
from lutserve.errors import UserError
from lutserve.kernels import kv4, kv4_attention, library
from lutserve.layers.kv_cache import Tensors
from lutserve.quantizers.weight import encode

H, B = torch.float16, torch.bfloat16
FP4 = {"e3m0": kv_formats.E3M0, "e2m1": kv_formats.E2M1, "e1m2": kv_formats.E1M2}
#: mantissa bits and exponent bias (AxCore's FP4, all codes finite)
SHAPES = {"e3m0": (0, 3), "e2m1": (1, 1), "e1m2": (2, 0)}


@pytest.fixture(params=["kernel", "reference"])
def implementation(request):
    library.load()
    if request.param == "reference":
        return kv4._write_reference, kv4._tail_reference
    return kv4.write, kv4.keep_tail


def all_halves():
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(H)


@pytest.mark.parametrize("name", FP4)
def test_fp4_rounds_like_the_published_formula(name):
    """For every fp16 number: exponent, significand to nearest even, clamped (exact mode of AxCore's RTN)."""
    mantissa, bias = SHAPES[name]
    coding = FP4[name]
    u = all_halves()
    u = u[u.isfinite()].double()
    clamped = u.clamp(-coding.divisor, coding.divisor)
    exponent = torch.where(clamped == 0, -99.0, clamped.abs().log2().floor()).clamp(min=1 - bias)
    step = torch.exp2(exponent - mantissa)
    want = (clamped.abs() / step).round() * step * clamped.sign()
    index = (u.float()[:, None] > torch.tensor(coding.bounds)).sum(1)
    assert torch.equal(torch.tensor(coding.values, dtype=torch.float64)[index] + 0.0, want + 0.0)
    codes = fp4_code(index.numpy())
    assert (codes[(u < 0).numpy()] >= 8).all() and (codes[(u >= 0).numpy()] < 8).all(), "sign of zeros"


@pytest.mark.parametrize("name", ["nf4", "sf4_5", "int4", "fp4_range", "apot4", "nf3", "int3", "denorm4"])
def test_formats_round_like_the_quantisers(name):
    u = all_halves()
    u = u[u.isfinite()].float()
    coding = kv_formats.get(name).keys
    index = (u[:, None] > torch.tensor(coding.bounds)).sum(1, dtype=torch.uint8)
    codebook = formats.get(name)
    assert torch.equal(index, encode(u, torch.ones(()), None, codebook))
    assert coding.values[: len(codebook.values)] == codebook.values and coding.divisor == codebook.divisor


def test_unknown_schemes_are_refused_in_one_line():
    for name in ("fp2", "int5", "axcor"):
        with pytest.raises(UserError, match=r"exact or axcore") as refused:
            kv_formats.check(name)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [H, B])
@pytest.mark.parametrize("name", ["e2m1", "e1m2"])
def test_mantissa_classes_give_the_published_products(name, dtype):
    """All 65,536 activations times 16 values; exact where activation and product are normal numbers."""
    coding = FP4[name]
    scheme = kv_formats.Scheme(coding, kv_formats.E3M0, True)
    tensors = Tensors.of(scheme, dtype)
    bits = torch.arange(65536, dtype=torch.int32)
    x = bits.to(torch.int16).view(dtype)
    found = kv4_attention.class_map(x, tensors.offsets).double() @ tensors.key_tables.double()
    one, top = (1024, 0x7C00) if dtype == H else (128, 0x7F80)
    magnitude = (bits & 0x7FFF)[:, None]
    fractions, exponents = np.frexp(np.abs(np.array(coding.values)))
    offset = torch.from_numpy((exponents - 1) * one + np.round((2 * fractions - 1) * one)).int()
    product = magnitude + offset + COMPENSATION[dtype][name]
    largest = (magnitude + tensors.offsets.max()) < top
    normal = (magnitude >= one) & (product >= one) & (product < top) & largest & (offset > -9 * one)
    decoded = torch.tensor([number(p, dtype) for p in range(top)], dtype=torch.float64)
    want = decoded[product.clamp(0, top - 1)] * torch.where(bits[:, None] < 0x8000, 1, -1)
    want = want * torch.tensor(coding.values).sign()
    assert torch.equal(found[normal], want[normal])
    assert normal.sum() > 0.8 * normal.numel() * 14 / 16
    zero = (magnitude == 0) | (torch.tensor(coding.values) == 0)
    assert (found[zero.expand(found.shape) & ~x.isnan()[:, None]] == 0).all()
    assert found[x.isnan()].isnan().all() and found[~x.isnan()].isfinite().all()
    # Too small for a normal number: never far from it.
    small = (magnitude > 0) & (product < one) & (offset > -9 * one)
    assert (found[small].abs() <= 2 * decoded[one]).all()


def test_golden_products(shared):
    coded = np.load(shared / "golden/axcore/products.npz")["e2m1_sc"]
    want = torch.from_numpy(np.cumsum(coded, axis=1, dtype=np.uint16).view(np.int16)).view(H)
    tensors = Tensors.of(kv_formats.get("axcore"), H)
    x = all_halves()
    usable = (x.abs() >= 2.0**-13) & (x.abs() <= 2.0**13)
    found = kv4_attention.class_map(x, tensors.offsets).double() @ tensors.key_tables.double()
    order = torch.from_numpy(fp4_code(np.arange(16)))
    assert torch.equal(found[usable].T, want[order][:, usable].double() + 0.0)


def unpack(cache, layout, kind):
    """Indices [blocks, heads, block size, head size] of keys (0) or values (1), by loops of its own."""
    blocks, heads, block_size = cache.shape[:3]
    flat = cache.flatten(2)
    out = torch.zeros(blocks, heads, block_size, layout.head_size, dtype=torch.uint8)
    for token in range(block_size):
        for d in range(layout.head_size):
            group, lane = divmod(token, 16)
            at = group * 8 * layout.head_size
            if kind == 0:
                at, odd = at + d // 2 * 16 + lane, d % 2
            else:
                at, odd = at + (block_size + lane // 2 * 2) * layout.head_size // 2, lane % 2
                at = group * 8 * layout.head_size + block_size * layout.head_size // 2
                at += lane // 2 * layout.head_size + d
            out[:, :, token, d] = (flat[:, :, at] >> 4 * odd) & 15
    return out


def scalar(x, coding):
    """Indices and scale of one group of numbers, in Python."""
    top = max(abs(w) for w in x)
    scale = half(single(top / coding.divisor))
    quotients = [half(single(w / scale)) if scale else 0.0 for w in x]
    return [sum(u > bound for bound in coding.bounds) for u in quotients], scale


@pytest.mark.parametrize("dtype", [H, B])
@pytest.mark.parametrize(("name", "size"), [("nf4", 16), ("int4", 80), ("e2m1", 128)])
def test_write_by_token(implementation, name, size, dtype):
    """Every index and scale where an independent statement of the layout wants it, nothing else changed."""
    write, _ = implementation
    scheme = kv_formats.get(name)
    layout = kv4.Layout(32, size, False)
    random = torch.Generator().manual_seed(1)
    key, value = (torch.randn(22, 2, size, generator=random).to(dtype) * 3 for _ in "kv")
    key[3] = 0  # an empty group
    key[4] *= 1e-6 if dtype == B else 0.0  # a scale below fp16
    slots = torch.randperm(3 * 32, generator=random)[:20]
    slots[5] = -1
    cache = torch.full((3, 2, 32, layout.bytes_per_token), 0x5A, dtype=torch.uint8)
    tensors = Tensors.of(scheme, dtype)
    write(key, value, cache, slots, tensors.bounds, scheme.keys.divisor, scheme.values.divisor, False)
    scales = cache.flatten(2)[..., 32 * size :].contiguous().view(torch.int16).unflatten(-1, (2, 2, -1, 16))
    touched = torch.zeros(3, 32, dtype=torch.bool)
    for kind, x in ((0, key), (1, value)):
        indices = unpack(cache, layout, kind)
        for token, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            block, offset = divmod(slot, 32)
            touched[block, offset] = True
            for head in range(2):
                for group, first in enumerate(range(0, size, 64)):
                    want, scale = scalar(x[token, head, first : first + 64].tolist(), scheme.keys)
                    assert indices[block, head, offset, first : first + 64].tolist() == want
                    held = scales[block, head, kind, offset // 16, group, offset % 16]
                    assert held == torch.tensor(scale).half().view(torch.int16)
        assert torch.isin(indices.movedim(1, 3)[~touched], torch.tensor([0x5, 0xA], dtype=torch.uint8)).all()
    assert (scales.movedim((3, 5), (1, 2)).flatten(1, 2)[~touched] == 0x5A5A).all()


@pytest.mark.parametrize("dtype", [H, B])
def test_write_by_unit(implementation, dtype):
    """However the tokens are brought, a unit is quantised once it is whole, and stays as it is until then."""
    write, keep = implementation
    scheme = kv_formats.get("axcore")
    tensors = Tensors.of(scheme, dtype)
    layout = kv4.Layout(192, 32, True)
    random = torch.Generator().manual_seed(2)
    key, value = (torch.randn(150, 2, 32, generator=random).to(dtype) for _ in "kv")
    slots = torch.arange(150) + 192
    for cuts in ((0, 150), (0, 40, 64, 100, 101, 150), (0, 63, 130, 150)):
        cache = torch.full((2, 2, 192, layout.bytes_per_token), 0xFF, dtype=torch.uint8)
        for first, last in pairwise(cuts):
            of = slice(first, last)
            arguments = (tensors.bounds, scheme.keys.divisor, scheme.values.divisor, True)
            write(key[of], value[of], cache, slots[of], *arguments)
            keep(value[of], cache, slots[of])
        indices = unpack(cache, layout, 1)[1]
        flat = cache.flatten(2)[1]
        scales = flat[:, layout.value_scales : layout.tail].contiguous().view(H).unflatten(-1, (3, 32))
        for head in range(2):
            for unit in range(2):
                for d in range(0, 32, 5):
                    want, scale = scalar(value[64 * unit : 64 * unit + 64, head, d].tolist(), scheme.values)
                    assert indices[head, 64 * unit : 64 * unit + 64, d].tolist() == want
                    assert scales[head, unit, d] == scale
        assert (indices[:, 128:] == 15).all() and scales[:, 2].isnan().all(), "not written yet"
        assert torch.equal(kv4.tail_of(flat, layout, dtype)[:, :22], value[128:].transpose(0, 1))


def test_golden_codes_and_scales(shared, implementation):
    """OPT: keys in E1M2 by token, values in E3M0 by 64 tokens, the last of them filled up with zeros."""
    write, _ = implementation
    golden = np.load(shared / "golden/axcore/kv.npz")
    key, value = (torch.from_numpy(golden[f"opt_{x}"]).transpose(0, 1).contiguous() for x in "kv")
    scheme = kv_formats.get("axcore", "opt")
    layout = kv4.Layout(128, 64, True)
    cache = torch.full((1, 2, 128, layout.bytes_per_token), 0xFF, dtype=torch.uint8)
    divisors = (scheme.keys.divisor, scheme.values.divisor)
    filled = torch.cat([value, torch.zeros(32, 2, 64, dtype=H)])
    keys = torch.cat([key, torch.zeros(32, 2, 64, dtype=H)])
    write(keys, filled, cache, torch.arange(128), Tensors.of(scheme, H).bounds, *divisors, True)
    flat = cache.flatten(2)[0]
    assert (fp4_code(unpack(cache, layout, 0)[0, :, :96].numpy()) == golden["opt_k_codes"]).all()
    assert (fp4_code(unpack(cache, layout, 1)[0, :, :96].numpy()) == golden["opt_v_codes"]).all()
    scales = flat[:, layout.key_scales : layout.value_scales].contiguous().view(torch.int16)
    assert (scales[:, :96].numpy() == golden["opt_k_scales"][..., 0].view(np.int16)).all()
    scales = flat[:, layout.value_scales : layout.tail].contiguous().view(torch.int16)
    assert (scales.numpy().reshape(2, 2, 64) == golden["opt_v_scales"].view(np.int16)).all()


def test_groups_that_are_not_finite(implementation):
    write, _ = implementation
    scheme = kv_formats.get("nf4")
    layout = kv4.Layout(16, 128, False)
    cache = torch.zeros(1, 1, 16, layout.bytes_per_token, dtype=torch.uint8)
    x = torch.ones(4, 1, 128, dtype=B)
    x[0, 0, 3], x[1, 0, 70], x[2, 0, 0], x[3] = math.nan, math.inf, -math.inf, 3e38
    write(x, x, cache, torch.arange(4), Tensors.of(scheme, B).bounds, 1.0, 1.0, False)
    scales = cache.flatten(2)[0, 0, 16 * 128 :].view(H).view(2, 2, 16)[:, :, :4]
    want = (
        torch.tensor([[math.nan, 1, math.nan, math.inf], [1, math.nan, 1, math.inf]]).half().expand(2, 2, 4)
    )
    assert torch.equal(scales.nan_to_num(7), want.nan_to_num(7)) and torch.equal(scales.isnan(), want.isnan())


@pytest.mark.parametrize(
    ("block", "size", "by_unit", "ratio"),
    [
        (128, 64, False, 3.76),
        (128, 128, False, 3.76),
        (128, 32, False, 3.55),
        (kv_formats.AXCORE_BLOCK, 64, True, 3.41),
        (kv_formats.AXCORE_BLOCK, 128, True, 3.41),
        (128, 64, True, 1.9),
    ],
)
def test_tokens_in_the_memory_of_one(block, size, by_unit, ratio):
    assert ratio <= 4 * size / kv4.Layout(block, size, by_unit).bytes_per_token < ratio + 0.1


def test_wrong_arguments(implementation):
    write, keep = implementation
    scheme = kv_formats.get("axcore")
    bounds = Tensors.of(scheme, B).bounds
    x = torch.zeros(3, 2, 32, dtype=B)
    plain = torch.zeros(2, 2, 16, kv4.Layout(16, 32, False).bytes_per_token, dtype=torch.uint8)
    units = torch.zeros(2, 2, 64, kv4.Layout(64, 32, True).bytes_per_token, dtype=torch.uint8)
    slots = torch.arange(3)
    write(x, x, plain, slots, bounds, 1.0, 1.0, False)
    write(x, x, units, slots, bounds, 1.0, 1.0, True)
    keep(x, units, slots)
    for arguments, message in (
        ((x.float(), x, plain, slots, bounds, 1.0, 1.0, False), "float16 or bfloat16"),
        ((x, x.half(), plain, slots, bounds, 1.0, 1.0, False), "one dtype"),
        ((x, x, plain.view(torch.int8), slots, bounds, 1.0, 1.0, False), "uint8"),
        ((x, x, plain, slots, bounds, 1.0, 1.0, True), "multiple of 64"),
        ((x, x, units, slots, bounds, 1.0, 1.0, False), "bytes a token"),
        ((x[:, :1], x[:, :1], plain, slots, bounds, 1.0, 1.0, False), "kv heads"),
        ((x[..., :24], x[..., :24], plain, slots, bounds, 1.0, 1.0, False), "multiple of 16 up to 256"),
        ((x, x, plain, torch.arange(4), bounds, 1.0, 1.0, False), "for each slot"),
        ((x, x, plain, slots.int(), bounds, 1.0, 1.0, False), "int64"),
        ((x, x, plain, slots + 30, bounds, 1.0, 1.0, False), "outside the cache"),
        ((x, x, plain, slots, bounds[:1], 1.0, 1.0, False), "bounds"),
    ):
        with pytest.raises(RuntimeError, match=f"kv4.*{message}"):
            write(*arguments)
    with pytest.raises(RuntimeError, match=r"kv4.*outside the cache"):
        keep(x, units, slots + 126)
