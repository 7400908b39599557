"""Batches for the attention operators, and the rule of `kernels.attention` a second time, key by key."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace

import numpy as np
import torch

from lutserve.kernels import attention

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Batch:
    """Arguments of `lut_attention`, and what went into its cache."""

    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    query_start: torch.Tensor
    lengths: torch.Tensor
    #: keys and values of each request, [tokens, kv heads, head size]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    scale: float
    window: int = 0
    exp_table: torch.Tensor | None = None
    recip_table: torch.Tensor | None = None
    fp16_sum: bool = False

    def run(self, function=None) -> torch.Tensor:
        """Output of an implementation, into poisoned memory; rows of no request stay poison."""
        out = torch.full_like(self.query, torch.nan)
        (function or attention.lut_attention)(
            self.query,
            self.cache,
            self.block_table,
            self.query_start,
            self.lengths,
            out,
            self.scale,
            self.window,
            self.exp_table,
            self.recip_table,
            self.fp16_sum,
        )
        return out

    def with_(self, **changes) -> Batch:
        return replace(self, **changes)


def batch(
    requests,
    heads=(4, 2),
    size=32,
    dtype=torch.bfloat16,
    block_size=16,
    seed=0,
    values="grid",
    **options,
) -> Batch:
    """A batch of (queries, keys) requests whose blocks are shuffled and everywhere else poisoned with NaN.

    values: "grid" makes scores and weighted sums exact in fp32, so that every order of summation gives the
    same bits; "normal" is Gaussian.
    """
    random = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads

    def draw(count, width, step, limit):
        shape = (count, width, size)
        if values == "normal":
            return torch.randn(shape, generator=random).to(dtype)
        return (torch.randint(-limit, limit + 1, shape, generator=random) * step).to(dtype)

    counts = [-(-keys // block_size) for _, keys in requests]
    spare = 3
    order = torch.randperm(sum(counts) + spare, generator=random).int()
    table = torch.full((len(requests), max(counts, default=0) + 2), 2**30, dtype=torch.int32)
    cache = torch.full((len(order), kv_heads, block_size, 2 * size), torch.nan, dtype=dtype)
    all_keys, all_values, used = [], [], spare
    for row, ((_, keys), count) in enumerate(zip(requests, counts, strict=True)):
        table[row, :count] = order[used : used + count]
        used += count
        k, v = draw(keys, kv_heads, 0.5, 4), draw(keys, kv_heads, 0.25, 8)
        slots = slots_of(table[row], keys, block_size)
        attention.cache_write(k, v, cache, slots)
        all_keys.append(k)
        all_values.append(v)
    starts = torch.tensor([0, *(queries for queries, _ in requests)]).cumsum(0).int()
    options.setdefault("scale", 2.0 ** -math.floor(math.log2(size) / 2 + 1))
    return Batch(
        query=draw(int(starts[-1]), query_heads, 0.5, 4),
        cache=cache,
        block_table=table,
        query_start=starts,
        lengths=torch.tensor([keys for _, keys in requests], dtype=torch.int32),
        keys=tuple(all_keys),
        values=tuple(all_values),
        **options,
    )


def slots_of(blocks, count, block_size):
    """Cache slots of a request's first `count` tokens."""
    token = torch.arange(count)
    return blocks[token // block_size].long() * block_size + token % block_size


def grid_table(seed=1):
    """A table with entries j / 1024 where scores can differ from a maximum, and NaN everywhere else."""
    entries = np.random.default_rng(seed).integers(1, 1025, 65536) / 1024
    table = torch.from_numpy(entries).half()
    table[1:0x8000] = torch.nan  # positive numbers, infinity, NaN
    table[0xFC00:] = torch.nan  # minus infinity, NaN
    return table


def scalar_oracle(b: Batch) -> torch.Tensor:
    """The rule, one key after another in Python's doubles; exact where the batch is on the grid."""
    out = torch.full_like(b.query, torch.nan)
    group = b.query.shape[1] // b.cache.shape[1]
    for request, keys in enumerate(b.lengths.tolist()):
        first, last = b.query_start[request : request + 2].tolist()
        for row in range(first, last):
            end = keys - (last - row) + 1
            begin = max(0, end - b.window) if b.window > 0 else 0
            for head in range(b.query.shape[1]):
                q = b.query[row, head].tolist()
                seen = [b.keys[request][j, head // group].tolist() for j in range(begin, end)]
                values = [b.values[request][j, head // group].tolist() for j in range(begin, end)]
                out[row, head] = torch.tensor(_attend(b, q, seen, values), dtype=torch.float64).to(out.dtype)
    return out


def _attend(b: Batch, q, keys, values):
    scores = [single(single(sum(x * y for x, y in zip(q, k, strict=True))) * single(b.scale)) for k in keys]
    if any(math.isnan(s) for s in scores):
        return [math.nan] * len(q)
    top = max(scores)
    total, sums = 0.0, [0.0] * len(q)
    for score, value in zip(scores, values, strict=True):
        x = max(single(score - top), -65504.0)
        if b.exp_table is None:
            e = math.exp(x)
        else:
            e = b.exp_table[struct.unpack("<H", struct.pack("<e", x))[0]].item()
        total += e
        weight = bfloat16(e) if b.query.dtype == torch.bfloat16 else e
        sums = [s + weight * v for s, v in zip(sums, value, strict=True)]
    return [single(quotient(single(s), single(total), b.recip_table, b.fp16_sum)) for s in sums]


def quotient(weighted: float, total: float, recip_table, fp16_sum: bool) -> float:
    """What `kernels.attention.divide` says, for one value."""
    if fp16_sum and math.isfinite(total):
        total = math.copysign(65504.0, total) if abs(total) >= 65520 else half(total)
    if recip_table is None or not math.isfinite(total) or total < 2.0**-126:
        if total == 0:
            return (
                math.nan
                if weighted == 0 or math.isnan(weighted)
                else weighted * math.copysign(math.inf, total)
            )
        return weighted / total
    fraction, exponent = math.frexp(total)
    mantissa, power = half(2 * fraction), exponent - 1
    if mantissa == 2:
        mantissa, power = 1.0, power + 1
    entry = recip_table[struct.unpack("<H", struct.pack("<e", mantissa))[0]].item()
    return weighted * single(entry * 2.0**-power)


def single(x: float) -> float:
    """x rounded to fp32, to nearest even."""
    return float(np.float32(x))


def half(x: float) -> float:
    """x (within fp16's range) rounded to fp16, to nearest even."""
    return struct.unpack("<e", struct.pack("<e", x))[0]


def bfloat16(x: float) -> float:
    """x (a normal fp32 number) rounded to bf16, to nearest even, in integers."""
    word = struct.unpack("<I", struct.pack("<f", x))[0]
    word = (word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", word))[0]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bits; all NaNs are one."""
    return bool(((a.view(torch.int16) == b.view(torch.int16)) | (a.isnan() & b.isnan())).all())
