"""A command with a default subcommand."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


def with_default(name: str) -> type[TyperGroup]:
    """Return a group class where `lutserve GROUP FLAGS` is `lutserve GROUP <name> FLAGS`."""

    class Group(TyperGroup):
        # The context's class is typer's own, and private.
        def parse_args(self, context: Any, args: list[str]) -> list[str]:
            if not args or (args[0] not in self.commands and args[0] != "--help"):
                args = [name, *args]
            return super().parse_args(context, args)

    return Group
