"""Where tables are printed: as wide as a terminal is, and never folded into a pipe or a file."""

from __future__ import annotations

from rich.console import Console

#: columns of a pipe; rich would take it for an old terminal with 80
_WIDE = 200


def for_tables() -> Console:
    """Return a console on standard output: the terminal's width, or wide enough for whole names."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)
