"""`lutserve::kv4_write` and `kv4_keep_tail`: keys and values into a paged cache of 4 bits a value.

The cache is uint8 [blocks, kv heads, block size, bytes a token]; one block of one head is a page, and what
lies where inside it is ours (`Layout`). Quantisation is the same for all formats (AxCore, DOI
10.1145/3725843.3756094, its exact mode): for a group of numbers w

    S = rn16(fl32(max |w| / divisor))                          NaN where a w is not finite
    u = rn16(fl32(w / S)), 0 where S is 0
    index = how many of the 15 bounds are less than u          `kv_formats.Coding`

and both S (fp16) and the indices (two a byte) are stored. A group is up to GROUP channels of one token and
head; by unit, values are grouped along tokens instead: a group is one channel of UNIT consecutive tokens, and
is quantised by the write that brings its last token. Until then its values stay as they are, in the page's
tail, which `kv4_keep_tail` writes after attention has read what was there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lutserve.kernels.attention import GROUP as LANES
from lutserve.kernels.library import define

GROUP = 64
"""Channels that share a scale."""
UNIT = 64
"""Tokens whose values share a scale, where values are coded by unit."""


@dataclass(frozen=True)
class Layout:
    """Where things lie in a page: indices of keys, of values, scales of both, and by unit the tail.

    Indices lie in groups of 16 tokens as `kernels.attention` has them, two rows of a group's matrix in one
    byte: the even row in the low half. Scales lie by 16 tokens, then by group of channels, then by token; the
    values' by unit lie by unit, then by channel. The tail is UNIT - 1 tokens of 16-bit values, row by row.
    """

    block_size: int
    head_size: int
    by_unit: bool

    @property
    def groups(self) -> int:
        """Groups of channels, the last one short where GROUP does not divide the head size."""
        return -(-self.head_size // GROUP)

    @property
    def key_scales(self) -> int:
        """Byte at which the keys' scales begin, after the indices of keys and values."""
        return self.block_size * self.head_size

    @property
    def value_scales(self) -> int:
        """Byte at which the values' scales begin."""
        return self.key_scales + 2 * self.block_size * self.groups

    @property
    def tail(self) -> int:
        """Byte at which the tail begins, or would."""
        count = self.head_size * self.block_size // UNIT if self.by_unit else self.block_size * self.groups
        return self.value_scales + 2 * count

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a page by its tokens, rounded up."""
        total = self.tail + (2 * (UNIT - 1) * self.head_size if self.by_unit else 0)
        return -(-total // self.block_size)

    def index_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes and (0 or 4) shifts of the indices, int64 [2 (keys, values), block size, head size] each."""
        token, d = torch.arange(self.block_size)[:, None], torch.arange(self.head_size)[None]
        first, lane = token // LANES * (LANES // 2) * self.head_size, token % LANES
        keys = first + d // 2 * LANES + lane
        values = self.block_size * self.head_size // 2 + first + lane // 2 * self.head_size + d
        return torch.stack([keys, values]), 4 * torch.stack([d % 2 + 0 * token, token % 2 + 0 * d])

    def scale_places(self) -> torch.Tensor:
        """Where the scales of tokens lie in an array of theirs, int64 [block size, groups]."""
        token, group = torch.arange(self.block_size)[:, None], torch.arange(self.groups)[None]
        return (token // LANES * self.groups + group) * LANES + token % LANES


def quantise(
    x: torch.Tensor, group: int, bounds: torch.Tensor, divisor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices uint8, shape of x [..., n], and scales fp16 [..., ceil(n / group)] of groups of n."""
    indices, scales = [], []
    for part in x.float().split(group, -1):
        top = part.abs().amax(-1, keepdim=True)
        finite = part.isfinite().all(-1, keepdim=True)
        scale = torch.where(finite, top / divisor, torch.nan).half()
        ratio = torch.where(scale == 0, 0.0, part / scale.float()).half().float()
        indices.append((ratio[..., None] > bounds).sum(-1, dtype=torch.uint8))
        scales.append(scale)
    return torch.cat(indices, -1), torch.cat(scales, -1)


def check_cache(name: str, cache: torch.Tensor, x: torch.Tensor, by_unit: bool) -> Layout:
    """Return the layout; RuntimeError unless cache and x [tokens, kv heads, head size] fit each other."""
    torch._check(
        x.dtype in (torch.float16, torch.bfloat16) and cache.dtype == torch.uint8,
        lambda: f"{name}: values must be float16 or bfloat16, the cache uint8",
    )
    torch._check(
        cache.dim() == 4 and x.dim() == 3 and x.shape[2] % 16 == 0 and 0 < x.shape[2] <= 256,
        lambda: (
            f"{name}: the cache must be [blocks, kv heads, block size, bytes] and the others [tokens, heads, "
            "head size] with a head size that is a multiple of 16 up to 256"
        ),
    )
    layout = Layout(cache.shape[2], x.shape[2], by_unit)
    step = UNIT if by_unit else LANES
    torch._check(
        cache.shape[3] == layout.bytes_per_token and cache.shape[2] % step == 0,
        lambda: (
            f"{name}: block size must be a multiple of {step}, and the cache have "
            f"{layout.bytes_per_token} bytes a token"
        ),
    )
    return layout


def _check_write(name: str, x: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, by_unit: bool) -> None:
    check_cache(name, cache, x, by_unit)
    torch._check(
        x.shape[1] == cache.shape[1] and len(x) >= len(slots),
        lambda: f"{name}: keys and values must be [tokens, kv heads, head size] with a token for each slot",
    )
    torch._check(
        slots.dtype == torch.int64 and slots.dim() == 1, lambda: f"{name}: slots must be int64 [tokens]"
    )


def _write_fake(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    bounds: torch.Tensor,
    key_divisor: float,
    value_divisor: float,
    by_unit: bool,
) -> None:
    _check_write("kv4_write", key, cache, slots, by_unit)
    torch._check(
        value.dtype == key.dtype and value.shape[1:] == key.shape[1:] and len(value) >= len(slots),
        lambda: "kv4_write: keys and values must have one dtype and shape",
    )
    torch._check(
        bounds.dtype == torch.float32 and bounds.shape == (2, 15) and bounds.is_contiguous(),
        lambda: "kv4_write: bounds must be a contiguous float32 [2, 15]",
    )


def _pages(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """A copy of the cache, [blocks, kv heads, bytes of a page], after a look at the slots."""
    torch._check(
        bool((slots < len(cache) * cache.shape[2]).all()), lambda: "kv4: a slot is outside the cache"
    )
    return cache.flatten(2).clone()


def _write_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    bounds: torch.Tensor,
    key_divisor: float,
    value_divisor: float,
    by_unit: bool,
) -> None:
    _write_fake(key, value, cache, slots, bounds, key_divisor, value_divisor, by_unit)
    layout = Layout(cache.shape[2], key.shape[2], by_unit)
    pages = _pages(cache, slots)
    bytes_of, shifts = layout.index_places()

    def put(kind: int, token: int, block: int, indices: torch.Tensor) -> None:
        """Indices [heads, head size] of a token within its block."""
        for shift in (0, 4):  # one after the other, because two channels may have halves of one byte
            here = shifts[kind, token] == shift
            at = bytes_of[kind, token, here]
            pages[block][:, at] = (pages[block][:, at] & (0xF0 >> shift)) | (indices[:, here] << shift)

    places = layout.scale_places()
    for i, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, token = divmod(slot, layout.block_size)
        scales = pages[block][:, layout.key_scales : layout.tail].view(torch.int16)
        indices, scale = quantise(key[i], GROUP, bounds[0], key_divisor)
        put(0, token, block, indices)
        scales[:, places[token]] = scale.view(torch.int16)
        first_value_scale = layout.block_size * layout.groups
        if not by_unit:
            indices, scale = quantise(value[i], GROUP, bounds[1], value_divisor)
            put(1, token, block, indices)
            scales[:, first_value_scale + places[token]] = scale.view(torch.int16)
        elif token % UNIT == UNIT - 1:
            unit = tail_of(pages[block], layout, value.dtype).clone()
            unit = torch.cat([unit, unit[:, :1]], 1)
            for back in range(UNIT):
                if back > i or slots[i - back] != slot - back:
                    break
                unit[:, UNIT - 1 - back] = value[i - back]
            indices, scale = quantise(unit.transpose(1, 2), UNIT, bounds[1], value_divisor)
            for t in range(UNIT):
                put(1, token - UNIT + 1 + t, block, indices[:, :, t])
            at = first_value_scale + token // UNIT * layout.head_size
            scales[:, at : at + layout.head_size] = scale[..., 0].view(torch.int16)
    cache.copy_(pages.view(cache.shape))


def tail_of(page: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """View of the tails in pages [..., bytes]: [..., UNIT - 1, head size] of dtype."""
    end = layout.tail + 2 * (UNIT - 1) * layout.head_size
    flat = page[..., layout.tail : end].view(dtype)
    return flat.view(*flat.shape[:-1], UNIT - 1, layout.head_size)


def _tail_fake(value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    _check_write("kv4_keep_tail", value, cache, slots, True)


def _tail_reference(value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    _tail_fake(value, cache, slots)
    layout = Layout(cache.shape[2], value.shape[2], True)
    pages = _pages(cache, slots)
    for i, slot in enumerate(slots.tolist()):
        place = slot % UNIT
        last = i + UNIT - 1 - place
        complete = last < len(slots) and slots[last] == slot + UNIT - 1 - place
        if slot >= 0 and not complete:
            tail_of(pages[slot // layout.block_size], layout, value.dtype)[:, place] = value[i]
    cache.copy_(pages.view(cache.shape))


write = define(
    "kv4_write(Tensor key, Tensor value, Tensor(a!) cache, Tensor slots, Tensor bounds, float key_divisor, "
    "float value_divisor, bool by_unit) -> ()",
    _write_reference,
    _write_fake,
)
"""Quantise keys and values and store them, by the rule at the top of this module.

key, value: [tokens, kv heads, head size], both float16 or both bfloat16; tokens behind the last slot are
padding. cache: uint8 [blocks, kv heads, block size, Layout.bytes_per_token], each block of each head
contiguous. slots: int64 [at most tokens], block * block size + offset for each token, negative: not stored.
bounds: float32 [2, 15], of keys and of values. by_unit: values by unit; the tokens of a unit must then follow
one another, in this call or over several with `kv4_keep_tail` after each.
RuntimeError if the arguments are not so.
"""

keep_tail = define(
    "kv4_keep_tail(Tensor value, Tensor(a!) cache, Tensor slots) -> ()", _tail_reference, _tail_fake
)
"""Store the values of units that this call's tokens leave unfinished, as they are.

Arguments as those of `kv4_write`, by unit. To be called after attention: rows of a unit that was finished in
this step still need those of its values that an earlier step brought.
RuntimeError if the arguments are not so.
"""
