"""Every environment variable with our prefix, in one table; a misspelt one is an error."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from lutserve.errors import UserError

PREFIX = "LUTSERVE_"

VARIABLES: dict[str, str] = {
    "LUTSERVE_BACKEND": "kernel family: auto (default), reference, cpu or triton",
    "LUTSERVE_CACHE": "folder for converted models and compiled kernels (default ~/.cache/lutserve)",
    "LUTSERVE_DATA": "folder with the offline evaluation data, read by the lm-eval task files",
    "LUTSERVE_ISA": "instruction set for the C++ kernels: amx, avx512_bf16, avx512, avx2 or portable",
    "LUTSERVE_SHARED": "folder with golden arrays and data, read by the tests",
}


def check() -> None:
    """Raise UserError for a variable with our prefix that nothing reads."""
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(VARIABLES)}"
            raise UserError(f"unknown environment variable {name}; {hint}")


def choice(name: str, allowed: tuple[str, ...], default: str) -> str:
    """Value of the variable `name`, which must be one of `allowed`; UserError otherwise."""
    value = os.environ.get(name) or default
    if value not in allowed:
        raise UserError(f"{name}={value!r}; allowed: {', '.join(allowed)}")
    return value


def cache_dir() -> Path:
    """Folder that holds everything lutserve can make again (not created here)."""
    given = os.environ.get("LUTSERVE_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lutserve"
