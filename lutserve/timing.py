"""How long each linear layer of a model takes by each method on the machine at hand.

Layers are built by vLLM as a server builds them, with random weights of the model's shapes. Times depend on
shapes, method and machine and not on weights, so that a `config.json` is all that is needed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lutserve import compat, machine
from lutserve.quant_methods import mixq
from lutserve.quant_methods.config import REPORTS, LutserveConfig
from lutserve.search import architecture
from lutserve.search.architecture import Architecture, Site

SCHEMA = "lutserve-timing-1"
#: bytes of 16-bit weight that few tokens meet in turn, as in a model that no cache holds
_COLD = 1 << 26
_FEW = 8
#: share of input columns with outliers, and their size; real inputs have about as many
_OUTLIERS, _SIZE = 0.005, 30.0
#: largest relative error of a result; more is no layer that multiplies
_WRONG = 0.5


def profile(
    config: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    tokens: Sequence[int],
    *,
    repeats: int = 15,
    done: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time every shape of a model's fused linear layers.

    Args:
        config: the model's `config.json`.
        groups: what a recipe's group says, without targets: method, group_size, numerics.
        tokens: numbers of tokens, rows of a layer's input.
        repeats: rounds; in each every method has its turn.
        done: called with (shapes done, shapes in all).

    Returns:
        {"schema", "machine", "threads", "dtype", "repeats", "rows": [...]}. A row has n (outputs), k
        (inputs), layer, method, group_size where it was given, m (tokens), kernel, and us, us_min, us_max:
        median and range in microseconds.

    Raises:
        UserError: a model, method or shape that cannot be.
        RuntimeError: a layer does not multiply.

    """
    arch = architecture.of(config)
    shapes = {(site.out, site.columns): site for site in arch.sites}
    rows: list[dict[str, Any]] = []
    with _one_device():
        for number, site in enumerate(shapes.values(), 1):
            rows += _site(arch, site, groups, tokens, repeats)
            mixq.KERNELS.clear()
            done(number, len(shapes))
    return {
        "schema": SCHEMA,
        "machine": machine.collect(),
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16",
        "repeats": repeats,
        "rows": rows,
    }


def _site(
    arch: Architecture,
    site: Site,
    groups: Sequence[Mapping[str, Any]],
    tokens: Sequence[int],
    repeats: int,
) -> list[dict[str, Any]]:
    """The rows of one shape."""
    generator = torch.Generator().manual_seed(0)
    n, k = site.out, site.columns
    weight = (torch.randn(n, k, generator=generator) / k**0.5).bfloat16()
    x = torch.randn(max(*tokens, 64), k, generator=generator)
    x[:, torch.randperm(k, generator=generator)[: round(_OUTLIERS * k)]] *= _SIZE
    x = x.bfloat16()
    exact = x.float() @ weight.float().T
    copies = max(1, min(16, _COLD // weight.nbytes))
    # Every layer has a name of its own, by which methods keep what they know of it.
    built = [
        [_Layer(arch.prefix(place * copies + copy, site), group, weight, x) for copy in range(copies)]
        for place, group in enumerate(groups)
    ]
    rows = []
    for m in tokens:
        part = x[:m]
        for layers, group in zip(built, groups, strict=True):
            off = ((layers[0](part).float() - exact[:m]).norm() / exact[:m].norm()).item()
            if not off <= _WRONG:
                raise RuntimeError(f"{group['method']} [{n}, {k}] is off by {off:.2g}, with {m} tokens")
        turns = copies if m <= _FEW else 1
        times: list[list[float]] = [[] for _ in groups]
        for _ in range(repeats):
            for layers, seen in zip(built, times, strict=True):
                start = time.perf_counter()
                for layer in layers[:turns]:
                    layer(part)
                seen.append(1e6 * (time.perf_counter() - start) / turns)
        for layers, group, seen in zip(built, groups, times, strict=True):
            rows.append(
                {"n": n, "k": k, "layer": site.name, **group, "m": m, "kernel": layers[0].kernel}
                | {"us": round(statistics.median(seen), 2), "us_min": round(min(seen), 2)}
                | {"us_max": round(max(seen), 2)}
            )
    return rows


class _Layer:
    """One linear layer as vLLM builds it: x [M, K] in, [M, N] out, bf16."""

    def __init__(self, prefix: str, group: Mapping[str, Any], weight: Tensor, x: Tensor) -> None:
        recipe = {"config_groups": {"all": {"targets": ["Linear"], **group}}}
        config = compat.VllmConfig(additional_config={"lutserve": {"quant_method": "lutserve", **recipe}})
        n, k = weight.shape
        with compat.set_current_vllm_config(config):
            self._layer = compat.ReplicatedLinear(
                k, n, bias=False, params_dtype=torch.bfloat16, quant_config=LutserveConfig(), prefix=prefix
            )
            parameter = self._layer.weight
            parameter.weight_loader(parameter, weight)
            self._layer.quant_method.process_weights_after_loading(self._layer)
            report = REPORTS.layers.pop(prefix)
            self.kernel = report.kernel
            # Layers with outlier columns learn them as they do while serving.
            with compat.set_forward_context(object(), config):
                for _ in range(4):
                    self(x)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._layer(x)[0]
        return out


@contextmanager
def _one_device() -> Iterator[None]:
    """The parallel groups that vLLM's layers ask for their rank, as a single worker has them."""
    with tempfile.TemporaryDirectory() as store, compat.set_current_vllm_config(compat.VllmConfig()):
        compat.init_distributed_environment(1, 0, f"file://{store}/store", 0, backend="gloo")
        compat.initialize_model_parallel(1)
        try:
            yield
        finally:
            compat.destroy_model_parallel()
            compat.destroy_distributed_environment()
