"""Triton kernels: numerics in the interpreter or on a device, and ahead-of-time compilation with budgets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lutserve.errors import UserError
from lutserve.kernels import library
from lutserve.kernels.gpu import LAUNCHERS, aot
from lutserve.kernels.gpu.catalogue import KERNELS

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "gpu.md"


def run_numerics(**environment: str) -> None:
    files = map(str, sorted(HERE.glob("numerics_*.py")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--durations=5", *files],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_numerics_in_the_interpreter() -> None:
    run_numerics(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_numerics_on_the_device() -> None:
    run_numerics(TRITON_INTERPRET="0")


def test_every_kernel_within_its_budget_and_the_page_current() -> None:
    compiled = aot.compile_all()
    for (kernel, architecture), used in compiled.items():
        where = f"{kernel.name} on sm_{architecture}"
        assert used.stack <= kernel.stack and used.spills <= kernel.spills, f"{where} spills"
        assert used.registers <= kernel.registers, f"{where} uses {used.registers} registers"
        assert used.shared <= 1024 * kernel.shared, f"{where} uses {used.shared} bytes of shared memory"
        assert bool(used.mma) == kernel.mma, f"{where}: tensor cores: {used.mma or 'none'}"
    page = PAGE.read_text()
    assert aot.BEGIN in page and "\n".join(aot.table(compiled)) in page, (
        "docs/gpu.md is out of date: python -m lutserve.kernels.gpu.aot"
    )


def test_every_name_is_a_launcher() -> None:
    for op in LAUNCHERS:
        library.launcher(op)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"lutserve::{op}", "CompositeExplicitAutograd"
        ), f"{op} has no reference"


def test_names_are_unique() -> None:
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_pinned_to_triton_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTSERVE_BACKEND", "triton")
    with pytest.raises(UserError, match=r"LUTSERVE_BACKEND=triton.*no CUDA device"):
        library.load.__wrapped__()


def test_nothing_needs_triton() -> None:
    """With triton absent every operator is there, and only the launchers cannot be had."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import lutserve.kernels.gpu\n"
        "from lutserve.kernels import activation, axcore, library, lut_gemm\n"
        "assert not any(name.startswith('lutserve.kernels.gpu.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
