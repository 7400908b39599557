"""Few kinds of decoder blocks: torch.compile makes a kernel for every kind, and many of them cost minutes."""

from __future__ import annotations

from collections.abc import Mapping


def merged(blocks: Mapping[int, tuple[str, ...]], most: int) -> list[list[int]]:
    """Group blocks by their pattern, and the rarest with the most similar until there are at most `most`.

    Args:
        blocks: number -> options of its units.
        most: 1 or more.

    Returns:
        Groups of numbers that are to be alike.

    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, pattern in blocks.items():
        groups.setdefault(pattern, []).append(number)
    while len(groups) > most:
        rarest = min(groups, key=lambda pattern: (len(groups[pattern]), pattern))
        members = groups.pop(rarest)
        nearest = min(groups, key=lambda pattern: (_differences(pattern, rarest), -len(groups[pattern])))
        groups[nearest] += members
    return list(groups.values())


def _differences(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))
