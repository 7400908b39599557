"""The recipe: one frozen object that says which arithmetic every site of a model uses.

`--method mix8 --lut nli-4` is a short way to write one. It is stored as `quantization_config` in a
model's `config.json`, in the shape that compressed-tensors made customary (`config_groups` with
`targets`, `ignore`, `kv_cache_scheme`), so a folder that carries a recipe needs no flag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lutserve import luts, methods
from lutserve.errors import UserError

Site = Literal["silu", "gelu"]
SITES: tuple[str, ...] = get_args(Site)


class Group(BaseModel):
    """One choice of method for the linear layers that `targets` selects."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: "Linear" (all), a module name or its last parts ("down_proj"), or "re:" and a regular expression
    targets: tuple[str, ...] = ("Linear",)
    method: str

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        methods.get(value)
        return value

    @field_validator("targets")
    @classmethod
    def _valid_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for target in value:
            if target.startswith("re:"):
                try:
                    re.compile(target[3:])
                except re.error as error:
                    raise ValueError(f"target {target!r} is no regular expression: {error}") from None
        return value


class Recipe(BaseModel):
    """Which arithmetic every site uses. Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quant_method: Literal["lutserve"] = "lutserve"
    version: Literal[1] = 1
    config_groups: dict[str, Group] = Field(default_factory=dict)
    ignore: tuple[str, ...] = ("lm_head",)
    #: nonlinear site -> table ("exact", "nli-4", ...); a site that is not named is exact
    luts: dict[Site, str] = Field(default_factory=dict)
    kv_cache_scheme: Literal["exact"] = "exact"

    @field_validator("luts")
    @classmethod
    def _known_tables(cls, value: dict[Site, str]) -> dict[Site, str]:
        for spec in value.values():
            luts.validate(spec)
        return value

    def method_for(self, prefix: str, shards: Iterable[str] = ()) -> methods.Method:
        """Return the method of the linear layer `prefix`.

        Args:
            prefix: vLLM's name of the (fused) layer, e.g. ``model.layers.0.self_attn.qkv_proj``.
            shards: the checkpoint's names of its parts, e.g. ``...q_proj``, ``...k_proj``, ``...v_proj``.

        The first group with a matching target wins; a layer that is ignored or not targeted keeps 16 bit.

        Raises:
            UserError: the shards of one fused layer match different groups.

        """
        names = [prefix, *shards]
        if any(_matches(target, name) for target in self.ignore for name in names):
            return methods.METHODS["none"]
        whole = self._group_for(prefix)
        found = {whole} if whole else {self._group_for(name) for name in shards or [prefix]}
        if len(found) > 1:
            raise UserError(
                f"{prefix} is one fused layer but its parts are given different groups "
                f"({', '.join(str(name) for name in found)}); target {prefix.rsplit('.', 1)[-1]} instead"
            )
        group = found.pop()
        return methods.METHODS["none"] if group is None else methods.get(self.config_groups[group].method)

    def _group_for(self, name: str) -> str | None:
        for key, group in self.config_groups.items():
            if any(target == "Linear" or _matches(target, name) for target in group.targets):
                return key
        return None

    def lut_for(self, site: Site) -> str:
        """Return the table of a nonlinear site, "exact" when none is chosen."""
        return self.luts.get(site, "exact")

    @property
    def quantizes(self) -> bool:
        """Whether any linear layer may use something else than the model's own GEMM."""
        return any(group.method != "none" for group in self.config_groups.values())

    def to_config(self) -> dict[str, Any]:
        """Return the JSON form that `config.json` carries as `quantization_config`."""
        return self.model_dump(mode="json")


def parse(config: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """Validate a recipe given as a mapping; UserError in one line, naming the wrong key."""
    try:
        return Recipe.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        if first["type"] == "extra_forbidden":
            known = Group.model_fields if where.startswith("config_groups") else Recipe.model_fields
            raise UserError(f"{origin}: unknown key {where!r}; allowed: {', '.join(known)}") from None
        raise UserError(f"{origin}: {where}={first['input']!r}: {first['msg']}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; UserError if it cannot be read or is something else."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def load(path: Path) -> Recipe:
    """Read a recipe from a JSON file: the recipe itself, or a `config.json` that carries one."""
    data = read_json(path)
    return parse(data.get("quantization_config", data), str(path))


def from_model(config: Mapping[str, Any], origin: str = "config.json") -> Recipe | None:
    """Return the recipe that a model's `config.json` carries, if it carries ours."""
    stored = config.get("quantization_config") or {}
    return parse(stored, origin) if stored.get("quant_method") == "lutserve" else None


def from_flags(
    base: Recipe | None = None,
    method: str | None = None,
    lut: str | None = None,
    lut_sites: str | None = None,
    kv: str | None = None,
) -> Recipe:
    """Return `base` (default: everything exact) with the given flags applied.

    Args:
        base: recipe to start from.
        method: name for all linear layers inside the decoder blocks.
        lut: table for the sites of `lut_sites`.
        lut_sites: comma-separated site names; default all of them.
        kv: KV cache scheme.

    """
    config = (base or Recipe()).to_config()
    if method is not None:
        methods.get(method)
        config["config_groups"] = {} if method == "none" else {"default": {"method": method}}
    if lut_sites is not None and lut is None:
        raise UserError(f"--lut-sites {lut_sites} needs --lut to say which table those sites use")
    if lut is not None:
        sites = [site.strip() for site in (lut_sites or ",".join(SITES)).split(",")]
        for site in sites:
            if site not in SITES:
                raise UserError(f"unknown site {site!r} in --lut-sites; allowed: {', '.join(SITES)}")
        luts.validate(lut)
        config["luts"] = {**config["luts"], **dict.fromkeys(sites, lut)}
    if kv is not None:
        config["kv_cache_scheme"] = kv
    return parse(config, "flags")


def _matches(target: str, name: str) -> bool:
    """Whether a target names a module: a regular expression, or the whole name or its last parts."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return name == target or name.endswith("." + target)
