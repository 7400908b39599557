"""What the API server may ask of the worker process, where the model lives."""

from __future__ import annotations

from typing import Any


class LutserveWorker:
    """Mixed into vLLM's worker (`--worker-extension-cls`); methods are called by `collective_rpc`."""

    model_runner: Any

    def lutserve_prepare_scoring(self) -> bool | None:
        """Let the model runner answer `/lutserve/score`; see `scoring_worker.prepare`."""
        from lutserve.server.scoring_worker import prepare

        found: bool | None = prepare(self.model_runner)
        return found

    def lutserve_layers(self) -> list[dict[str, Any]]:
        """Return a report for every linear layer: method, kernel, bits, outlier columns, misses."""
        from lutserve.quant_methods.config import REPORTS

        return [
            {
                "layer": report.prefix,
                "group": report.group,
                "method": report.method,
                "kernel": report.kernel,
                "bits": report.stored_bits,
                "weights": report.weights,
                "outlier_columns": report.live.count if report.live else 0,
                "outlier_slots": report.live.columns.tolist() if report.live else [],
                "outlier_misses": report.live.misses if report.live else 0,
            }
            for report in REPORTS.layers.values()
        ]

    def lutserve_sites(self) -> list[dict[str, Any]]:
        """Return a report for every nonlinear site with a table: site, module, function, spec, table."""
        from dataclasses import asdict

        from lutserve.layers.sites import REPORTS

        return [asdict(report) for report in REPORTS.values()]

    def lutserve_saturations(self) -> dict[str, int]:
        """Return site -> inputs outside their table's range so far; empty where they are not counted."""
        from lutserve.layers.saturation import totals

        return totals()
