"""4-bit folders of other tools: packed here by scalar Python from the format's text, read, compared."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from lutserve.cli import app
from lutserve.comparison import scaled_like
from lutserve.errors import UserError
from lutserve.foreign import Foreign
from lutserve.quantizers import rtn
from lutserve.quantizers.quality import sqnr

N, K, G = 16, 48, 16
NAME = "model.layers.0.mlp.up_proj"
#: AutoAWQ's packing: bits 4 i and up of a word hold the column with this number
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": G}


def word(nibbles: list[int]) -> int:
    """Eight codes as one signed 32-bit integer, the first in the lowest bits."""
    value = sum(nibble << 4 * i for i, nibble in enumerate(nibbles))
    return value - 2**32 if value >= 2**31 else value


def along_rows(codes: list[list[int]], order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack each row, eight columns to a word."""
    words = [
        [word([row[begin + place] for place in order]) for begin in range(0, len(row), 8)] for row in codes
    ]
    return torch.tensor(words, dtype=torch.int32)


def along_columns(codes: list[list[int]]) -> torch.Tensor:
    """Pack each column, eight rows to a word."""
    return along_rows([list(column) for column in zip(*codes, strict=True)]).t().contiguous()


def transposed(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


class Case:
    """Random codes [N][K], zeros and scales [N][G] and what the weights then are."""

    def __init__(self, seed: int, zeros: bool, groups: list[int] | None = None):
        draw = random.Random(seed)
        self.codes = [[draw.randrange(16) for _ in range(K)] for _ in range(N)]
        self.zeros = [[draw.randrange(16) if zeros else 8 for _ in range(K // G)] for _ in range(N)]
        self.scales = [[draw.randrange(1, 200) / 256 for _ in range(K // G)] for _ in range(N)]
        self.groups = groups or [k // G for k in range(K)]
        self.weight = torch.tensor(
            [
                [(self.codes[n][k] - self.zeros[n][g]) * self.scales[n][g] for k, g in enumerate(self.groups)]
                for n in range(N)
            ]
        )


def compressed_tensors(case: Case, symmetric: bool) -> tuple[dict, dict[str, torch.Tensor]]:
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": G}
    tensors = {
        "weight_packed": along_rows(case.codes),
        "weight_scale": torch.tensor(case.scales).half(),
        "weight_shape": torch.tensor([N, K]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = along_columns(case.zeros)
    return CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}, tensors


def gptq(case: Case, version: int = 1) -> tuple[dict, dict[str, torch.Tensor]]:
    stored = [[zero - (version == 1) & 15 for zero in row] for row in case.zeros]
    tensors = {
        "qweight": along_columns(transposed(case.codes)),
        "qzeros": along_rows(transposed(stored)),
        "scales": torch.tensor(case.scales).half().t().contiguous(),
        "g_idx": torch.tensor(case.groups, dtype=torch.int32),
    }
    return GPTQ | ({"checkpoint_format": "gptq_v2"} if version == 2 else {}), tensors


def awq(case: Case) -> tuple[dict, dict[str, torch.Tensor]]:
    config = {"quant_method": "awq", "bits": 4, "group_size": G, "zero_point": True, "version": "gemm"}
    return config, {
        "qweight": along_rows(transposed(case.codes), AWQ_ORDER),
        "qzeros": along_rows(transposed(case.zeros), AWQ_ORDER),
        "scales": torch.tensor(case.scales).half().t().contiguous(),
    }


def folder_of(path: Path, config: dict, tensors: dict[str, torch.Tensor], name: str = NAME) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    stored = {f"{name}.{key}": tensor.clone() for key, tensor in tensors.items()}
    save_file(stored | {f"{name}.bias": torch.zeros(N)}, path / "model.safetensors")
    return path


SHUFFLED = [(7 * k) % K // G for k in range(K)]
CASES = {
    "compressed-tensors": compressed_tensors(Case(1, False), True),
    "compressed-tensors, zero points": compressed_tensors(Case(2, True), False),
    "gptq": gptq(Case(3, False)),
    "gptq, zero points": gptq(Case(4, True)),
    "gptq, activation order": gptq(Case(5, True, SHUFFLED)),
    "gptq, version 2": gptq(Case(6, True), 2),
    "awq": awq(Case(7, True)),
}
WEIGHTS = [
    case.weight
    for case in (
        *(Case(i, i % 2 == 0) for i in (1, 2, 3, 4)),
        Case(5, True, SHUFFLED),
        Case(6, True),
        Case(7, True),
    )
]


@pytest.mark.parametrize(("kind", "expected"), list(zip(CASES, WEIGHTS, strict=True)), ids=list(CASES))
def test_weights_are_those_that_were_packed(tmp_path: Path, kind: str, expected: torch.Tensor) -> None:
    config, tensors = CASES[kind]
    found = Foreign(folder_of(tmp_path / "x", config, tensors))
    assert found.layers == [NAME]
    weight = found.weight(NAME)
    assert weight.dtype == torch.float32 and torch.equal(weight, expected)
    facts = found.facts()[0]
    assert facts.shape == (N, K)
    # The layer's bias is no part of its quantised weight.
    assert facts.bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_whole_rows(tmp_path: Path) -> None:
    weight = torch.randn(N, K).half().float()
    quantized = rtn(weight, "int4", -1)
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "group_size": None}
    tensors = {
        "weight_packed": along_rows(quantized.codes.tolist()),
        "weight_scale": quantized.scales,
        "weight_shape": torch.tensor([N, K]),
    }
    found = Foreign(folder_of(tmp_path / "x", CT | {"config_groups": {"g": {"weights": weights}}}, tensors))
    assert torch.equal(found.weight(NAME), quantized.dequantize()) and "whole rows" in found.title


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "is not quantised; folders of lutserve, compressed-tensors, gptq, awq can be read"),
        ({"quant_method": "fp8"}, "is quantised by fp8; folders of"),
        (GPTQ | {"bits": 8}, "only 4-bit integers are read"),
        (awq(Case(1, True))[0] | {"version": "gemv"}, "only 4-bit integers are read"),
        (CT | {"format": "nvfp4-pack-quantized"}, "only 4-bit integers are read"),
        (awq(Case(1, True))[0], "says awq but holds no qweight"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, config: dict, message: str) -> None:
    tensors = CASES["compressed-tensors"][1]
    with pytest.raises(UserError, match=message):
        Foreign(folder_of(tmp_path / "x", config, tensors))


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    config, tensors = CASES["gptq"]
    found = Foreign(folder_of(tmp_path / "x", config, tensors | {"scales": tensors["scales"][:, :5]}))
    with pytest.raises(UserError, match=rf"{NAME} is no layer of a gptq folder: .*'scales': \[3, 5\]"):
        found.weight(NAME)


def test_scales_that_are_folded_are_taken_out() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator)
    rows, columns = (torch.rand(size, generator=generator) + 0.5 for size in (64, 96))
    folded = weight * rows[:, None] * columns
    assert sqnr(folded, scaled_like(weight, folded)) > 90
    rounded = rtn(folded, "nf4", 32).dequantize()
    assert sqnr(scaled_like(weight, rounded), rounded) == pytest.approx(sqnr(folded, rounded), abs=0.3)


def test_inspect_against_the_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(tmp_path / "tiny", layers=1)
    weight = load_file(model / "model.safetensors")[f"{NAME}.weight"]
    quantized = rtn(weight, "int4", 32)
    tensors = {
        "weight_packed": along_rows(quantized.codes.tolist()),
        "weight_scale": quantized.scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    weights = {"num_bits": 4, "type": "int", "group_size": 32}
    folder = folder_of(tmp_path / "ct", CT | {"config_groups": {"g": {"weights": weights}}}, tensors)
    app(["quantize", "--inspect", str(folder), "--against", str(model)], standalone_mode=False)
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if NAME in line)
    assert row[1:5] == ["256", "x", "128", "5.004"]
    assert row[6:] == [f"{sqnr(weight, quantized.dequantize()):.2f}", "-"]
    assert "int4 by compressed-tensors, groups of 32: 1 layers" in out
    other = tiny_llama(tmp_path / "other", layers=1, intermediate=128)
    with pytest.raises(UserError, match=r"is 256 x 128 in .*, 128 x 128 in .*; is that the original"):
        app(["quantize", "--inspect", str(folder), "--against", str(other)], standalone_mode=False)
    with pytest.raises(UserError, match="goes with --inspect"):
        app(["quantize", "--against", str(other)], standalone_mode=False)
