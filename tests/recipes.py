"""A plan for a tiny model's layers, as a recipe and as what a simulation replaces."""

from __future__ import annotations

from typing import Any

from lutserve.recipe import Recipe, parse
from lutserve.search.candidates import Candidate

SITES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
#: method and group size of each block's qkv, o, gate_up and down
PLAN = [
    ["int4@32", "nf4@64", "mix8", "int8"],
    ["none", "axcore@32", "sf4_5@32", "nf4@64"],
    ["int8", "int4+a8@32", "mix4@32", "mix8"],
    ["nf4@64", "int4@32", "none", "int4@32"],
]


def candidate(name: str) -> Candidate:
    method, _, size = name.partition("@")
    return Candidate(method, int(size or 128), name)


def recipe_of(plan: list[list[str]], tables: dict[str, str] | None = None) -> Recipe:
    groups: dict[str, Any] = {}
    for block, row in enumerate(plan):
        for site, name in zip(SITES, row, strict=True):
            group = candidate(name).group.model_dump() | {"targets": []}
            groups.setdefault(name, group)["targets"].append(f"model.layers.{block}.{site}")
    return parse({"config_groups": groups, "luts": tables or {}})
