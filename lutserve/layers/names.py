"""The names of modules that vLLM builds without a prefix: activations and norms.

vLLM tells linears and attentions their names, activations and norms not, and builds some of them before
the attention of their layer or once for all layers (`get_act_fn` keeps what it made). So torch's hook for
the registration of a submodule writes down who holds whom; once the model is complete a module's path to
the root is its name. The same hook lets a submodule be replaced while it is being registered.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lutserve.compat import is_building

Replace = Callable[[nn.Module], nn.Module | None]

_holders: WeakKeyDictionary[nn.Module, tuple[ReferenceType[nn.Module], str]] = WeakKeyDictionary()
_replacements: list[Replace] = []


def replace_with(replace: Replace) -> None:
    """Ask `replace` about every submodule of a model that vLLM builds; None keeps the module. Idempotent."""
    if not _replacements:
        register_module_module_registration_hook(_registered)  # type: ignore[arg-type]
    if replace not in _replacements:
        _replacements.append(replace)


def is_held(module: nn.Module) -> bool:
    """Whether another module of a model that vLLM has built holds this one."""
    return module in _holders


def name_of(module: nn.Module) -> str:
    """Return the dotted path from the model to the module, e.g. ``model.layers.3.mlp.act_fn``."""
    parts: list[str] = []
    at: nn.Module | None = module
    while at is not None and at in _holders:
        holder, name = _holders[at]
        parts.append(name)
        at = holder()
    return ".".join(reversed(parts))


def layer_of(name: str) -> str:
    """Return the decoder layer of a module, ``model.layers.3`` for the above; "" outside of all layers."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return match.group() if match else ""


def _registered(holder: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
    if module is None or not is_building():
        return None
    new = next((other for replace in _replacements if (other := replace(module)) is not None), None)
    _holders.setdefault(new or module, (ref(holder), name))
    return new
