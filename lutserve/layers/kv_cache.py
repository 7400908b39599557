"""A KV cache's scheme as the tensors that the operators take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lutserve.kv_formats import SORTED, Scheme
from lutserve.luts import fpma_classes
from lutserve.luts.bits import Format


@dataclass(frozen=True)
class Tensors:
    """A scheme as the operators of `kernels.kv4` and `kv4_attention` take it."""

    bounds: torch.Tensor
    key_tables: torch.Tensor
    offsets: torch.Tensor | None
    value_table: torch.Tensor

    @staticmethod
    def of(scheme: Scheme, dtype: torch.dtype) -> Tensors:
        """Return the tensors for a model of float16 or bfloat16."""
        tables, offsets = torch.tensor([scheme.keys.values], dtype=dtype), None
        if scheme.keys.fp4 is not None:
            form: Format = "float16" if dtype == torch.float16 else "bfloat16"
            classes = fpma_classes.classes([scheme.keys.fp4], dtype=form)
            tables = torch.from_numpy(classes.codebooks[0])[:, list(SORTED)].contiguous().to(dtype)
            offsets = torch.tensor(classes.shifts, dtype=torch.int32)
        return Tensors(
            # While vLLM builds a model torch's default dtype is the model's.
            torch.tensor([scheme.keys.bounds, scheme.values.bounds], dtype=torch.float32),
            tables,
            offsets,
            torch.tensor(scheme.values.values, dtype=dtype),
        )
