"""Weights in huge pages: streaming a weight through 4 KiB pages can cost half as much time again in a VM."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

#: bytes of a huge page on x86-64, and on ARM with 4 KiB pages
_HUGE = 1 << 21


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of a tensor in huge pages, where the system gives them on request.

    Only the pages that it fills are huge: the rest, at its end, lies in ordinary ones. Smaller tensors than
    a huge page, those of other devices, and systems without `madvise` get the tensor itself.
    """
    if not tensor.is_cpu or tensor.nbytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    # Private memory: shared memory, mmap's default, takes huge pages only where the administrator says so.
    region = mmap.mmap(-1, tensor.nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # The tensor keeps the region alive.
    raw = torch.frombuffer(region, dtype=torch.uint8)
    begin = -raw.data_ptr() % _HUGE
    with suppress(OSError):
        # First, because the system may give huge pages unasked, to the rest too.
        region.madvise(mmap.MADV_NOHUGEPAGE)
        region.madvise(mmap.MADV_HUGEPAGE, begin, tensor.nbytes // _HUGE * _HUGE)
    copy = raw[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
