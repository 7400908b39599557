"""Triton kernels for the `lutserve::` operators on CUDA devices: same schema, fake and reference as on a CPU.

A launcher takes the operator's arguments, checks them with the operator's fake, and never waits for the
device or reads from it, so that a CUDA graph can hold it. `LAUNCHERS` names the module and function of each;
`library.load` registers them. Only this package imports triton, and nothing imports this package's modules
where triton is absent.
"""

from __future__ import annotations

#: operator -> module of this package and its launcher
LAUNCHERS: dict[str, str] = {
    "act_and_mul": "activation:act_and_mul",
    "lut_unary": "activation:unary",
}
