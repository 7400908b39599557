"""Our numbers on vLLM's /metrics: what is served, and what the online methods have learnt."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, get_args

from prometheus_client import REGISTRY, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from lutserve import __version__
from lutserve.compat import StatLoggerBase, recipe_of
from lutserve.recipe import Recipe, Site

#: seconds a scrape may wait for a busy engine before it gets the numbers of the scrape before
REFRESH_TIMEOUT = 2.0


class LutserveCollector:
    """A Prometheus collector over the newest snapshot from the worker.

    A collector instead of gauge objects, because counters that live in another process are read, not
    counted, here.
    """

    def __init__(self) -> None:
        self.recipe: Recipe | None = None
        self.layers: list[dict[str, Any]] = []
        self.sites: list[dict[str, Any]] = []
        self.saturations: dict[str, int] = {}

    async def refresh(self, engine_client: Any) -> None:
        """Take a new snapshot from the first worker; keep the old one if the engine is busy or gone."""
        try:
            parts = ("layers", "sites", "saturations")
            calls = [engine_client.collective_rpc(f"lutserve_{part}") for part in parts]
            answers = await asyncio.wait_for(asyncio.gather(*calls), REFRESH_TIMEOUT)
        except TimeoutError:
            return
        self.layers, self.sites, self.saturations = (answer[0] for answer in answers)

    def collect(self) -> Iterable[Metric]:
        """Yield the metric families; none where no recipe is served."""
        if self.recipe is None:
            return
        build = GaugeMetricFamily("lutserve:build_info", "lutserve in this server", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        info = GaugeMetricFamily(
            "lutserve:recipe_info", "what a site of the model uses", labels=["site", "choice", "table"]
        )
        for name, group in self.recipe.config_groups.items():
            info.add_metric([f"linear:{name}", group.method, ""], 1)
        for site in get_args(Site):
            used = dict.fromkeys((s["spec"], s["table"]) for s in self.sites if s["site"] == site)
            for choice, table in used or [(self.recipe.lut_for(site), "")]:
                info.add_metric([site, choice, table], 1)
        info.add_metric(["kv_cache", self.recipe.kv_cache_scheme, ""], 1)
        yield info
        if self.recipe.count_saturations:
            counter = CounterMetricFamily(
                "lutserve:lut_saturations", "inputs outside the range of their table", labels=["site"]
            )
            for site, count in self.saturations.items():
                counter.add_metric([site], count)
            yield counter
        if self.layers:
            yield from self._layer_metrics()

    def _layer_metrics(self) -> Iterable[Metric]:
        weights = sum(layer["weights"] for layer in self.layers)
        bits = sum(layer["bits"] * layer["weights"] for layer in self.layers) / max(weights, 1)
        yield GaugeMetricFamily(
            "lutserve:weight_bits_mean", "stored bits a weight of the linear layers, all included", value=bits
        )
        columns: dict[str, int] = defaultdict(int)
        misses: dict[str, int] = defaultdict(int)
        for layer in self.layers:
            columns[layer["group"]] += layer["outlier_columns"]
            misses[layer["group"]] += layer["outlier_misses"]
        gauge = GaugeMetricFamily("lutserve:outlier_columns", "16-bit columns now", labels=["group"])
        counter = CounterMetricFamily(
            "lutserve:outlier_misses", "calls that met an outlier outside the known columns", labels=["group"]
        )
        for group in columns:
            gauge.add_metric([group], columns[group])
            counter.add_metric([group], misses[group])
        yield gauge
        yield counter


#: the one collector of this process
COLLECTOR = LutserveCollector()


class LutserveStatLogger(StatLoggerBase):
    """Switches our metrics on for an engine that serves a recipe (`vllm.stat_logger_plugins`)."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        COLLECTOR.recipe = recipe_of(vllm_config)
        if COLLECTOR not in REGISTRY._collector_to_names:
            REGISTRY.register(COLLECTOR)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do after an engine step: the worker keeps the numbers until a scrape asks."""

    def log_engine_initialized(self) -> None:
        """Nothing to say: the layers have reported themselves."""
