"""`lutserve calibrate` and `lutserve outliers`: which input columns of a model are outliers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="Alias (`lutserve models`), folder or hub id. Default: smollm2-135m.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="File (.safetensors), or the model's folder: `serve` finds it there."
        ),
    ] = Path("calibration.safetensors"),
    calibration: Annotated[
        str,
        typer.Option(
            help="Text: a file (.txt, .jsonl, also .gz); c4, wikitext2 or pile (from LUTSERVE_DATA, "
            "LUTSERVE_SHARED or the hub); a data set on the hub; or pydoc."
        ),
    ] = "c4",
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens in a window.")] = 512,
) -> None:
    """Find the outlier columns of a model's linear layers, for mix8 and mix4."""
    from rich.console import Console
    from rich.progress import Progress

    from lutserve import models
    from lutserve.quantizers.calibrate import calibrate as run
    from lutserve.quantizers.download import folder_of

    console = Console(stderr=True, highlight=False)
    folder = folder_of(models.resolve(model or models.DEFAULT, console.print), console.print)
    with Progress(console=console) as progress:
        bar = progress.add_task("calibrating", total=1.0)
        file = run(
            folder,
            output,
            text=calibration,
            samples=samples,
            length=length,
            watch=lambda done: progress.update(bar, completed=done),
        )
    print(file)


def outliers(
    source: Annotated[
        str, typer.Argument(help="File of `lutserve calibrate`, the folder that has it, or a server's URL.")
    ],
    columns: Annotated[int, typer.Option(min=0, help="Columns to list a layer.")] = 8,
) -> None:
    """Show the outlier columns of every layer, calibrated or as a server has them now."""
    from rich.table import Table

    from lutserve.console import for_tables

    table = Table(box=None, header_style="bold")
    table.add_column("layer", no_wrap=True)
    for heading in ("columns", "misses", "which"):
        table.add_column(heading, justify="left" if heading == "which" else "right", no_wrap=True)
    for row in _served(source) if source.startswith(("http://", "https://")) else _calibrated(Path(source)):
        slots = row["outlier_slots"]
        listed = " ".join(map(str, slots[:columns])) + (" ..." if len(slots) > columns else "")
        table.add_row(row["layer"], str(len(slots)), str(row.get("outlier_misses", "-")), listed)
    for_tables().print(table)


def _served(url: str) -> list[dict[str, Any]]:
    import httpx

    from lutserve.errors import UserError
    from lutserve.server.client import connect, http

    server = connect(url)
    try:
        with http(server.base_url) as client:
            rows: list[dict[str, Any]] = client.get("/lutserve/layers").raise_for_status().json()
    except httpx.HTTPError as error:
        raise UserError(f"{server.base_url} does not tell its layers ({error}); is it ours?") from None
    return rows


def _calibrated(path: Path) -> list[dict[str, Any]]:
    import torch

    from lutserve.quantizers.columns import FILE, Calibration
    from lutserve.quantizers.outliers import OutlierSlots

    rows = []
    for name, entry in Calibration(path / FILE if path.is_dir() else path).inputs.items():
        slots = OutlierSlots(len(entry.gain), lambda chosen: torch.empty(len(chosen), 0))
        slots.seed(entry.gain)
        rows.append({"layer": name, "outlier_slots": slots.columns.tolist()})
    return rows
