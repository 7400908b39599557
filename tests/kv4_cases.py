"""Batches over a 4-bit cache, and the rule of `kernels.kv4_attention` a second time, key by key."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace

import numpy as np
import torch
from attention_cases import bfloat16, half, quotient, single, slots_of

from lutserve import kv_formats
from lutserve.kernels import kv4, kv4_attention
from lutserve.layers.kv_cache import Tensors

#: mean error of a format's products, in units of the last place
COMPENSATION = {
    torch.float16: {"e2m1": 43, "e1m2": 54},
    torch.bfloat16: {"e2m1": 5, "e1m2": 7},
}


@dataclass(frozen=True)
class Batch:
    """Requests with their whole history; `run` brings it to the cache in one or several steps."""

    scheme: kv_formats.Scheme
    query: tuple[torch.Tensor, ...]
    key: tuple[torch.Tensor, ...]
    value: tuple[torch.Tensor, ...]
    block_size: int
    scale: float
    exp_table: torch.Tensor | None = None
    recip_table: torch.Tensor | None = None
    fp16_sum: bool = False
    fill: int = 0xA5

    def with_(self, **changes) -> Batch:
        return replace(self, **changes)

    def empty_cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A poisoned cache and the requests' shuffled blocks."""
        counts = [-(-len(k) // self.block_size) for k in self.key]
        order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(7)).int()
        table = torch.full((len(counts), max(counts, default=0) + 1), 2**30, dtype=torch.int32)
        used = 2
        for row, count in enumerate(counts):
            table[row, :count] = order[used : used + count]
            used += count
        heads, size = self.key[0].shape[1:]
        layout = kv4.Layout(self.block_size, size, self.scheme.by_unit)
        shape = (len(order), heads, self.block_size, layout.bytes_per_token)
        return torch.full(shape, self.fill, dtype=torch.uint8), table

    def run(self, steps=None, reference=False) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Outputs of each request [tokens, heads, head size], and the cache.

        steps: for every step the number of tokens of each request; None: all in one.
        """
        write, keep, attend = (
            (kv4._write_reference, kv4._tail_reference, kv4_attention._reference)
            if reference
            else (kv4.write, kv4.keep_tail, kv4_attention.kv4_attention)
        )
        tensors = Tensors.of(self.scheme, self.query[0].dtype)
        cache, table = self.empty_cache()
        done = [0] * len(self.key)
        outputs = [torch.full_like(q, torch.nan) for q in self.query]
        for step in steps or [[len(k) for k in self.key]]:
            ranges = [slice(d, d + n) for d, n in zip(done, step, strict=True)]
            query, key, value = (
                torch.cat([x[r] for x, r in zip(of, ranges, strict=True)])
                for of in (self.query, self.key, self.value)
            )
            slots = [
                slots_of(blocks, r.stop, self.block_size)[r] for blocks, r in zip(table, ranges, strict=True)
            ]
            by_unit = self.scheme.by_unit
            divisors = (self.scheme.keys.divisor, self.scheme.values.divisor)
            write(key, value, cache, torch.cat(slots), tensors.bounds, *divisors, by_unit)
            done = [r.stop for r in ranges]
            starts = torch.tensor([0, *step]).cumsum(0).int()
            out = torch.full_like(query, torch.nan)
            attend(
                query,
                value if by_unit else None,
                cache,
                table,
                starts,
                torch.tensor(done).int(),
                out,
                tensors.key_tables,
                tensors.offsets,
                tensors.value_table,
                self.scale,
                self.exp_table,
                self.recip_table,
                self.fp16_sum,
            )
            if by_unit:
                keep(value, cache, torch.cat(slots))
            for whole, part, r in zip(outputs, out.split(step), ranges, strict=True):
                whole[r] = part
        return outputs, cache


def batch(
    name,
    lengths,
    heads=(4, 2),
    size=64,
    dtype=torch.bfloat16,
    block_size=64,
    values="grid",
    seed=0,
    **options,
) -> Batch:
    """Random requests. "grid": scales are powers of two and sums exact in fp32 whatever their order."""
    scheme = kv_formats.get(name, options.pop("model_type", ""))
    random = torch.Generator().manual_seed(seed)

    def draw(count, width, coding=None, step=0.0):
        shape = (count, width, size)
        if values == "normal":
            return torch.randn(shape, generator=random).to(dtype)
        if coding is None:
            return (torch.randint(-2, 3, shape, generator=random) * 0.5).to(dtype)
        # Every number is a value of the format, and every group has its largest.
        index = torch.randint(0, 16, shape, generator=random)
        index[index == 0] = 1  # int4's lowest value is no quotient by its largest
        index[..., ::16] = 15
        index[::64] = 15
        return (torch.tensor(coding.values)[index] * step).to(dtype)

    return Batch(
        scheme,
        tuple(draw(n, heads[0]) for n in lengths),
        tuple(draw(n, heads[1], scheme.keys, 0.5) for n in lengths),
        tuple(draw(n, heads[1], scheme.values, 0.25) for n in lengths),
        block_size,
        scale=2.0 ** -math.floor(math.log2(size) / 2 + 2),
        **options,
    )


def oracle(b: Batch) -> list[torch.Tensor]:
    """The rule in Python's doubles and integers; exact where the batch is on the grid."""
    result = []
    for query, key, value in zip(b.query, b.key, b.value, strict=True):
        group = query.shape[1] // key.shape[1]
        out = torch.full_like(query, torch.nan)
        for head in range(query.shape[1]):
            k, v = key[:, head // group].tolist(), value[:, head // group].tolist()
            held = [[quantised(x, 64, b.scheme.keys) for x in k], None]
            if not b.scheme.by_unit:
                held[1] = [quantised(x, 64, b.scheme.values) for x in v]
            for row in range(len(query)):
                y = _attend(b, query[row, head], held, v[: row + 1])
                out[row, head] = torch.tensor(y, dtype=torch.float64).to(out.dtype)
        result.append(out)
    return result


def quantised(x, group, coding):
    """[(value, scale)] of numbers: nearest value by distance in exact arithmetic on fp16 quotients."""
    found = []
    for first in range(0, len(x), group):
        part = x[first : first + group]
        scale = half(single(max(abs(w) for w in part) / coding.divisor))
        for w in part:
            u = half(single(w / scale)) if scale else 0.0
            index = sum(u > bound for bound in coding.bounds)
            found.append((coding.values[index], scale))
    return found


def product(q: torch.Tensor, value: float, coding) -> float:
    """q times a value: exact, or mpFPMA's by the published integer formula."""
    if coding.fp4 is None:
        return q.item() * rounded(value, q.dtype)
    scale = 1 if q.dtype == torch.float16 else 8
    mantissas = 1024 // scale
    bits = q.view(torch.int16).item() & 0x7FFF
    if bits == 0 or value == 0:
        return 0.0
    fraction, exponent = math.frexp(abs(value))
    offset = (exponent - 1) * mantissas + int((2 * fraction - 1) * mantissas)
    pattern = bits + offset + COMPENSATION[q.dtype][coding.fp4.name]
    return math.copysign(number(pattern, q.dtype), q.item() * value)


def number(pattern: int, dtype: torch.dtype) -> float:
    """The number of a 16-bit pattern."""
    if dtype == torch.float16:
        return struct.unpack("<e", struct.pack("<H", pattern))[0]
    return struct.unpack("<f", struct.pack("<I", pattern << 16))[0]


def rounded(x: float, dtype) -> float:
    return half(x) if dtype == torch.float16 else (bfloat16(x) if x else 0.0)


def _attend(b: Batch, q, held, values):
    end, size = len(values), len(q)
    keys = held[0][:end]
    scores = []
    for key in keys:
        total = 0.0
        for first in range(0, size, 64):
            sums = [product(q[d], key[d][0], b.scheme.keys) for d in range(first, min(size, first + 64))]
            total = single(total + single(single(sum(sums)) * key[first][1]))
        scores.append(single(total * single(b.scale)))
    top, total, out = max(scores), 0.0, [0.0] * size
    complete = end // 64 * 64 if b.scheme.by_unit else 0
    units = {
        (first, d): quantised([v[d] for v in values[first : first + 64]], 64, b.scheme.values)
        for first in range(0, complete, 64)
        for d in range(size)
    }
    for j, score in enumerate(scores):
        x = max(single(score - top), -65504.0)
        if b.exp_table is None:
            e = math.exp(x)
        else:
            e = b.exp_table[struct.unpack("<H", struct.pack("<e", x))[0]].item()
        total += e
        for d in range(size):
            if b.scheme.by_unit:
                value, scale = units[j // 64 * 64, d][j % 64] if j < complete else (values[j][d], 1.0)
                weight = (bfloat16(e) if q.dtype == torch.bfloat16 else e) * scale
            else:
                value, scale = held[1][j][d]
                weight = single(e * scale)
                if q.dtype == torch.bfloat16 and weight:
                    weight = bfloat16(weight)
            known = b.scheme.by_unit and j >= complete
            out[d] += weight * (value if known else rounded(value, q.dtype))
    return [single(quotient(single(s), single(total), b.recip_table, b.fp16_sum)) for s in out]


def fp4_code(index: np.ndarray) -> np.ndarray:
    """AxCore's codes, sign << 3 | magnitude, of indices into sixteen increasing values."""
    return np.where(index >= 8, index - 8, 15 - index)
