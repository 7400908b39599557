"""`lutserve::kv4_write` and `kv4_keep_tail` in Triton, the pages as `kernels.kv4` lays them out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lutserve.kernels import kv4
from lutserve.kernels.attention import GROUP as LANES

_LANES, _GROUP, _UNIT = tl.constexpr(LANES), tl.constexpr(kv4.GROUP), tl.constexpr(kv4.UNIT)


@triton.jit
def codes_of(x, scale, bounds_ptr):
    """Indices int32 of fp32 x with fp16 scales that broadcast; see `kernels.kv4`."""
    scale = scale.to(tl.float32)
    # The denominator is 1 where it would be 0, so that no 0 / 0 is asked for.
    ratio = tl.div_rn(x, tl.where(scale == 0, 1.0, scale) + tl.zeros_like(x)).to(tl.float16).to(tl.float32)
    ratio = tl.where(scale == 0, 0.0, ratio)
    index = tl.zeros(x.shape, tl.int32)
    for bound in tl.static_range(15):
        index += (ratio > tl.load(bounds_ptr + bound)).to(tl.int32)
    return index


@triton.jit
def scale_of(x, divisor, AXIS: tl.constexpr):
    """Fp16 scale of fp32 groups along AXIS, kept as 1: max|x| / divisor, NaN where x is not finite."""
    finite = tl.sum((tl.abs(x) < float("inf")).to(tl.int32), AXIS, keep_dims=True) == x.shape[AXIS]
    top = tl.max(tl.abs(x), AXIS, keep_dims=True)
    return tl.where(finite, tl.div_rn(top, divisor + tl.zeros_like(top)), float("nan")).to(tl.float16)


@triton.jit
def write_kernel(
    key_ptr,
    value_ptr,
    cache_ptr,
    slots_ptr,
    bounds_ptr,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    block_stride,
    head_stride,
    key_divisor,
    value_divisor,
    BY_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Store one token's group of channels of one head; program: a token, a head and a group.

    VALUE_SCALES, TAIL: bytes, see `kv4.Layout`. By unit, values are the work of the unit's last token.
    """
    i, head, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots_ptr + i)
    if slot < 0:
        return
    page = cache_ptr + slot // BLOCK * block_stride + head * head_stride
    token = (slot % BLOCK).to(tl.int32)
    lane, indices = token % _LANES, token // _LANES * (_LANES // 2) * SIZE
    scale_at = (token // _LANES * GROUPS + group) * _LANES + lane
    channels = tl.arange(0, _GROUP)
    d = group * _GROUP + channels
    inside = d < SIZE
    x = tl.load(key_ptr + i * key_stride + head * key_head_stride + d, inside, 0.0).to(tl.float32)
    scale = scale_of(x, key_divisor, 0)
    even, odd = tl.split(codes_of(x, scale, bounds_ptr).reshape(_GROUP // 2, 2))
    pair = group * (_GROUP // 2) + tl.arange(0, _GROUP // 2)
    tl.store(page + indices + pair * _LANES + lane, (even | odd << 4).to(tl.uint8), pair < SIZE // 2)
    halves = page.to(tl.pointer_type(tl.float16), bitcast=True)
    one = tl.arange(0, 1)
    tl.store(halves + BLOCK * SIZE // 2 + scale_at + one, scale)
    values = page + BLOCK * SIZE // 2
    x_ptr = value_ptr + i * value_stride + head * value_head_stride
    if BY_UNIT:
        if token % _UNIT == _UNIT - 1:
            rows = tl.arange(0, _UNIT)
            back = _UNIT - 1 - rows
            known = (back <= i) & (tl.load(slots_ptr + i - back, back <= i, -1) == slot - back)
            # As far back as the tokens follow one another; the rest is in the tail.
            run = tl.min(tl.where(known, _UNIT, back), 0)
            new = ((back < run)[:, None]) & inside[None, :]
            old = ((back >= run)[:, None]) & inside[None, :]
            unit = tl.load(x_ptr - back[:, None] * value_stride + d[None, :], new, 0.0).to(tl.float32)
            tail = (page + TAIL).to(tl.pointer_type(value_ptr.dtype.element_ty), bitcast=True)
            unit += tl.load(tail + rows[:, None] * SIZE + d[None, :], old, 0.0).to(tl.float32)
            by_channel = scale_of(unit, value_divisor, 0)
            index = codes_of(unit, by_channel, bounds_ptr + 15).reshape(_UNIT // 2, 2, _GROUP)
            first, second = tl.split(index.permute(0, 2, 1))
            pairs = (token - _UNIT + 1) // 2 + tl.arange(0, _UNIT // 2)
            whole = inside[None, :] & (pairs >= 0)[:, None]
            tl.store(values + pairs[:, None] * SIZE + d[None, :], (first | second << 4).to(tl.uint8), whole)
            place = VALUE_SCALES // 2 + token // _UNIT * SIZE + d[None, :]
            tl.store(halves + place, by_channel, inside[None, :])
    else:
        x = tl.load(x_ptr + d, inside, 0.0).to(tl.float32)
        scale = scale_of(x, value_divisor, 0)
        tl.store(halves + VALUE_SCALES // 2 + scale_at + one, scale)
        # A byte is shared with a token that another program stores, so its half is replaced atomically.
        index = codes_of(x, scale, bounds_ptr + 15).reshape(_GROUP // 4, 4)
        shift = 8 * tl.arange(0, 4)[None, :] + lane % 2 * 4
        word = tl.sum(index << shift, 1)
        quads = group * (_GROUP // 4) + tl.arange(0, _GROUP // 4)
        words = (values + indices + lane // 2 * SIZE).to(tl.pointer_type(tl.int32), bitcast=True) + quads
        others = tl.where(lane % 2 == 0, -0x0F0F0F10, 0x0F0F0F0F) + tl.zeros_like(word)
        tl.atomic_and(words, others, quads < SIZE // 4)
        tl.atomic_or(words, word, quads < SIZE // 4)


@triton.jit
def keep_tail_kernel(
    value_ptr,
    cache_ptr,
    slots_ptr,
    count,
    value_stride,
    value_head_stride,
    block_stride,
    head_stride,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Store one token's value of one head in the tail, unless its unit is complete; program: both."""
    i, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + i)
    place = slot % _UNIT
    last = i + _UNIT - 1 - place
    complete = tl.load(slots_ptr + last, last < count, -1) == slot + _UNIT - 1 - place
    if (slot < 0) | complete:
        return
    d = tl.arange(0, WIDTH)
    value = tl.load(value_ptr + i * value_stride + head * value_head_stride + d, d < SIZE)
    page = cache_ptr + slot // BLOCK * block_stride + head * head_stride + TAIL
    tail = page.to(tl.pointer_type(value_ptr.dtype.element_ty), bitcast=True)
    tl.store(tail + place * SIZE + d, value, d < SIZE)


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    bounds: torch.Tensor,
    key_divisor: float,
    value_divisor: float,
    by_unit: bool,
) -> None:
    """`lutserve::kv4_write` on a GPU."""
    kv4._write_fake(key, value, cache, slots, bounds, key_divisor, value_divisor, by_unit)
    _, heads, block_size, _ = cache.shape
    layout = kv4.Layout(block_size, key.shape[2], by_unit)
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    if len(slots):
        write_kernel[(len(slots), heads, layout.groups)](
            key,
            value,
            cache,
            slots,
            bounds,
            *key.stride()[:2],
            *value.stride()[:2],
            *cache.stride()[:2],
            key_divisor,
            value_divisor,
            BY_UNIT=by_unit,
            BLOCK=block_size,
            SIZE=layout.head_size,
            GROUPS=layout.groups,
            VALUE_SCALES=layout.value_scales,
            TAIL=layout.tail,
            num_warps=4 if by_unit else 1,
            enable_fp_fusion=False,
        )


def keep_tail(value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """`lutserve::kv4_keep_tail` on a GPU."""
    kv4._tail_fake(value, cache, slots)
    _, heads, block_size, _ = cache.shape
    layout = kv4.Layout(block_size, value.shape[2], True)
    value = value if value.stride(2) == 1 else value.contiguous()
    if len(slots):
        keep_tail_kernel[(len(slots), heads)](
            value,
            cache,
            slots,
            len(slots),
            *value.stride()[:2],
            *cache.stride()[:2],
            BLOCK=block_size,
            SIZE=layout.head_size,
            WIDTH=triton.next_power_of_2(layout.head_size),
            TAIL=layout.tail,
            num_warps=1,
        )
