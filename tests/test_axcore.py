"""AxCore's linear layers: executable specification, C++ operators, golden arrays, and the layers of vLLM.

Run as a script this file prints digests of what the loaded operators give, for a process of each level.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_act_and_mul import LEVELS

from lutserve.errors import UserError
from lutserve.kernels import axcore, axcore_reference, library, lut_gemm
from lutserve.kernels.axcore_reference import product_tables
from lutserve.kernels.reference import axcore_linear
from lutserve.luts import fpma

NAN = 0x7FFF


def halves(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int16).view(torch.float16)


def words(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns with one NaN."""
    found = axcore_reference.patterns(x)
    return torch.where((found & 0x7FFF) > 0x7C00, NAN, found)


def make(m: int, k: int, n: int, group: int, typed: bool, wild: bool, seed: int = 0) -> tuple[Any, ...]:
    """Arguments of `axcore_strict`; wild ones are any bit patterns."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        if wild:
            return halves(torch.randint(-32768, 32768, shape, generator=generator))
        return torch.randn(shape, generator=generator).half()

    x, scales, bias = random(m, k), random(n, k // group) * 0.1, random(n)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    panels = -(-n // lut_gemm.COLUMNS)
    kinds = torch.randint(0, 3, (panels, k // group), dtype=torch.uint8, generator=generator)
    tables = product_tables() if typed else product_tables((fpma.FP4[1],))
    types = kinds if typed else None
    return x, lut_gemm.pack(codes), axcore.pack_scales(scales), types, tables, group, n, seed % 2 == 0, bias


SHAPES = [
    (1, 64, 32, 64),
    (3, 128, 70, 64),
    (5, 256, 33, 128),
    (2, 96, 1, 32),
    (9, 8, 64, 8),
    (0, 64, 64, 64),
]


def outputs() -> list[str]:
    """Digests of both operators on every kind of input."""
    found = []
    for seed, (m, k, n, group) in enumerate(SHAPES):
        for typed in (False, True):
            for wild in (False, True):
                arguments = make(m, k, n, group, typed, wild, seed)
                weight = make(n, k, 1, k, False, wild, seed + 1)[0]
                uniform = (arguments[0], axcore.pack_uniform(weight), 58, 64, n, arguments[-1])
                for out in (axcore.axcore_strict(*arguments), axcore.fpma_linear(*uniform)):
                    assert out.shape == (m, n)
                    found.append(hashlib.sha256(words(out).numpy().tobytes()).hexdigest()[:16])
    return found


def outputs_in(**environment: str) -> tuple[str, list[str]]:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    backend, found = json.loads(done.stdout)
    return backend, found


@pytest.fixture(scope="module")
def reference() -> list[str]:
    return outputs_in(LUTSERVE_BACKEND="reference")[1]


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_gives_the_bits_of_the_reference(level: str, reference: list[str]) -> None:
    backend, found = outputs_in(LUTSERVE_ISA=level, LUTSERVE_BACKEND="cpu")
    assert backend == f"cpu/{level}"
    assert found == reference and len(set(found)) > len(found) / 2


def scalar_strict(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, group: int, by_fpma: bool
) -> np.ndarray:
    """One number at a time: E2M1 products by Python integers, sums by numpy's fp16."""
    offsets = (0, -1024, 0, 512, 1024, 1536, 2048, 2560)
    out = np.empty((len(x), len(codes)), dtype=np.float16)
    for i, row in enumerate(x.view(np.uint16).tolist()):
        for j, weights in enumerate(codes.tolist()):
            total = np.float32(0)
            for g in range(len(row) // group):
                t = np.float16(0)
                for a, w in zip(
                    row[g * group : (g + 1) * group], weights[g * group : (g + 1) * group], strict=True
                ):
                    n = max(0, a % 32768 + offsets[w % 8] + 43) % 32768 if a % 32768 and w % 8 else 0
                    sign = 32768 * (a // 32768 != w // 8) if a % 32768 and w % 8 else 0
                    t = np.float16(np.float64(np.uint16(n + sign).view(np.float16)) + np.float64(t))
                if by_fpma:
                    a, b = int(t.view(np.uint16)), int(scales[j, g].view(np.uint16))
                    n = max(0, a % 32768 + b % 32768 - 0x3C00) % 32768 if a % 32768 and b % 32768 else 0
                    u = np.uint16(n + 32768 * (n > 0 and a // 32768 != b // 32768)).view(np.float16)
                else:
                    u = np.float16(np.float64(t) * np.float64(scales[j, g]))
                total = np.float32(total + np.float32(u))
            out[i, j] = np.float16(total)
    return out


@pytest.mark.parametrize("dequant", ["exact", "fpma"])
def test_the_specification_by_scalar_arithmetic(dequant: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x = (torch.randn(3, 64, generator=generator) * 3).half()
    codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(64, 2, generator=generator) * 0.2).half()
    types = torch.ones(1, 2, dtype=torch.uint8)
    expected = scalar_strict(x.numpy(), codes.numpy(), scales.numpy(), 32, dequant == "fpma")
    found = axcore_linear(x, codes, scales, types, 32, dequant)  # type: ignore[arg-type]
    assert np.array_equal(words(found).numpy(), words(torch.from_numpy(expected)).numpy())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(1, 80),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape(m: int, octets: int, n: int, typed: bool, wild: bool, seed: int) -> None:
    library.load()
    arguments = make(m, 8 * octets, n, 8, typed, wild, seed)
    expected = words(axcore._reference(*arguments))
    assert torch.equal(words(axcore.axcore_strict(*arguments)), expected)
    # A strided input, and rows by themselves.
    wide = torch.cat([arguments[0], arguments[0]], 1)[:, : 8 * octets]
    assert torch.equal(words(axcore.axcore_strict(wide, *arguments[1:])), expected)
    assert torch.equal(words(axcore.axcore_strict(arguments[0][-1:], *arguments[1:])), expected[-1:])


def test_uniform_products_by_scalar_arithmetic() -> None:
    library.load()
    x, weight = make(2, 72, 3, 8, False, True)[0], make(3, 72, 3, 8, False, False)[0]
    x = torch.where(words(x) & 0x7FFF < 0x6000, x, 1)
    found = axcore.fpma_linear(x, axcore.pack_uniform(weight), 58, 64, 3, None)
    for i in range(2):
        for j in range(3):
            total = np.float32(0)
            for begin in (0, 64):
                t = np.float16(0)
                for a, b in zip(
                    x[i, begin : begin + 64].numpy(), weight[j, begin : begin + 64].numpy(), strict=True
                ):
                    pair = np.array([a]).view(np.uint16), np.array([b]).view(np.uint16)
                    product = fpma.fpma(*pair, 58).view(np.float16)[0]
                    t = np.float16(np.float64(t) + np.float64(product))
                total = np.float32(total + np.float32(t))
            assert found[i, j].item() == np.float16(total)


def test_overflow_and_underflow_in_a_group() -> None:
    """A sum beyond fp16 is infinite and stays so; an exact zero scale then gives NaN, as published."""
    x = torch.full((1, 64), 60000.0).half()
    codes = torch.full((64, 64), 2, dtype=torch.uint8)
    types = torch.ones(1, 1, dtype=torch.uint8)
    for scale, expected in ((1.0, torch.inf), (0.0, torch.nan)):
        scales = torch.full((64, 1), scale).half()
        out = axcore_linear(x, codes, scales, types, 64)
        assert torch.equal(words(out), words(torch.full((1, 64), expected).half()))
    tiny = halves(torch.full((1, 64), 3))
    half = torch.full((64, 64), 1, dtype=torch.uint8)
    # 3 - 1024 + 43 is below zero: no product is left.
    assert (axcore_linear(tiny, half, torch.ones(64, 1).half(), types, 64) == 0).all()


@pytest.mark.parametrize("numerics", ["strict", "fast"])
def test_not_a_number_stays_in_its_row(numerics: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 64, generator=generator).half()
    codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8, generator=generator)
    codes[:, 5] = 2
    rest = (codes, torch.ones(64, 1).half(), torch.ones(1, 1, dtype=torch.uint8), 64, "exact", numerics)
    clean = axcore_linear(x, *rest)
    x[1, 5] = torch.nan
    out = axcore_linear(x, *rest)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def golden(shared: Path) -> list[tuple[str, dict[str, torch.Tensor], int, str, dict[str, bool]]]:
    stored = np.load(shared / "golden/axcore/weights.npz")
    options: dict[str, dict[str, bool]] = {"ablation0": {"snc": False, "compensation": False}}
    weights = {
        "ablation0": "e2m1_g128_exact",
        "axcore_untyped": "e2m1_g128_exact",
        "ablation2": "e2m1_g128_fpma",
    }
    cases = []
    for case in (
        "dse_g128_exact",
        "dse_g64_exact",
        "dse_g128_fpma",
        "ablation0",
        "axcore_untyped",
        "ablation2",
    ):
        name = weights.get(case, case)
        group = 64 if "g64" in name else 128
        # Where no types are stored they follow from the stored errors.
        if case in weights:
            types = np.ones((2, 256 // group), dtype=np.uint8)
        else:
            types = stored[f"{case}_mse16"].argmin(-1).astype(np.uint8)
        arrays = {"codes": stored[f"{name}_codes"], "scales": stored[f"{name}_scales"], "types": types}
        tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
        cases.append((case, tensors, group, name.rpartition("_")[2], options.get(case, {})))
    return cases


def test_golden_layers(shared: Path) -> None:
    stored = np.load(shared / "golden/axcore/gemm.npz")
    for case, tensors, group, dequant, options in golden(shared):
        for inputs in ("A0", "A1"):
            arguments = (torch.from_numpy(stored[inputs]), *tensors.values(), group, dequant)
            strict = axcore_linear(*arguments, **options).numpy()  # type: ignore[arg-type]
            reference, ideal = stored[f"{case}__{inputs}__ref"], stored[f"{case}__{inputs}__ideal"]
            assert np.array_equal(strict.view(np.uint16), reference.view(np.uint16)), case
            fast = axcore_linear(*arguments, numerics="fast", **options).double().numpy()  # type: ignore[arg-type]
            size = np.sqrt(np.mean(ideal**2))
            assert np.sqrt(np.mean((fast - ideal) ** 2)) < 1e-3 * size
            assert np.sqrt(np.mean((fast - reference) ** 2)) < 4e-3 * size
            assert np.abs(fast - reference).max() < 1.5e-2 * size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 64)}, r"x must be fp16 \[M, 64\]"),
        ({"group_size": 24}, "in groups of 24"),
        ({"codes": torch.zeros(63, 64, dtype=torch.uint8)}, "64 must divide the rows"),
        ({"scales": torch.zeros(64, 3).half()}, "scales must be"),
        ({"dequant": "none"}, "exact or fpma"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.zeros(1, 64).half(),
        "codes": torch.zeros(64, 64, dtype=torch.uint8),
        "scales": torch.zeros(64, 1).half(),
        "types": torch.zeros(1, 1, dtype=torch.uint8),
        "group_size": 64,
    }
    with pytest.raises(UserError, match=message):
        axcore_linear(**arguments | change)


def test_operators_refuse_what_does_not_fit() -> None:
    library.load()
    arguments = make(1, 64, 32, 64, True, False)
    for place, value in ((0, arguments[0].float()), (3, None), (5, 24), (6, 33), (8, arguments[-1][:3])):
        wrong = (*arguments[:place], value, *arguments[place + 1 :])
        with pytest.raises(RuntimeError, match="axcore_strict"):
            axcore.axcore_strict(*wrong)
        with pytest.raises(RuntimeError, match="axcore_strict"):
            axcore._reference(*wrong)


if __name__ == "__main__":
    print(json.dumps([library.load(), outputs()]))
