"""`lutserve::kv4_attention`: attention over a cache of 4-bit indices and scales, as `kernels.kv4` writes it.

The rule served, for one query row q; S and T[index] are the scales and values of a key or value (T rounded to
the model's dtype D), g a group of channels. What is not said is as in `kernels.attention`:

    s_j = fl32(scale * sum_g fl32(S_jg * sum_{d in g} q_d T[k_jd]))           sums in fp32, in any order
    o_d = sum_j rnD(fl32(e_j S_jg)) T[v_jd]             rnD: to bf16 in bf16 models, nothing in fp16 ones

A key of weight e_j = 0 contributes nothing, whatever its scale. With mpFPMA products (AxCore, DOI
10.1145/3725843.3756094) the product of an activation and a value +-2^eps (1 + mu / M), where M is the number
of mantissas of D (1024 in fp16, 128 in bf16), is

    q (x) k = +-2^eps G_mu(q)
    G_mu(q) = sign(q) D[min(n(q) + mu + C, largest)]          0 where q is 0, NaN where it is NaN

n(q) being the pattern of |q| and D[n] the number of that pattern: one integer addition. It equals the
published product wherever q and that are normal numbers, up to 2^15. C is the mean error over all mantissas,
rounded: in fp16 43 (E2M1) and 54 (E1M2), in bf16 5 and 7. So the sum over d is one over classes mu as well:
sum_mu sum_d G_mu(q_d) T_mu[k_jd], T_mu holding +-2^eps for the values of class mu and 0 for the others.

With values by unit, a row at position i sees the values of the units that end at or before i as indices,
o_d = sum_units fl32(S_ud * sum_{j in u} rnD(e_j) T[v_jd]), and those of its own, unfinished unit as they were
before quantisation. That depends on the row's position only, not on the step that brings it.
"""

from __future__ import annotations

import torch

from lutserve.kernels import attention, kv4
from lutserve.kernels.axcore_reference import activation_maps, patterns
from lutserve.kernels.library import define


def class_map(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """G_mu of a float16 or bfloat16 [...]; offsets: int32 [classes], mu + C. Returns [..., classes]."""
    maps = activation_maps(tuple(offsets.tolist()), "float16" if x.dtype == torch.float16 else "bfloat16")
    return maps.T[patterns(x)]


def _fake(
    query: torch.Tensor,
    value: torch.Tensor | None,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    key_tables: torch.Tensor,
    offsets: torch.Tensor | None,
    value_table: torch.Tensor,
    scale: float,
    exp_table: torch.Tensor | None,
    recip_table: torch.Tensor | None,
    fp16_sum: bool,
) -> None:
    name = "kv4_attention"
    kv4.check_cache(name, cache, query, value is not None)
    torch._check(
        query.shape == out.shape
        and query.dtype == out.dtype == key_tables.dtype == value_table.dtype
        and query.shape[1] % cache.shape[1] == 0,
        lambda: f"{name}: query and out must be alike, and heads a multiple of the cache's",
    )
    torch._check(
        value is None
        or (value.dtype == query.dtype and value.shape == (len(query), cache.shape[1], query.shape[2])),
        lambda: f"{name}: values by unit must be [tokens, kv heads, head size]",
    )
    classes = 1 if offsets is None else len(offsets)
    torch._check(
        key_tables.shape == (classes, 16)
        and value_table.shape == (16,)
        and classes in (1, 2, 4)
        and (offsets is None or (offsets.dtype == torch.int32 and offsets.dim() == 1)),
        lambda: f"{name}: tables must be [1, 2 or 4, 16] and [16], offsets int32, one for each table",
    )
    attention.check_tables(name, exp_table, recip_table)
    attention.check_requests(name, block_table, query_start, lengths)


def _reference(
    query: torch.Tensor,
    value: torch.Tensor | None,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    key_tables: torch.Tensor,
    offsets: torch.Tensor | None,
    value_table: torch.Tensor,
    scale: float,
    exp_table: torch.Tensor | None,
    recip_table: torch.Tensor | None,
    fp16_sum: bool,
) -> None:
    _fake(
        query,
        value,
        cache,
        block_table,
        query_start,
        lengths,
        out,
        key_tables,
        offsets,
        value_table,
        scale,
        exp_table,
        recip_table,
        fp16_sum,
    )
    layout = kv4.Layout(cache.shape[2], query.shape[2], value is not None)
    at, shifts = layout.index_places()
    parts = [slice(d, d + kv4.GROUP) for d in range(0, layout.head_size, kv4.GROUP)]
    starts = query_start.tolist()
    for request, end in enumerate(lengths.tolist()):
        rows = slice(starts[request], starts[request + 1])
        first = end - (rows.stop - rows.start)
        if first == end:
            continue
        blocks = block_table[request, : -(-end // layout.block_size)].long()
        pages = cache[blocks].flatten(2).transpose(0, 1)
        codes = (pages[:, :, at] >> shifts.to(torch.uint8)) & 15
        key_codes, value_codes = (codes[:, :, kind].flatten(1, 2)[:, :end].int() for kind in (0, 1))
        scales = pages[..., layout.key_scales : layout.tail].contiguous().view(torch.float16).float()
        places = layout.scale_places()
        key_scales = scales[..., places].flatten(1, 2)[:, None, None, :end]
        grouped = query[rows].unflatten(1, (cache.shape[1], -1)).permute(1, 2, 0, 3)
        mapped = grouped[..., None] if offsets is None else class_map(grouped.contiguous(), offsets)
        weights_of_keys = key_tables.float().T[key_codes]
        scores = torch.zeros(1)
        for g, part in enumerate(parts):
            left = mapped[..., part, :].float().flatten(-2)
            right = weights_of_keys[:, :, part].flatten(-2)[:, None].transpose(2, 3)
            scores = scores + (left @ right) * key_scales[..., g]
        seen = torch.arange(end) <= torch.arange(first, end)[:, None]
        e, total = attention.weigh(scores * scale, seen, exp_table)
        values = value_table.float()[value_codes]
        held = scales[..., layout.block_size * layout.groups :]
        if value is None:
            value_scales = held[..., places].flatten(1, 2)[:, None, None, :end]
            scaled = [torch.where(e == 0, 0.0, e * value_scales[..., g]) for g in range(len(parts))]
            sums = [
                _rounded(w, query.dtype) @ values[:, None, :, p] for w, p in zip(scaled, parts, strict=True)
            ]
            result = torch.cat(sums, -1)
        else:
            unit_scales = held.unflatten(-1, (-1, layout.head_size)).flatten(1, 2)
            start = first // kv4.UNIT * kv4.UNIT
            tail = kv4.tail_of(pages[:, start // layout.block_size], layout, value.dtype)
            raw = torch.cat([tail[:, : first - start], value[rows].transpose(0, 1)], 1).float()
            weights = _rounded(e, query.dtype)
            result = _by_unit(weights, values, unit_scales, raw, start, seen)
        quotient = attention.divide(result, total[..., None], recip_table, fp16_sum)
        out[rows] = quotient.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)


def _rounded(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weights.to(dtype).float() if dtype == torch.bfloat16 else weights


def _by_unit(
    weights: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    raw: torch.Tensor,
    start: int,
    seen: torch.Tensor,
) -> torch.Tensor:
    """Weighted sums, fp32 [kv heads, group, rows, head size].

    weights: [kv heads, group, rows, keys]. values: [kv heads, keys, head size]. scales: [kv heads, units,
    head size]. raw: [kv heads, keys from `start` on, head size]. seen: [rows, keys].
    """
    rows, keys = seen.shape
    result = torch.zeros(*weights.shape[:3], values.shape[2])
    for row in range(rows):
        end = keys - rows + row + 1
        complete = end // kv4.UNIT * kv4.UNIT
        for unit in range(complete // kv4.UNIT):
            of = slice(unit * kv4.UNIT, (unit + 1) * kv4.UNIT)
            sums = weights[:, :, row, None, of] @ values[:, None, of]
            result[:, :, row] += (sums * scales[:, None, unit, None])[:, :, 0]
        own = raw[:, None, complete - start : end - start]
        result[:, :, row] += (weights[:, :, row, None, complete:end] @ own)[:, :, 0]
    return result


kv4_attention = define(
    "kv4_attention(Tensor query, Tensor? value, Tensor cache, Tensor block_table, Tensor query_start, "
    "Tensor lengths, Tensor(a!) out, Tensor key_tables, Tensor? offsets, Tensor value_table, float scale, "
    "Tensor? exp_table, Tensor? recip_table, bool fp16_sum) -> ()",
    _reference,
    _fake,
)
"""Causal attention of new queries over a 4-bit cache, by the rule at the top of this module.

query, out, block_table, query_start, lengths, exp_table, recip_table, fp16_sum: as for `lut_attention`.
value: [tokens, kv heads, head size], the values of these queries' tokens where they are by unit, else None.
cache: as `kv4_write` leaves it. key_tables, value_table: [classes, 16] and [16] of query's dtype. offsets:
int32 [classes], mu + C of each class (1, 2 or 4 of them), None for exact products.
RuntimeError if the arguments are not so.
"""
