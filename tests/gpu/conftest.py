"""Where the numerics of Triton kernels run: on a CUDA device, or in Triton's interpreter on CPU tensors.

The files numerics_*.py are ordinary tests, collected by name only. test_gpu.py runs them in a process of
their own, because Triton decides when a kernel is imported whether it is interpreted. While you work:

    TRITON_INTERPRET=1 pytest tests/gpu/numerics_activation.py
"""

from __future__ import annotations

import os

import pytest
import torch


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
