"""Which method every layer takes: sensitivities, costs, and the exact choice between them."""

from __future__ import annotations

from lutserve.search.solver import Solution, solve

__all__ = ["Solution", "solve"]
