"""A KV cache's scheme as the tensors that the operators take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lutserve.kv_formats import Scheme


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
        tables: list[tuple[float, ...]] = [scheme.keys.values]
        offsets = None
        if scheme.keys.compensation is not None:
            # The patterns of bf16 have 8 times fewer mantissas than those of fp16.
            step = 1 if dtype == torch.float16 else 8
            constant = round(scheme.keys.compensation / step)
            tables = [table for _, table in scheme.keys.classes]
            offsets = torch.tensor(
                [mu // step + constant for mu, _ in scheme.keys.classes], dtype=torch.int32
            )
        return Tensors(
            # While vLLM builds a model torch's default dtype is the model's.
            torch.tensor([scheme.keys.bounds, scheme.values.bounds], dtype=torch.float32),
            torch.tensor(tables, dtype=dtype),
            offsets,
            torch.tensor(scheme.values.values, dtype=dtype),
        )
