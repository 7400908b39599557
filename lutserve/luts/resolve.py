"""What the command line calls a function: one of ours, or any Python function as module:name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from lutserve.errors import UserError
from lutserve.luts.functions import FUNCTIONS


def resolve(text: str) -> Callable[[float], float]:
    """The function that `text` names: float -> float.

    text: a key of FUNCTIONS, or `module:name`; modules of the current folder are found too. A Python function
    may raise ValueError, ZeroDivisionError or OverflowError, or return NaN, where it has no value.
    """
    if ":" not in text:
        if text not in FUNCTIONS:
            raise UserError(
                f"unknown function {text!r}; allowed: {', '.join(FUNCTIONS)}, or module:function for any "
                "Python function of one float"
            )
        return FUNCTIONS[text].exact
    module, _, name = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import {text!r}: {error}") from None
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise UserError(f"{text!r} is no function but a {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def span_of(text: str) -> tuple[float, float]:
    """Two ends from `LOW:HIGH`, within fp16."""
    low, _, high = text.partition(":")
    try:
        ends = float(low), float(high)
    except ValueError:
        raise UserError(f"{text!r} is no range; write LOW:HIGH, e.g. -80:90") from None
    if not -65504.0 <= ends[0] < ends[1] <= 65504.0:
        raise UserError(f"range {text!r}: LOW must be below HIGH, both between -65504 and 65504")
    return ends
