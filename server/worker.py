"""What the API server may ask of the worker process, where the model lives."""

from __future__ import annotations

from typing import Any


class LutserveWorker:
    """Mixed into vLLM's worker (`--worker-extension-cls`); methods are called by `collective_rpc`."""

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
                "outlier_misses": report.live.misses if report.live else 0,
            }
            for report in REPORTS.layers.values()
        ]

    def lutserve_tables(self) -> dict[str, str]:
        """Return site -> id of the look-up table that the layers of this worker use."""
        from lutserve.layers.activation import TABLES

        return dict(TABLES)
