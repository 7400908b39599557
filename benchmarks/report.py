"""The record of a benchmark: one JSON file, complete after every run, and one table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lutserve.benchmarks.check import Agreement
from lutserve.benchmarks.summary import Measurement, Row, summarize, table
from lutserve.benchmarks.workloads import Workload


@dataclass
class Report:
    """A benchmark as it grows."""

    path: Path
    #: the provider that all ratios refer to
    baseline: str
    #: machine, versions, commit, and how the servers were started
    setting: dict[str, Any]
    #: the JSON of `vllm bench serve`, each with a "lutserve" block
    runs: list[dict[str, Any]] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    #: provider -> distance of its answers from the baseline's
    agreement: dict[str, Agreement] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """Medians, spreads and ratios of the runs so far."""
        rows: list[Row] = summarize(self.measurements, self.baseline)
        return rows

    def add(
        self, result: dict[str, Any], provider: str, workload: Workload, number: int, **facts: Any
    ) -> None:
        """Take in the JSON of one run of round `number`, with `facts` about it, and write the file."""
        measured = Measurement(provider, workload.name, number, workload.value(result))
        self.measurements.append(measured)
        self.runs.append(result | {"lutserve": asdict(measured) | facts})
        self.write()

    def write(self) -> None:
        """Write everything to `path` in one step, so that a reader never sees half a file."""
        content = {
            "lutserve": self.setting | {"agreement": {k: asdict(v) for k, v in self.agreement.items()}},
            "summary": [asdict(row) for row in self.rows],
            "runs": self.runs,
        }
        new = self.path.with_suffix(".tmp")
        new.write_text(json.dumps(content, indent=1) + "\n")
        new.replace(self.path)

    def show(self, console: Console) -> None:
        """Print the table, and how far each provider's answers are from the baseline's."""
        console.print(table(self.rows, self.baseline))
        console.print(f"log-probabilities of a fixed prompt, against {self.baseline}:")
        for provider, found in self.agreement.items():
            console.print(
                f"  {provider}: {found.mean:.4f} nats apart on average, {found.largest:.3f} at most; "
                f"the first {found.equal_tokens} greedy tokens are equal",
                highlight=False,
                soft_wrap=True,
            )
        console.print(f"written to {self.path}", highlight=False, soft_wrap=True)
