"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ("servers",)

# Nothing in the tests may ask the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


if "PYTEST_XDIST_WORKER" in os.environ:
    # Several of us share the cores: a second thread each would mostly wait for its turn.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden arrays and evaluation data, or skip."""
    folder = Path(os.environ.get("LUTSERVE_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "golden").is_dir():
        pytest.skip(f"no golden arrays in {folder}; set LUTSERVE_SHARED")
    return folder
