"""What MixQ's layers do on CUDA, on CPU tensors: columns in fixed places, the GEMM over plain weights."""

import pytest
import torch

pytest.importorskip("vllm")

from lutserve.kernels.reference import quantize_rows
from lutserve.quant_methods import mixq as method
from lutserve.quant_methods.int8_gemm import CutlassGemm, FusedGemm
from lutserve.quant_methods.mixq import MixqKernel
from lutserve.quantizers.outliers import OutlierSlots, capacity


@pytest.fixture(autouse=True)
def _serving(monkeypatch):
    monkeypatch.setattr(method, "in_dummy_run", lambda: False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gemm_over_plain_weights(monkeypatch, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 96, generator=random).to(dtype)
    packed = *quantize_rows(weight), dtype
    ours, cpu = CutlassGemm(*packed), FusedGemm(*packed)
    columns = torch.tensor([3, 95, 0])
    assert torch.equal(ours.columns(columns), cpu.columns(columns))
    codes, scales = quantize_rows(torch.randn(5, 96, generator=random))
    side, outliers, bias = (torch.randn(s, generator=random).to(dtype) for s in ((5, 16), (16, 70), (70,)))
    for given in ((side, outliers, bias), (side[:, :0], outliers[:0], None)):
        found, want = (g(codes, scales[:, None], *given) for g in (ours, cpu))
        torch.testing.assert_close(found, want, rtol=torch.finfo(dtype).eps, atol=1e-3)


def outlying(rows, k, columns, seed):
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    x[:, columns] *= 60
    return x.bfloat16()


def test_fixed_places_hold_what_others_hold():
    """Same columns and inputs; index, keep and weight never move, unused places count for nothing."""
    weight = torch.randn(8, 512)
    moving, fixed = (OutlierSlots(512, lambda columns: weight[:, columns].t(), f) for f in (False, True))
    places = [t.data_ptr() for t in (fixed.index, fixed.keep, fixed.weight)]
    x = outlying(4, 512, [], 1)
    for columns in ([], [5], [5, 7, 300], [300], list(range(0, 512, 8))):
        for slots in (moving, fixed):
            slots.hold(torch.tensor(columns, dtype=torch.int64))
        assert fixed.columns.tolist() == moving.columns.tolist() == columns
        assert torch.equal(fixed.keep, moving.keep) and torch.equal(fixed.rest(x), moving.rest(x))
        assert fixed.index.shape == (capacity(512),) and fixed.weight.shape == (capacity(512), 8)
        count = len(moving.index)
        assert torch.equal(fixed.index[:count], moving.index) and (fixed.index[count:] == -1).all()
        assert torch.equal(fixed.weight[:count], moving.weight) and (fixed.weight[count:] == 0).all()
    assert places == [t.data_ptr() for t in (fixed.index, fixed.keep, fixed.weight)]


def test_only_inputs_longer_than_any_graph_teach():
    """And what they teach reaches the short ones, whose graphs hold the places."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    kernel = MixqKernel(weight, True, graph_rows=8)
    short, long = (outlying(rows, 128, [3, 77], rows) for rows in (8, 400))
    exact = short.float() @ weight.float().t()
    error = [(kernel(short) - exact).norm()]
    assert kernel.slots.count == kernel.slots.misses == 0
    kernel(long)
    assert kernel.slots.columns.tolist() == [3, 77] and kernel.slots.misses == 1
    error.append((kernel(short) - exact).norm())
    assert kernel.slots.misses == 1 and error[1] < 0.5 * error[0]
