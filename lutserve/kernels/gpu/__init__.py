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
    "cache_write": "attention:cache_write",
    "int8_linear_rows": "int8:linear_rows",
    "kv4_attention": "kv4_attention:attend",
    "kv4_keep_tail": "kv4:keep_tail",
    "kv4_write": "kv4:write",
    "lut_add_rms_norm": "norm:add_rms_norm",
    "lut_attention": "attention:lut_attention",
    "lut_layer_norm": "norm:layer_norm",
    "lut_rms_norm": "norm:rms_norm",
    "axcore_strict": "axcore:axcore_strict",
    "fpma_linear": "axcore:fpma_linear",
    "lut_gemm": "lut_gemm:lut_gemm",
    "lut_unary": "activation:unary",
    "mixq_add_outliers": "mixq:add_outliers",
    "mixq_gate_and_prepare": "mixq:gate_and_prepare",
    "mixq_prepare": "mixq:prepare",
}
