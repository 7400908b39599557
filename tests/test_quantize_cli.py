"""`lutserve quantize` from the command line to the folder, on a model of three small blocks."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny_gemma, tiny_llama
from typer.main import get_command

from lutserve import checkpoint, formats, recipe
from lutserve.checkpoint import Checkpoint
from lutserve.cli import app
from lutserve.errors import UserError
from lutserve.luts.fpma import FP4
from lutserve.quantizers import fp4, gptq, rtn
from lutserve.quantizers.axcore import axcore
from lutserve.quantizers.block import BlockQuantizer
from lutserve.quantizers.partial import Partial
from lutserve.quantizers.pipeline import quantize
from lutserve.quantizers.settings import Settings
from lutserve.quantizers.statistics import Inputs

LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
CALIBRATED = {"text": "pydoc"}


def settings(method="nf4", algo="rtn", **options):
    return Settings(method, algo, **{"group_size": 32, "samples": 6, "length": 48} | options)


@pytest.fixture(autouse=True)
def one_thread():
    """Many small operations: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("model") / "tiny", layers=3)
    (folder / "LICENSE").write_text("free\n")
    (folder / "README.md").write_text("the original's\n")
    return folder


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """Folder quantised by each algorithm, made once."""
    folders: dict[str, Path] = {}

    def make(algo: str) -> Path:
        if algo not in folders:
            folders[algo] = tmp_path_factory.mktemp(algo) / "out"
            quantize(model, folders[algo], settings(algo=algo), **CALIBRATED)
        return folders[algo]

    return make


def logits(folder: Path, state=None):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if state is not None:
        known = loaded.load_state_dict({name: t.float() for name, t in state.items()}, strict=False)
        assert not known.unexpected_keys
        assert all("lm_head" in name for name in known.missing_keys)
    ids = AutoTokenizer.from_pretrained(folder)("The river rises in the hills north of the town.").input_ids
    with torch.no_grad():
        return loaded(torch.tensor([ids])).logits


# --- packing ------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 15))
def test_packing_there_and_back(n, k, seed, zero):
    codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = checkpoint.pack(codes, zero)
    assert packed.shape == (n, (k + 1) // 2) and packed.dtype == torch.uint8
    for row in range(n):
        for j in range(packed.shape[1]):
            high = codes[row, 2 * j + 1].item() if 2 * j + 1 < k else zero
            assert packed[row, j].item() == codes[row, 2 * j].item() + 16 * high
    assert torch.equal(checkpoint.unpack(packed, k), codes)


def test_what_a_checkpoint_cannot_hold():
    weight = torch.randn(4, 32)
    with pytest.raises(UserError, match="x has zero points"):
        checkpoint.layer_tensors("x", rtn(weight, "int4", 16, scheme="asym"))
    with pytest.raises(UserError, match="x has permuted groups"):
        checkpoint.layer_tensors("x", gptq(weight, torch.eye(32), "nf4", 16, act_order=True))


# --- the folder ---------------------------------------------------------------------------------------------


def test_rtn_folder(model, made):
    folder = made("rtn")
    original, stored = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    quantized = [f"model.layers.{i}.{name}" for i in range(3) for name in LINEARS]
    for name in quantized:
        expected = rtn(original.pop(f"{name}.weight"), "nf4", 32)
        packed, scale, values = (
            stored.pop(f"{name}.weight_{part}") for part in ("packed", "scale", "codebook")
        )
        assert torch.equal(packed, checkpoint.pack(expected.codes, 7)) and packed.dtype == torch.uint8
        assert torch.equal(scale, expected.scales) and scale.dtype == torch.float32
        assert values.tolist() == torch.tensor(formats.get("nf4").values).tolist()
    assert original.keys() == stored.keys()
    for name, tensor in original.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor)
    config = json.loads((folder / "config.json").read_text())
    read = recipe.from_model(config)
    assert read.group_for("model.layers.0.self_attn.qkv_proj").method == "nf4"
    assert read.group_for("model.layers.0.self_attn.qkv_proj").group_size == 32
    assert read.group_for("model.layers.0.self_attn.qkv_proj").stored
    assert read.group_for("lm_head").method == "none"
    del config["quantization_config"]
    assert config == json.loads((model / "config.json").read_text())
    files = {file.name for file in model.iterdir()} | {checkpoint.REPORT}
    assert {file.name for file in folder.iterdir()} == files
    assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert not folder.with_name("out.partial").exists()


@pytest.mark.parametrize("algo", ["rtn", "gptq", "awq", "smoothquant"])
def test_card_and_report(made, algo):
    folder = made(algo)
    card = (folder / "README.md").read_text()
    assert f"$ lutserve quantize tiny --method nf4 --algo {algo} --group-size 32" in card and "-o out" in card
    assert ("--calibration pydoc --samples 6 --sequence-length 48" in card) == (algo != "rtn")
    report = json.loads((folder / checkpoint.REPORT).read_text())
    assert len(report["layers"]) == 21 and report["settings"]["algo"] == algo
    for name, layer in report["layers"].items():
        assert f"| {name} | {layer['weight_sqnr_db']:.2f} |" in card
        assert 12 < layer["weight_sqnr_db"] < 25
        assert (algo == "rtn") == ("output_sqnr_db" not in layer)


def test_algorithms_help(made):
    """On the inputs they are given, gptq and awq leave less error in the outputs than smoothquant."""
    mean = {}
    for algo in ("smoothquant", "awq", "gptq"):
        layers = json.loads((made(algo) / checkpoint.REPORT).read_text())["layers"]
        mean[algo] = sum(layer["output_sqnr_db"] for layer in layers.values()) / len(layers)
    assert mean["awq"] > mean["smoothquant"] and mean["gptq"] > mean["smoothquant"]


@pytest.mark.parametrize("algo", ["rtn", "gptq", "awq", "smoothquant"])
def test_transformers_computes_nearly_the_same(model, made, algo):
    exact = logits(model)
    plain = (logits(model, dict(Checkpoint(made("rtn")).dequantized())) - exact).norm()
    error = (logits(model, dict(Checkpoint(made(algo)).dequantized())) - exact).norm()
    # Random weights make the model sensitive. Had scales been folded wrongly, nothing would be left at all.
    assert 1e-3 * exact.norm() < error < 0.6 * exact.norm()
    assert error < 1.3 * plain


def test_gemma_norms_are_folded_too(tmp_path):
    folder = tiny_gemma(tmp_path / "gemma")
    said = []
    quantize(folder, tmp_path / "out", settings(algo="awq"), **CALIBRATED, say=said.append)
    exact, state = logits(folder), dict(Checkpoint(tmp_path / "out").dequantized())
    assert (logits(folder, state) - exact).norm() < 0.6 * exact.norm()
    before = load_file(folder / "model.safetensors")
    assert any(not torch.equal(before[n], t) for n, t in state.items() if n.endswith("layernorm.weight"))
    assert said == []


def test_opt_is_quantised_with_its_biases(shared, tmp_path):
    folder = shared / "models/tiny-opt-pydoc"
    quantize(folder, tmp_path / "out", settings("sf4_5", "awq"), **CALIBRATED)
    exact, state = logits(folder), dict(Checkpoint(tmp_path / "out").dequantized())
    assert (logits(folder, state) - exact).norm() < 0.2 * exact.norm()


def test_act_order_needs_no_permutation_later(model, made, tmp_path):
    quantize(model, tmp_path / "out", settings(algo="gptq", act_order=False), **CALIBRATED)
    assert "--no-act-order" in (tmp_path / "out/README.md").read_text()
    scales = Checkpoint(made("gptq")).layer("model.layers.0.mlp.down_proj").scales
    weight = load_file(model / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    # In the order of the columns, from the weight as it was; without the order they follow its changes.
    assert torch.equal(scales, rtn(weight, "nf4", 32).scales)
    assert not torch.equal(Checkpoint(tmp_path / "out").layer("model.layers.0.mlp.down_proj").scales, scales)


@pytest.mark.parametrize("method", ["int4", "fp4_range", "sf3_5", "sf4_2.5"])
def test_any_format_comes_back(model, tmp_path, method):
    quantize(model, tmp_path / "out", settings(method, group_size=-1))
    weight = load_file(model / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    layer = Checkpoint(tmp_path / "out").layer("model.layers.1.mlp.down_proj")
    assert torch.equal(layer.dequantize(), rtn(weight, method, -1).dequantize())


def test_a_learned_codebook_goes_with_the_folder(model, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"values": [-1, -0.4, -0.1, 0.05, 0.3, 1.1], "name": "mine"}))
    codebook = formats.load(file)
    quantize(model, tmp_path / "out", settings(str(file)))
    file.unlink()
    stored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    group = recipe.parse(stored).group_for("model.layers.0.self_attn.o_proj")
    assert (group.method, group.stored, group.codebook.values) == ("mine", True, codebook.values)
    name = "model.layers.1.mlp.down_proj"
    weight = load_file(model / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(Checkpoint(tmp_path / "out").weight(name), rtn(weight, codebook, 32).dequantize())


def test_axcore_stores_the_format_of_each_block(model, tmp_path):
    quantize(model, tmp_path / "out", settings("axcore", group_size=64), **CALIBRATED)
    stored, original = Checkpoint(tmp_path / "out"), load_file(model / "model.safetensors")
    kinds = set()
    for name in stored.layers:
        weight = original[f"{name}.weight"].float()
        layer, types = stored.layer(name), stored.tensor(f"{name}.weight_type")
        assert types.shape == (weight.shape[0] // 64, weight.shape[1] // 64)
        for block in range(types.shape[0]):
            for group in range(types.shape[1]):
                kind = types[block, group].item()
                kinds.add(kind)
                part = weight[64 * block : 64 * block + 64, 64 * group : 64 * group + 64]
                expected = fp4.quantize(part, FP4[kind].name, 64).dequantize()
                assert torch.equal(
                    layer.dequantize()[64 * block : 64 * block + 64, 64 * group : 64 * group + 64], expected
                )
        assert torch.equal(layer.dequantize(), stored.weight(name))
    assert 1 in kinds  # the weights are Gaussian
    card = (tmp_path / "out/README.md").read_text()
    assert "--method axcore" in card and "Formats: E3M0, E2M1 and E1M2" in card
    facts = stored.facts()
    assert len(facts) == 21 and all(4.25 < layer.bits < 4.26 and layer.output_sqnr for layer in facts)


def test_axcore_chooses_by_what_the_layer_reads():
    """Channels that are never active do not matter, however badly a format suits them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(64, 64, generator=generator) - 0.5
    weight[:, 32:] *= (torch.randn(64, 32, generator=generator) * 4).exp2()
    made = settings("axcore", group_size=64)
    quantizer, group = BlockQuantizer(made, None, print), made.recipe.group_for("a")
    chosen = {}
    for silent in (slice(0, 32), slice(32, 64)):
        entry = Inputs.empty(64, rows=8)
        for _ in range(6):
            x = torch.randn(1, 50, 64, generator=generator)
            x[..., silent] = 0
            entry.add(x)
        assert [len(rows) for rows in entry.kept] == [8] * 6
        layer = quantizer.round("a", weight, entry, group).weight
        assert torch.equal(layer.types, axcore(weight, 64, x=torch.cat(entry.kept)).types)
        chosen[silent.start] = layer.types.item()
    assert chosen[0] != chosen[32]


def test_groups_with_a_tail(model, tmp_path):
    quantize(model, tmp_path / "out", settings(group_size=48))
    weight = load_file(model / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    layer = Checkpoint(tmp_path / "out").layer("model.layers.1.mlp.down_proj")
    assert layer.scales.shape[1] == 6
    assert torch.equal(layer.dequantize(), rtn(weight, "nf4", 48).dequantize())


def test_ignored_layers_stay(model, tmp_path):
    quantize(
        model, tmp_path / "out", settings(ignore=("lm_head", "down_proj", r"re:.*layers\.0\.self_attn.*"))
    )
    original, found = load_file(model / "model.safetensors"), Checkpoint(tmp_path / "out")
    assert len(found.layers) == 21 - 3 - 4
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(found.tensor(name), original[name])
    with pytest.raises(UserError, match=r"no linear layer left to quantise: --ignore re:\.\*"):
        quantize(model, tmp_path / "none", settings(ignore=("re:.*",)))


def test_sharded_and_pickled_models_are_the_same(model, made, tmp_path):
    tensors = load_file(model / "model.safetensors")
    for kind in ("sharded", "pickled"):
        folder = tmp_path / kind
        folder.mkdir()
        for file in model.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        if kind == "pickled":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            half = len(tensors) // 2
            parts = {"a.safetensors": list(tensors)[:half], "b.safetensors": list(tensors)[half:]}
            for name, keys in parts.items():
                save_file({key: tensors[key] for key in keys}, folder / name)
            places = {key: name for name, keys in parts.items() for key in keys}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        quantize(folder, tmp_path / f"{kind}-out", settings())
        made_of = (tmp_path / f"{kind}-out/model.safetensors").read_bytes()
        assert made_of == (made("rtn") / "model.safetensors").read_bytes()
        assert not list((tmp_path / f"{kind}-out").glob("*.bin"))


def test_large_models_are_written_in_shards(model, made, tmp_path, monkeypatch):
    monkeypatch.setattr("lutserve.quantizers.partial._SHARD", 100_000)
    quantize(model, tmp_path / "out", settings())
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole, merged = load_file(made("rtn") / "model.safetensors"), {}
    for file in files:
        part = load_file(tmp_path / "out" / file)
        assert all(index["weight_map"][name] == file for name in part)
        merged |= part
    assert merged.keys() == whole.keys() and all(torch.equal(merged[n], t) for n, t in whole.items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())


# --- interrupted runs ---------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys, torch
from pathlib import Path
from lutserve.quantizers.pipeline import quantize
from lutserve.quantizers.settings import Settings

torch.set_num_threads(1)
model, output, algo, block, what = sys.argv[1:]
def watch(step):
    if step.block == int(block) and step.what.startswith(what):
        os.kill(os.getpid(), signal.SIGKILL)
quantize(Path(model), Path(output), Settings("nf4", algo, group_size=32, samples=6, length=48), text="pydoc",
         watch=watch)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("algo", "block", "what"),
    [
        ("gptq", 1, "running on"),
        pytest.param("rtn", 1, "mlp.up", marks=pytest.mark.slow),
        pytest.param("awq", 2, "choosing", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(model, made, tmp_path, algo, block, what):
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(model), str(output), algo, str(block), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    left = {file.name for file in output.with_name("out.partial").iterdir()}
    assert f"block-{block - 1:04d}.safetensors" in left and f"block-{block:04d}.safetensors" not in left
    steps = []
    quantize(model, output, settings(algo=algo), **CALIBRATED, watch=steps.append)
    assert min(step.block for step in steps) == block
    assert contents(output) == contents(made(algo))
    assert not output.with_name("out.partial").exists()


@pytest.mark.slow
def test_a_kill_between_two_files_costs_one_block(model, made, tmp_path):
    """The state between a finished block and what enters the next one."""
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(model), str(output), "gptq", "2", "calibrating"]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    partial = output.with_name("out.partial")
    hidden = load_file(partial / "hidden-0002.safetensors")
    assert len(hidden) == 6
    (partial / "hidden-0002.safetensors").unlink()
    quantize(model, output, settings(algo="gptq"), **CALIBRATED)
    assert contents(output) == contents(made("gptq"))


def test_another_run_is_not_mixed_in(model, tmp_path):
    with Partial(tmp_path / "out", {"settings": "others"}):
        pass
    with pytest.raises(UserError, match=r"beginning of another run \(different: .*settings.*\); remove it"):
        quantize(model, tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(model, made):
    with pytest.raises(UserError, match="exists; give another folder or remove it"):
        quantize(model, made("rtn"), settings())


def test_two_processes_do_not_share_a_folder(model, tmp_path):
    with Partial(tmp_path / "out", {}), pytest.raises(UserError, match="another process is writing"):
        quantize(model, tmp_path / "out", settings())


def test_progress_never_goes_back(model, tmp_path):
    for algo in ("rtn", "gptq"):
        steps = []
        quantize(model, tmp_path / algo, settings(algo=algo), **CALIBRATED, watch=steps.append)
        done = [step.done for step in steps]
        assert done == sorted(done) and done[0] == 0 and done[-1] == 1
        assert len({step.what for step in steps}) > 5


# --- the command --------------------------------------------------------------------------------------------


def run(*args: str) -> None:
    app(["quantize", *args], standalone_mode=False)


def test_old_option_names(model, made, tmp_path, capsys):
    old = ["--woq_dtype", "int", "--woq_bits", "4", "--woq_group_size", "32", "--woq_algo", "RTN"]
    run(str(model), *old, "--woq_enable_mse_search", "--output_dir", str(tmp_path / "old" / "out"))
    new = ["--method", "int4", "--group-size", "32", "--mse", "-o", str(tmp_path / "new" / "out")]
    run(str(model), *new)
    assert contents(tmp_path / "old/out") == contents(tmp_path / "new/out")
    assert (
        "--method int4 --algo rtn --group-size 32 --mse -o out"
        in (tmp_path / "old/out/README.md").read_text()
    )
    assert capsys.readouterr().out.split() == [str(tmp_path / "old/out"), str(tmp_path / "new/out")]


def test_every_documented_option_exists():
    text = (Path(__file__).parents[1] / "docs/quantize.md").read_text()
    documented = set(re.findall(r"`(--[\w-]+)", text)) - {"--inspect", "--method"}
    command = get_command(app).commands["quantize"]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    assert len(documented) > 30 and documented <= known


def test_inspect(made, capsys):
    run("--inspect", str(made("awq")))
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    row = next(line for line in lines if line[:1] == ["model.layers.0.self_attn.q_proj"])
    # 128 x 128 half bytes, a scale of four bytes for each 32 weights, 64 bytes of codebook.
    assert row[1:6] == ["128", "x", "128", f"{4 + 1 + 8 * 64 / 128**2:.3f}", "10,304"]
    report = json.loads((made("awq") / checkpoint.REPORT).read_text())["layers"][row[0]]
    assert row[6:] == [f"{report['weight_sqnr_db']:.2f}", f"{report['output_sqnr_db']:.2f}"]
    assert "nf4 by awq, groups of 32: 21 layers" in out and len(lines) == 1 + 21 + 1
    with pytest.raises(UserError, match="cannot read"):
        run("--inspect", "/nonexistent")


def test_inspect_something_else(model):
    with pytest.raises(UserError, match="is not quantised"):
        run("--inspect", str(model))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "say where to write: -o DIR"),
        (["-o", "x"], "say into which format: --method NAME"),
        (["-o", "x", "--method", "nf5"], "unknown method 'nf5'"),
        (["-o", "x", "--method", "llm-int8"], "llm-int8 is quantised while it is loaded"),
        (["-o", "x", "--method", "int"], "--method int needs --bits"),
        (["-o", "x", "--method", "nf4", "--bits", "3"], "--bits 3: nf4 has 4 bits"),
        (["-o", "x", "--method", "nf4", "--algo", "gtpq"], "unknown algorithm 'gtpq'; allowed: rtn, gptq"),
        (["-o", "x", "--method", "nf4", "--scheme", "asym"], "only sym can be served"),
        (
            ["-o", "x", "--method", "nf4", "--group-size", "0"],
            "--group-size 0; allowed: multiples of 8",
        ),
        (["-o", "x", "--method", "nf4", "--group-size", "12"], "--group-size 12; allowed: multiples of 8"),
        (["-o", "x", "--method", "nf4", "--ignore", "re:("], "options: ignore=.* is no regular expression"),
        (["-o", "x", "--method", "./none.json"], "cannot read codebook none.json"),
        (["-o", "x", "--method", "nf4", "--algo", "gptq", "--mse"], "--mse goes with rtn"),
        (["-o", "x", "--method", "nf4", "--full-range"], "--full-range is for integers"),
        (
            ["-o", "x", "--method", "nf4", "--algo", "smoothquant", "--alpha", "2"],
            "--alpha 2.0; allowed: 0 to 1",
        ),
        (["-o", "x", "--method", "mpfpma"], "mpfpma is quantised while it is loaded.*axcore, axcore-plus"),
        (["-o", "x", "--method", "axcore", "--algo", "gptq"], "axcore rounds to nearest.*--algo rtn alone"),
        (["-o", "x", "--method", "axcore", "--mse"], "axcore rounds to nearest.*--algo rtn alone"),
        (["-o", "x", "--method", "axcore", "--group-size", "12"], "--group-size 12; allowed: multiples"),
        (["-o", "x", "--method", "nf4", "--damping", "-1"], "--damping must be 0 or more"),
        (["-o", "x", "--method", "nf4", "--samples", "0"], "--samples must be 1 or more"),
        (["./nowhere", "-o", "x", "--method", "nf4"], "./nowhere"),
        (["no-such/model", "-o", "x", "--method", "nf4"], "cannot reach the hub for no-such/model"),
    ],
)
def test_wrong_options(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(*args)
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_one_line_and_status_two():
    command = [sys.executable, "-m", "lutserve.cli", "quantize", "-o", "x", "--method", "nf44"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("lutserve: error: unknown method 'nf44'") and done.stderr.count("\n") == 1
