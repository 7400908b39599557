"""Copies in huge pages hold what they should, wherever they lie."""

from __future__ import annotations

import gc

import pytest
import torch

from lutserve.kernels.pages import in_huge_pages


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (1 << 21,), (700, 3001), (1, 2, 1 << 21)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_copy_equals_its_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    copy = in_huge_pages(tensor)
    assert copy.is_contiguous() and copy.shape == tensor.shape and copy.dtype == dtype
    assert torch.equal(copy, tensor)
    if tensor.nbytes >= 1 << 21 and copy.data_ptr() != tensor.data_ptr():
        assert copy.data_ptr() % (1 << 21) == 0


def test_the_memory_lives_as_long_as_the_copy() -> None:
    part = in_huge_pages(torch.arange(1 << 21, dtype=torch.int32))[-3:]
    gc.collect()
    assert part.tolist() == [(1 << 21) - 3, (1 << 21) - 2, (1 << 21) - 1]


def test_a_transposed_tensor() -> None:
    tensor = torch.arange(1 << 20, dtype=torch.int32).view(1024, 1024).T
    assert torch.equal(in_huge_pages(tensor), tensor)
