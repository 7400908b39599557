"""Recipes for reading: what groups of layers and nonlinear sites use, and a map of single layers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutserve import recipe
from lutserve.report.folder import Folder, Record
from lutserve.report.values import Table, Value, of, word

_LAYER = re.compile(r"layers\.(\d+)\.([\w.]+)")
#: colours of the page that tell methods apart
_TINTS = 6
#: targets of a group that are written out
_LISTED = 3


@dataclass(frozen=True)
class Shown:
    """A recipe as the page shows it."""

    id: str
    title: str
    table: Table
    #: a row a decoder layer, a column a linear layer in it; None where layers are not told apart
    map: Table | None
    #: the recipe itself, as JSON
    text: str
    #: id of the record it comes from
    origin: str


def collect(folder: Folder) -> list[Shown]:
    """Every different recipe among the files of a folder and in what cells' servers said of theirs."""
    found: dict[str, Shown] = {}
    names = {Path(cell.results): cell for cell in folder.cells if cell.results}
    for record in folder.records:
        config = _config(record)
        if config is None:
            continue
        parsed = recipe.parse(config, record.name)
        text = json.dumps(parsed.to_config(), indent=1)
        if text not in found:
            cell = names.get(record.path.resolve())
            title = cell.recipe if cell else record.name
            found[text] = _shown(f"recipe-{len(found) + 1}", title, parsed, text, record.origin)
    return list(found.values())


def _config(record: Record) -> dict[str, Any] | None:
    """The recipe in a file: the file itself, a model's config.json, or what lm-eval's results carry."""
    data = record.data
    if not isinstance(data, dict):
        return None
    inner = data.get("lutserve")
    served = inner.get("recipe") if isinstance(inner, dict) else None
    for config in (data, data.get("quantization_config"), served):
        if isinstance(config, dict) and config.get("quant_method") == "lutserve":
            return config
    return None


def _shown(id: str, title: str, parsed: recipe.Recipe, text: str, origin: str) -> Shown:
    rows = [
        (word(_targets(group)), word(group.method), word(_details(group)))
        for group in parsed.config_groups.values()
    ]
    rows += [(word(target), word(spec), word("table")) for target, spec in parsed.luts.items()]
    if parsed.kv_cache_scheme != "exact":
        rows.append((word("KV cache"), word(parsed.kv_cache_scheme), word("")))
    if not rows:
        rows.append((word("everything"), word("none"), word("the model's own arithmetic")))
    table = Table(
        f"{id}-groups",
        "Groups of layers, and nonlinear sites",
        ("layers or site", "method or table", "details"),
        tuple(rows),
    )
    return Shown(id, title, table, _map(f"{id}-map", parsed), text, origin)


def _targets(group: recipe.Group) -> str:
    more = len(group.targets) - _LISTED
    return ", ".join(group.targets[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _details(group: recipe.Group) -> str:
    facts = [group.arithmetic.summary]
    if group.arithmetic.format:
        facts.append("one scale a row" if group.group_size == -1 else f"groups of {group.group_size}")
    if group.arithmetic.outliers:
        facts.append(f"outlier columns {group.outliers}")
    return "; ".join(facts)


def _map(id: str, parsed: recipe.Recipe) -> Table | None:
    targets = [
        target.replace("\\", "") for group in parsed.config_groups.values() for target in group.targets
    ]
    found = [match for target in targets if (match := _LAYER.search(target))]
    if not found:
        return None
    kinds = list(dict.fromkeys(match[2] for match in found))
    tints: dict[str, str] = {}
    rows = []
    for layer in range(max(int(match[1]) for match in found) + 1):
        methods = [parsed.group_for(f"model.layers.{layer}.{kind}").method for kind in kinds]
        tinted = (Value(m, m, level=tints.setdefault(m, f"m{len(tints) % _TINTS}")) for m in methods)
        rows.append((of(layer), *tinted))
    return Table(id, "Method of every layer", ("decoder layer", *kinds), tuple(rows))
