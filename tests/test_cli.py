from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_llama


def lutserve(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lutserve.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **env})


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_importing_lutserve_imports_nothing_heavy() -> None:
    loaded = modules_after("import lutserve")
    assert "lutserve" in loaded
    assert not loaded & {"torch", "vllm", "triton", "numpy", "pydantic", "transformers"}


def test_the_command_line_answers_without_torch() -> None:
    loaded = modules_after("import lutserve.cli")
    assert "typer" in loaded
    assert not loaded & {"torch", "vllm", "triton", "transformers"}


@pytest.mark.parametrize("command", [[], ["serve"], ["models"], ["doctor"], ["env"], ["eval"], ["bench"]])
def test_help(command: list[str]) -> None:
    done = lutserve(*command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        (["--method", "mix9"], {}, "unknown method 'mix9'; did you mean 'mix8'? allowed: none, mix8, int8"),
        (["--lut", "nli-5"], {}, "unknown look-up table 'nli-5'"),
        (["--lut", "nli-4", "--lut-sites", "exp"], {}, "unknown site 'exp' in --lut-sites"),
        (["--kv", "int1"], {}, "kv_cache_scheme='int1'"),
        (["--model", "smollm2-135n"], {}, "smollm2-135m"),
        (["--model", "./no/such/folder"], {}, "./no/such/folder"),
        (["--recipe", "no-such.json"], {}, "cannot read no-such.json"),
        (["one", "--model", "two"], {}, "two models: 'one' and --model 'two'"),
        (
            [],
            {"LUTSERVE_CASHE": "x"},
            "unknown environment variable LUTSERVE_CASHE; did you mean LUTSERVE_CACHE?",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(args: list[str], env: dict[str, str], message: str) -> None:
    done = lutserve("serve", *args, **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("lutserve: error: ") and done.stderr.count("\n") == 1


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = lutserve("serve", "--port", str(port))
    assert done.returncode == 2
    assert done.stderr == f"lutserve: error: port {port} on 127.0.0.1 is taken; choose another with --port\n"


def test_shapes_that_cannot_be_split_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    done = lutserve("serve", str(model), "--tensor-parallel-size", "3")
    assert done.returncode == 2
    assert "is not divisible by 3 tensor-parallel parts" in done.stderr
    done = lutserve("serve", str(model), "--dtype", "float32", "--lut", "nli-4")
    assert done.returncode == 2
    assert "--dtype float32: tables, int8 layers and 4-bit caches need a 16-bit model" in done.stderr


def test_models_that_cannot_take_a_recipe_are_refused(tmp_path: Path) -> None:
    config = tiny_llama(tmp_path / "model") / "config.json"
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"config_groups": {"q": {"targets": ["q_proj"], "method": "mix8"}}}))
    done = lutserve("serve", str(config.parent), "--recipe", str(split))
    assert done.returncode == 2
    assert "qkv_proj is one fused layer but its parts are given different groups" in done.stderr
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | {"quantization_config": {"quant_method": "awq"}}))
    done = lutserve("serve", str(config.parent), "--method", "mix8")
    assert done.returncode == 2
    assert "the model is already quantised (awq)" in done.stderr
    config.write_text("{")
    done = lutserve("serve", str(config.parent))
    assert done.returncode == 2
    assert "config.json is not JSON" in done.stderr


def test_a_recipe_with_a_wrong_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"lut": {"silu": "nli-4"}}))
    done = lutserve("serve", "--recipe", str(file))
    assert done.returncode == 2
    assert "unknown key 'lut'" in done.stderr


@pytest.mark.slow
def test_an_unknown_flag_reaches_vllm_which_refuses_it(tmp_path: Path) -> None:
    done = lutserve("serve", str(tiny_llama(tmp_path / "model")), "--no-such-flag", "1")
    assert done.returncode == 2
    assert "lutserve: error: unrecognized arguments: --no-such-flag" in done.stderr


@pytest.mark.slow
def test_a_value_that_vllm_refuses_is_a_short_error(tmp_path: Path) -> None:
    done = lutserve("serve", str(tiny_llama(tmp_path / "model")), "--max-model-len", "99999999")
    assert done.returncode == 2
    assert "lutserve: error: vLLM refuses this configuration" in done.stderr


def test_env_is_json() -> None:
    facts = json.loads(lutserve("env", "--json").stdout)
    assert facts["machine"]["cores"] >= 1
    assert "torch" in facts["versions"]


def test_doctor_tells_kernels_and_problems() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = lutserve("doctor", "--port", port)
    assert done.returncode == 1
    assert f"port {port} on 127.0.0.1 is taken" in done.stdout
    assert "op lutserve::act_and_mul: " in done.stdout


def test_models_lists_the_embedded_default() -> None:
    done = lutserve("models")
    assert done.returncode == 0
    assert "smollm2-135m" in done.stdout and "HuggingFaceTB/SmolLM2-135M-Instruct" in done.stdout


def test_a_torchvision_that_does_not_fit_torch_is_hidden() -> None:
    code = (
        "import sys, importlib.metadata as md, importlib.util\n"
        "md.version = lambda name: {'torch': '2.13.0+cpu', 'torchvision': sys.argv[1]}[name]\n"
        "import lutserve.torchvision_guard as guard\n"
        "guard.version = md.version\n"
        "guard.hide_broken_torchvision()\n"
        "print('torchvision' in sys.modules and importlib.util.find_spec('torchvision') is None)\n"
    )
    hidden = [
        subprocess.check_output([sys.executable, "-c", code, v], text=True) for v in ("0.28.0", "0.28.0+cpu")
    ]
    assert hidden == ["True\n", "False\n"]


def test_no_compiler_means_the_portable_path_and_a_warning(tmp_path: Path) -> None:
    code = "from lutserve.kernels import activation, library; print(library.backend_for('act_and_mul'))"
    env = {**os.environ, "CXX": "no-such-compiler", "LUTSERVE_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "reference\n"
    assert "cannot run the C++ compiler no-such-compiler" in done.stderr
