"""Pictures: matplotlib where it is installed, and files that are complete or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lutserve.errors import UserError

SUFFIXES = (".png", ".svg")


def new(width: float, height: float) -> Any:
    """A matplotlib figure of this size in inches; UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed: pip install 'lutserve[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def check(path: Path) -> None:
    """UserError for a name that is no picture's."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"cannot draw {path}: the name must end in {' or '.join(SUFFIXES)}")


def folder(path: Path) -> Path:
    """Make a folder for pictures; UserError if it or they cannot be made."""
    new(1, 1)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None
    return path


def save(figure: Any, path: Path) -> None:
    """Write a figure; UserError if it cannot be written."""
    check(path)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        # Without the date the same numbers give the same picture.
        figure.savefig(partial, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
