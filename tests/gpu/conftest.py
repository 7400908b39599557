"""Where the numerics of Triton kernels run: on a CUDA device, or in Triton's interpreter on CPU tensors.

The files numerics_*.py are ordinary tests, collected by name only. test_gpu.py runs them in a process of
their own, because Triton decides when a kernel is imported whether it is interpreted. While you work:

    TRITON_INTERPRET=1 pytest tests/gpu/numerics_activation.py
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import triton.language as tl

from lutserve.kernels import library


@pytest.fixture(scope="session")
def device() -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    assert torch.cuda.is_available(), "no CUDA device; set TRITON_INTERPRET=1"
    return "cuda"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher allocates holds NaN, so that an element that no kernel wrote is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture
def served(device):
    """`served(op)(*arguments)`: the launcher of `op`; results, and what it changes, are on the CPU."""

    def of(op):
        launch = library.launcher(op)

        def run(*arguments):
            there = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
            result = launch(*there)
            for mine, moved in zip(arguments, there, strict=True):
                if isinstance(mine, torch.Tensor) and moved is not mine:
                    mine.copy_(moved)
            if isinstance(result, tuple):
                return tuple(r.cpu() for r in result)
            return result if result is None else result.cpu()

        return run

    return of


if os.environ.get("TRITON_INTERPRET") == "1":
    # What Triton 3.9's interpreter gets wrong in bf16: products of patterns, rounding, and subnormal numbers.
    from triton.runtime import interpreter

    def _float32(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def _create_dot(self, a, b, d, *options):
        return _dot(self, _float32(a), _float32(b), d, *options)

    def _cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return _float32(src)
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return _cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded.reshape(src.data.shape), tl.bfloat16)

    _dot, _cast = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.InterpreterBuilder.cast_impl = _cast_impl
