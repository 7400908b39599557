"""Copies in huge pages hold what they should, wherever they lie."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch

from lutserve.kernels.pages import in_huge_pages

HUGE = 1 << 21


def advice(address: int) -> set[str]:
    """Flags of the mapping that an address lies in: hg where huge pages are asked for, nh where refused."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (1 << 21,), (700, 3001), (1, 2, 1 << 21)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_copy_equals_its_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    copy = in_huge_pages(tensor)
    assert copy.is_contiguous() and copy.shape == tensor.shape and copy.dtype == dtype
    assert torch.equal(copy, tensor)
    if tensor.nbytes >= HUGE and copy.data_ptr() != tensor.data_ptr():
        assert copy.data_ptr() % HUGE == 0


def test_the_memory_lives_as_long_as_the_copy() -> None:
    part = in_huge_pages(torch.arange(1 << 21, dtype=torch.int32))[-3:]
    gc.collect()
    assert part.tolist() == [(1 << 21) - 3, (1 << 21) - 2, (1 << 21) - 1]


def test_a_transposed_tensor() -> None:
    tensor = torch.arange(1 << 20, dtype=torch.int32).view(1024, 1024).T
    assert torch.equal(in_huge_pages(tensor), tensor)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without huge pages on request"
)
@pytest.mark.parametrize("rest", [0, 1, 12345, HUGE - 1])
def test_only_the_pages_that_a_tensor_fills_are_huge(rest: int) -> None:
    filled = 2 * HUGE
    copy = in_huge_pages(torch.ones(filled + rest, dtype=torch.uint8))
    begin = copy.data_ptr()
    assert "hg" in advice(begin) and "hg" in advice(begin + filled - 1)
    if rest:
        assert "nh" in advice(begin + filled) and "nh" in advice(begin + filled + rest - 1)
