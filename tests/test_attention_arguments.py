"""The attention operators as operators: the cache's layout, strides, wrong arguments, torch's own checks."""

import numpy as np
import pytest
import torch
from attention_cases import DTYPES, batch

from lutserve import luts
from lutserve.kernels import attention, library

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(params=["kernel", "reference"])
def implementation(request):
    """The operator as it is served (C++ where it can be compiled), and its plain-torch reference."""
    library.load()
    return attention._reference if request.param == "reference" else attention.lut_attention


@pytest.fixture(params=["kernel", "reference"])
def write(request):
    library.load()
    return attention._write_reference if request.param == "reference" else attention.cache_write


@each_dtype
@pytest.mark.parametrize(("block_size", "size"), [(16, 16), (32, 80), (128, 64)])
def test_cache_write(write, dtype, block_size, size):
    """Every element where an independent statement of the layout wants it, and nothing else changed."""
    blocks, heads = 3, 2
    random = np.random.default_rng(0)
    tokens = block_size + 7
    key, value = (
        torch.from_numpy(random.integers(0, 65536, (tokens + 2, heads, size), dtype=np.uint16).view(np.int16))
        for _ in "kv"
    )
    slots = torch.from_numpy(random.permutation(blocks * block_size)[:tokens])
    slots[5] = -1
    cache = torch.full((blocks, heads, block_size, 2 * size), 0x5555, dtype=torch.int16)
    write(key.view(dtype), value.view(dtype), cache.view(dtype), slots)
    flat = cache.view(blocks, heads, 2, -1)
    untouched = torch.ones_like(flat, dtype=torch.bool)
    pair = 1 if dtype == torch.float16 else 2
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, block_size)
        group, lane = divmod(offset, 16)
        for d in range(size):
            k = group * 16 * size + d // pair * 16 * pair + lane * pair + d % pair
            v = group * 16 * size + lane // pair * size * pair + d * pair + lane % pair
            for half, place, x in ((0, k, key), (1, v, value)):
                assert (flat[block, :, half, place] == x[token, :, d]).all()
                untouched[block, :, half, place] = False
    assert (flat[untouched] == 0x5555).all()


@each_dtype
def test_cache_write_with_strides(write, dtype):
    """Key and value are slices of the fused projection's result; the cache may be part of a larger page."""
    fused = torch.randn(20, 3, 2, 32).to(dtype)
    page = torch.zeros(4, 5000, dtype=dtype)
    cache = page[:, : 2 * 16 * 64].view(4, 2, 16, 64)
    slots = torch.randperm(64)[:20]
    write(fused[:, 1], fused[:, 2], cache, slots)
    plain = torch.zeros(4, 2, 16, 64, dtype=dtype)
    write(fused[:, 1].contiguous(), fused[:, 2].contiguous(), plain, slots)
    assert torch.equal(cache, plain) and (page[:, 2 * 16 * 64 :] == 0).all()
    assert torch.equal(plain != 0, attention_nonzero(plain, slots))


def attention_nonzero(cache, slots):
    """Where the layout has something to store for the given slots."""
    key, value = attention.places(cache.dtype, 16, 32)
    mask = torch.zeros(4, 2, 16 * 64, dtype=torch.bool)
    for slot in slots.tolist():
        mask[slot // 16, :, key[slot % 16]] = True
        mask[slot // 16, :, value[slot % 16]] = True
    return mask.view(cache.shape)


H, B = torch.float16, torch.bfloat16
GOOD = {
    "query": torch.zeros(3, 4, 32, dtype=B),
    "cache": torch.zeros(5, 2, 16, 64, dtype=B),
    "block_table": torch.zeros(2, 4, dtype=torch.int32),
    "query_start": torch.tensor([0, 2, 3], dtype=torch.int32),
    "lengths": torch.tensor([20, 5], dtype=torch.int32),
    "out": torch.zeros(3, 4, 32, dtype=B),
    "scale": 1.0,
    "window": 0,
    "exp_table": torch.ones(65536, dtype=H),
    "recip_table": None,
    "fp16_sum": False,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(3, 4, 32)}, "float16 or all bfloat16"),
        ({"cache": torch.zeros(5, 2, 16, 64, dtype=H)}, "float16 or all bfloat16"),
        ({"out": torch.zeros(3, 4, 32, dtype=H)}, "float16 or all bfloat16"),
        ({"out": torch.zeros(2, 4, 32, dtype=B)}, "head size"),
        ({"cache": torch.zeros(5, 2, 16, 32, dtype=B)}, "head size"),
        ({"cache": torch.zeros(5, 3, 16, 64, dtype=B)}, "heads"),
        ({"cache": torch.zeros(5, 2, 8, 64, dtype=B)}, "block size a multiple of 16"),
        ({"exp_table": torch.ones(65536, dtype=B)}, "table"),
        ({"exp_table": torch.ones(32768, dtype=H)}, "table"),
        ({"recip_table": torch.ones(131072, dtype=H)[::2]}, "table"),
        ({"block_table": torch.zeros(2, 4, dtype=torch.int64)}, "int32"),
        ({"lengths": torch.tensor([20, 5, 5], dtype=torch.int32)}, "lengths"),
    ],
)
def test_wrong_arguments(implementation, changes, message):
    implementation(*GOOD.values())
    with pytest.raises(RuntimeError, match=f"lut_attention.*{message}"):
        implementation(*(GOOD | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"block_table": torch.full((2, 4), 5, dtype=torch.int32)},
        {"block_table": torch.full((2, 4), -1, dtype=torch.int32)},
        {"lengths": torch.tensor([65, 5], dtype=torch.int32)},
        {"lengths": torch.tensor([1, 5], dtype=torch.int32)},
        {"query_start": torch.tensor([0, 2, 4], dtype=torch.int32)},
        {"query_start": torch.tensor([0, 3, 2], dtype=torch.int32)},
    ],
)
def test_indices_that_point_outside(changes):
    """Refused before any memory is touched."""
    if library.load() == "reference":
        pytest.skip("no compiled kernels here")
    with pytest.raises(RuntimeError, match="lut_attention"):
        attention.lut_attention(*(GOOD | changes).values())


def test_wrong_arguments_of_cache_write(write):
    x, cache, slots = torch.zeros(3, 2, 32, dtype=B), torch.zeros(5, 2, 16, 64, dtype=B), torch.arange(3)
    write(x, x, cache, slots)
    for arguments, message in (
        ((x.half(), x, cache, slots), "float16 or all bfloat16"),
        ((x, x[:, :1], cache, slots), "kv heads"),
        ((x, x, cache[:, :1], slots), "kv heads"),
        ((x, x, cache, torch.arange(4)), "tokens"),
        ((x, x, cache, slots.int()), "int64"),
        ((x, x, cache, slots + 78), "outside the cache"),
    ):
        with pytest.raises(RuntimeError, match=f"cache_write.*{message}"):
            write(*arguments)


@each_dtype
def test_opcheck(dtype):
    library.load()
    case = batch(((3, 20), (1, 5)), dtype=dtype, values="normal")
    for table in (None, luts.lut_table("softmax_exp", "nli-4", torch.float16)):
        case = case.with_(exp_table=table)
        arguments = [case.query, case.cache.nan_to_num(), case.block_table.clamp(max=4), case.query_start]
        arguments += [case.lengths, torch.zeros_like(case.query), 0.1, 0, table, None, False]
        torch.library.opcheck(attention.lut_attention, tuple(arguments))
    key = torch.randn(4, 2, 32).to(dtype)
    torch.library.opcheck(attention.cache_write, (key, key * 2, case.cache.nan_to_num(), torch.arange(4)))
