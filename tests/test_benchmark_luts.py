"""What `benchmarks/luts.py` calls the published algorithm is it, for every input."""

import pytest
import torch

pytest.importorskip("vllm")

from lutserve import luts
from lutserve.benchmarks.luts import published


@pytest.mark.parametrize("function", ["silu", "softmax_exp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_published_algorithm_in_torch(function: str, dtype: torch.dtype) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    got, want = published(function)(x).to(dtype), luts.lut_table(function, "nli-4", dtype)
    number = ~x.isnan()
    assert torch.equal(got[number].view(torch.int16), want[number].view(torch.int16))
