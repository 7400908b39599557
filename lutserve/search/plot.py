"""A picture of a search: damage against size."""

from __future__ import annotations

from pathlib import Path

from lutserve.errors import UserError
from lutserve.search.run import Result


def draw(result: Result, path: Path) -> None:
    """Draw measured and predicted KL by mean bits; UserError without matplotlib or for another suffix."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"cannot draw {path}: the name must end in .png or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed: pip install 'lutserve[plot]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    front = sorted([result.rows[0], *result.sweep], key=lambda row: row.bits)
    axes.plot([row.bits for row in front], [row.kl for row in front], marker="o", label="found, measured")
    axes.plot([row.bits for row in front], [row.predicted for row in front], linestyle=":", label="predicted")
    for kind, marker in (("uniform", "s"), ("random", "x")):
        rows = [row for row in result.rows if row.name.startswith(kind)]
        axes.scatter([row.bits for row in rows], [row.kl for row in rows], marker=marker, label=kind)
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("held-out KL, nats a token")
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
