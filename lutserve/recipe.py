"""The recipe: one frozen object that says which arithmetic every site of a model uses.

`--method mix8 --lut nli-4` is a short way to write one. It is stored as `quantization_config` in a
model's `config.json`, in the shape that compressed-tensors made customary (`config_groups` with
`targets`, `ignore`, `kv_cache_scheme`), so a folder that carries a recipe needs no flag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lutserve import formats, kv_formats, luts, methods
from lutserve.errors import UserError

Site = Literal["silu", "gelu", "softmax_exp", "softmax_recip", "rsqrt"]
SITES: tuple[str, ...] = get_args(Site)
#: site -> function whose table it reads; gelu reads gelu_tanh or swish where the model has that form
FUNCTIONS: dict[str, str] = {site: site for site in SITES} | {"softmax_recip": "reciprocal"}
#: sites that `--lut` means when `--lut-sites` does not say: those of the published models
DEFAULT_SITES = ("silu", "gelu", "softmax_exp")


class Group(BaseModel):
    """One choice of method for the linear layers that `targets` selects."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: "Linear" (all), a module name or its last parts ("down_proj"), or "re:" and a regular expression
    targets: tuple[str, ...] = ("Linear",)
    #: a name of `lutserve.methods`; FILE.json is read at once, and replaced by the name and values in it
    method: str
    #: the values of a learned codebook, so that a recipe works where the file is not
    values: tuple[float, ...] | None = None
    #: input columns that share a scale, -1 for all; 4-bit methods only, by default as the method has it
    group_size: int = 128
    #: AxCore's methods: the published order of sums to the bit, or sums in fp32
    numerics: Literal["fast", "strict"] = "fast"
    #: AxCore's methods, strict: how a group's sum meets its scale
    dequant: Literal["exact", "fpma"] = "exact"
    #: whether the checkpoint holds the weights quantised, as `lutserve quantize` writes them
    stored: bool = False
    #: outlier columns of mix8 and mix4: learnt while serving, or the calibrated ones for ever
    outliers: Literal["online", "static"] = "online"
    #: file of `lutserve calibrate`, relative to the model's folder; empty for the folder's own, if it has one
    calibration: str = ""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        """Read a codebook's file, and take the group size that the method has by default."""
        name = data.get("method") if isinstance(data, dict) else None
        if not isinstance(name, str):
            return data
        base, option = methods.split(name)
        if base.endswith(".json") and data.get("values") is None:
            codebook = formats.get(base)
            data = data | {"method": f"{codebook.name}+{option}".rstrip("+"), "values": codebook.values}
        elif "group_size" not in data and data.get("values") is None:
            data = data | {"group_size": methods.get(name).group_size}
        return data

    @model_validator(mode="after")
    def _known_method(self) -> Group:
        axcore = self.arithmetic.family == "axcore"
        if self.numerics == "strict" and not axcore:
            raise ValueError(f"numerics strict is for AxCore's methods, not for {self.method}")
        if self.dequant == "fpma" and self.numerics == "fast":
            raise ValueError("dequant fpma needs numerics strict")
        if self.arithmetic.offline and not self.stored:
            raise ValueError(
                f"{self.method} is made beforehand: lutserve quantize MODEL --method {self.method} -o DIR, "
                "then serve DIR without --method"
            )
        online = axcore and self.method not in methods.ADAPTIVE
        if self.stored and (online or self.method == "llm-int8"):
            raise ValueError(f"{self.method} quantises while it loads; there is no stored form")
        if self.stored and self.dequant == "fpma":
            raise ValueError("dequant fpma is for weights that are quantised while they load")
        return self

    @property
    def arithmetic(self) -> methods.Method:
        """The method."""
        return methods.get(self.method, self.values)

    @property
    def codebook(self) -> formats.Codebook:
        """The format of the weights, for a method that has one."""
        name = self.arithmetic.format
        return formats.Codebook(name, self.values) if self.values else formats.get(name)

    @field_validator("group_size")
    @classmethod
    def _valid_group_size(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError("a group has 1 or more columns, or -1 for all of them")
        return value

    @field_validator("targets")
    @classmethod
    def _valid_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for target in value:
            _check_pattern(target)
        return value


_EXACT = Group(method="none")


class Recipe(BaseModel):
    """Which arithmetic every site uses. Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quant_method: Literal["lutserve"] = "lutserve"
    version: Literal[1] = 1
    config_groups: dict[str, Group] = Field(default_factory=dict)
    ignore: tuple[str, ...] = ("lm_head",)
    #: Nonlinear site -> table ("exact", "nli-4", ...). A site is named as a layer is: "silu" (everywhere),
    #: "layers.3.silu", "q_norm.rsqrt", or "re:" and a regular expression. The first match wins; without
    #: one it is exact.
    luts: dict[str, str] = Field(default_factory=dict)
    #: precision of the softmax's sum; float16 rounds the finished sum once, as the published method does
    softmax_sum: Literal["float32", "float16"] = "float32"
    #: count inputs outside their table's range, for `lutserve:lut_saturations_total`
    count_saturations: bool = False
    #: "exact" (16 bit), "axcore", or a 4-bit format
    kv_cache_scheme: str = kv_formats.EXACT
    #: "reference": the published evaluation of AxCore's cache, fake-quantised and approximate; for studies
    kv_numerics: Literal["served", "reference"] = "served"
    #: who multiplies the layers that stay 16 bit: "auto" is our kernel where vLLM's is slow
    linear16: Literal["auto", "vllm"] = "auto"

    @model_validator(mode="after")
    def _published_scheme(self) -> Recipe:
        if self.kv_numerics == "reference":
            if self.kv_cache_scheme != kv_formats.AXCORE:
                raise ValueError("kv_numerics reference needs kv_cache_scheme axcore")
            if any(self.may_use(site) for site in ("softmax_exp", "softmax_recip")):
                raise ValueError(
                    "kv_numerics reference has an exact softmax; leave softmax sites out of luts"
                )
        return self

    @property
    def packs_cache(self) -> bool:
        """Whether the KV cache really holds 4 bits a value."""
        return self.kv_cache_scheme != kv_formats.EXACT and self.kv_numerics == "served"

    @field_validator("ignore")
    @classmethod
    def _valid_ignore(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for target in value:
            _check_pattern(target)
        return value

    @field_validator("kv_cache_scheme")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        return kv_formats.check(value)

    @field_validator("luts")
    @classmethod
    def _known_tables(cls, value: dict[str, str]) -> dict[str, str]:
        for target, spec in value.items():
            if not target.startswith("re:") and target.rpartition(".")[2] not in SITES:
                raise ValueError(
                    f"{target!r} names no site; allowed: {', '.join(SITES)}, with layers before it"
                )
            _check_pattern(target)
            if target.startswith("re:"):
                luts.validate(spec)
            else:
                luts.check(FUNCTIONS[target.rpartition(".")[2]], spec)
        return value

    def group_for(self, prefix: str, shards: Iterable[str] = ()) -> Group:
        """Return the choice for the linear layer `prefix`.

        Args:
            prefix: vLLM's name of the (fused) layer, e.g. ``model.layers.0.self_attn.qkv_proj``.
            shards: the checkpoint's names of its parts, e.g. ``...q_proj``, ``...k_proj``, ``...v_proj``.

        The first group with a matching target wins; a layer that is ignored or not targeted keeps 16 bit.

        Raises:
            UserError: the shards of one fused layer match different groups.

        """
        names = [prefix, *shards]
        if any(_matches(target, name) for target in self.ignore for name in names):
            return _EXACT
        whole = self._key_for(prefix)
        found = {whole} if whole else {self._key_for(name) for name in shards or [prefix]}
        if len(found) > 1:
            raise UserError(
                f"{prefix} is one fused layer but its parts are given different groups "
                f"({', '.join(str(name) for name in found)}); target {prefix.rsplit('.', 1)[-1]} instead"
            )
        key = found.pop()
        return _EXACT if key is None else self.config_groups[key]

    def _key_for(self, name: str) -> str | None:
        for key, group in self.config_groups.items():
            if any(target == "Linear" or _matches(target, name) for target in group.targets):
                return key
        return None

    def lut_for(self, site: Site, layer: str = "", module: str = "") -> str:
        """Return the table of a nonlinear site, "exact" where none is chosen.

        Args:
            site: what is computed.
            layer: the decoder layer, e.g. ``model.layers.0``; none for a site outside of all layers.
            module: the module itself, e.g. ``model.layers.0.self_attn.q_norm``.

        Targets may name the site in its layer (``layers.0.rsqrt``) or in its module (``q_norm.rsqrt``).
        """
        names = [f"{stem}.{site}" for stem in (layer, module) if stem] or [site]
        matching = (s for target, s in self.luts.items() if any(_matches(target, name) for name in names))
        return next(matching, "exact")

    @property
    def attends(self) -> bool:
        """Whether some layer's attention is ours: tables or a 16-bit sum in the softmax, or a 4-bit cache."""
        tables = self.may_use("softmax_exp") or self.may_use("softmax_recip")
        return tables or self.softmax_sum == "float16" or self.kv_cache_scheme != kv_formats.EXACT

    def may_use(self, site: Site) -> bool:
        """Whether any target could give the site a table other than "exact" in some layer."""
        return any(spec != "exact" and site in _sites_of(target) for target, spec in self.luts.items())

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
    group_size: str | None = None,
    numerics: str | None = None,
    lut: str | None = None,
    lut_sites: str | None = None,
    kv: str | None = None,
    softmax_sum: str | None = None,
    count_saturations: str | None = None,
    linear16: str | None = None,
    outliers: str | None = None,
    calibration: str | None = None,
) -> Recipe:
    """Return `base` (default: everything exact) with the given flags applied.

    Args:
        base: recipe to start from.
        method: name for all linear layers inside the decoder blocks.
        group_size: input columns that share a scale, for a 4-bit method.
        numerics: fast or strict, for AxCore's methods.
        lut: table for the sites of `lut_sites`.
        lut_sites: comma-separated site names; default those of DEFAULT_SITES.
        kv: KV cache scheme.
        softmax_sum: precision of the softmax's sum, float32 or float16.
        count_saturations: "true" to count inputs outside their table's range.
        linear16: who multiplies the layers that stay 16 bit, "auto" or "vllm".
        outliers: online or static, for the groups that keep outlier columns.
        calibration: file of `lutserve calibrate` for them.

    """
    config = (base or Recipe()).to_config()
    if method is not None:
        methods.get(method)
        config["config_groups"] = {} if method == "none" else {"default": {"method": method}}
    for key, value in (("group_size", group_size), ("numerics", numerics)):
        if value is None:
            continue
        if method in (None, "none"):
            raise UserError(f"--{key.replace('_', '-')} {value} needs --method to say which layers it is for")
        config["config_groups"]["default"][key] = value
    columns = {"outliers": outliers, "calibration": calibration}
    columns = {key: value for key, value in columns.items() if value is not None}
    keeping = [
        g for g in config["config_groups"].values() if methods.get(g["method"], g.get("values")).outliers
    ]
    if columns and not keeping:
        names = ", ".join(m.name for m in methods.METHODS.values() if m.outliers)
        raise UserError(f"--outliers and --calibration-file need a --method with outlier columns: {names}")
    for group in keeping:
        group |= columns
    if lut_sites is not None and lut is None:
        raise UserError(f"--lut-sites {lut_sites} needs --lut to say which table those sites use")
    if lut is not None:
        sites = [site.strip() for site in (lut_sites or ",".join(DEFAULT_SITES)).split(",")]
        for site in sites:
            if site not in SITES:
                raise UserError(f"unknown site {site!r} in --lut-sites; allowed: {', '.join(SITES)}")
        luts.validate(lut)
        # In front, because the first match wins.
        config["luts"] = dict.fromkeys(sites, lut) | {
            t: s for t, s in config["luts"].items() if t not in sites
        }
    given = {
        "kv_cache_scheme": kv,
        "softmax_sum": softmax_sum,
        "count_saturations": count_saturations,
        "linear16": linear16,
    }
    config |= {key: value for key, value in given.items() if value is not None}
    return parse(config, "flags")


def _check_pattern(target: str) -> None:
    """ValueError where a target that should be a regular expression is none."""
    if target.startswith("re:"):
        try:
            re.compile(target[3:])
        except re.error as error:
            raise ValueError(f"target {target!r} is no regular expression: {error}") from None


#: where models have their decoder layers, and there the modules that read a site's table
_STACKS = ("model.layers", "model.decoder.layers", "language_model.model.layers", "transformer.h")
_ACTIVATIONS = ("mlp.act_fn", "mlp.act", "mlp.experts", "activation_fn")
_ATTENTIONS = ("self_attn.attn", "attn.attn")
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm", "ln_1")
_MODULES: dict[str, tuple[str, ...]] = {
    "silu": _ACTIVATIONS,
    "gelu": _ACTIVATIONS,
    "softmax_exp": _ATTENTIONS,
    "softmax_recip": _ATTENTIONS,
    "rsqrt": _NORMS,
}
_LAYERS = 200  # more than any model has
_OUTSIDE = ("model.norm.rsqrt", "transformer.ln_f.rsqrt", "model.decoder.final_layer_norm.rsqrt")


@cache
def _sites_of(target: str) -> frozenset[str]:
    """Sites that a target may name: a regular expression all of them if it fits no name known here."""
    if not target.startswith("re:"):
        return frozenset({target.rpartition(".")[2]})
    stems = [f"{stack}.{layer}" for stack in _STACKS for layer in range(_LAYERS)]
    names = [f"{stem}.{site}" for stem in stems for site in SITES]
    names += [f"{stem}.{part}.{site}" for stem in stems for site in SITES for part in _MODULES[site]]
    found = {name.rpartition(".")[2] for name in (*names, *_OUTSIDE, *SITES) if _matches(target, name)}
    return frozenset(found or SITES)


def _matches(target: str, name: str) -> bool:
    """Whether a target names a module: a regular expression, or the whole name or its last parts."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return name == target or name.endswith("." + target)
