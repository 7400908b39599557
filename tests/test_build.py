"""Instruction-set levels, compilation, its cache, and what happens where there is no compiler."""

import itertools
import logging
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lutserve.errors import UserError
from lutserve.kernels import build, isa, library

FLAGS = {name: frozenset(level.needs) for name, level in isa.LEVELS.items()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no variable of the user's in the way."""
    for name in ("LUTSERVE_ISA", "LUTSERVE_BACKEND", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LUTSERVE_CACHE", str(tmp_path))
    return tmp_path


def fake_compiler(folder: Path, monkeypatch, body: str) -> Path:
    """Make CXX a script that answers --version and else runs `body`; returns the log of its compilations."""
    script, log = folder / "cxx", folder / "log"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo fake 1 && exit 0\necho run >> {log}\n'
        f'while [ "$1" != -o ]; do shift; done\nout=$2\n{body}\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    return log


# --- instruction-set levels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", isa.LEVELS)
def test_detect_takes_the_best_level(name, monkeypatch):
    monkeypatch.delenv("LUTSERVE_ISA", raising=False)
    monkeypatch.setattr(isa, "cpu_flags", lambda: FLAGS[name])
    assert isa.detect().name == name


def test_levels_are_nested_best_first():
    needs = list(FLAGS.values())
    assert all(worse < better for better, worse in itertools.pairwise(needs))


def test_one_missing_flag_is_named(monkeypatch):
    monkeypatch.setattr(isa, "cpu_flags", lambda: FLAGS["avx512_bf16"] - {"avx512_vnni"})
    monkeypatch.setenv("LUTSERVE_ISA", "avx512_bf16")
    with pytest.raises(UserError, match=r"lacks avx512_vnni; the best level here is avx512$"):
        isa.detect()
    monkeypatch.setenv("LUTSERVE_ISA", "avx2")
    assert isa.detect() is isa.AVX2


def test_unknown_level(monkeypatch):
    monkeypatch.setenv("LUTSERVE_ISA", "avx3")
    with pytest.raises(UserError, match="avx512_bf16"):
        isa.detect()


def test_cpu_flags_are_the_ones_torch_sees():
    flags = isa.cpu_flags()
    if not flags:
        pytest.skip("no flags in /proc/cpuinfo")
    assert ("avx2" in flags) == torch.cpu._is_avx2_supported()
    assert ("avx512f" in flags) == torch.cpu._is_avx512_supported()


# --- compilation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", isa.LEVELS)
def test_every_level_compiles(name):
    """Also those that this machine cannot run; into the user's own cache, where later tests find them."""
    if name != "portable" and os.uname().machine != "x86_64":
        pytest.skip("an x86-64 level")
    library = build.build(lambda message: None, isa.LEVELS[name])
    assert library.read_bytes()[:4] == b"\x7fELF"


def test_a_build_says_so_once_and_leaves_only_the_library(cache, monkeypatch, tmp_path):
    fake_compiler(tmp_path, monkeypatch, "echo library > $out")
    said = []
    library = build.build(said.append, isa.AVX2)
    assert library.is_relative_to(cache / "kernels")
    assert sorted(path.name for path in library.parent.iterdir()) == ["liblutserve.so", "lock"]
    assert "avx2" in said[0] and str(library) in said[1]
    assert build.build(said.append, isa.AVX2) == library
    assert len(said) == 2


def test_key_depends_on_what_shapes_the_library(cache, monkeypatch, tmp_path):
    fake_compiler(tmp_path, monkeypatch, "touch $out")

    def path():
        return build.build(lambda message: None, isa.PORTABLE)

    first = path()
    assert path() == first
    assert build.build(lambda message: None, isa.AVX2) != first
    sources = tmp_path / "sources"
    sources.mkdir()
    for source in build.SOURCES.iterdir():
        (sources / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "SOURCES", sources)
    assert path() == first
    (sources / "vec.h").write_text("// changed")
    assert path() != first
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert len({first, path(), build.build(lambda message: None, isa.AVX2)}) == 3


def test_concurrent_builds_compile_once(cache, monkeypatch, tmp_path):
    log = fake_compiler(tmp_path, monkeypatch, "sleep 0.5; echo library > $out")
    found = []
    threads = [threading.Thread(target=lambda: found.append(build.build(lambda m: None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    # every source once, and the link
    assert log.read_text() == "run\n" * (len(list(build.SOURCES.glob("*.cpp"))) + 1)
    assert found[0].read_text() == "library\n"


def test_failed_compilation_leaves_no_library(cache, monkeypatch, tmp_path):
    fake_compiler(tmp_path, monkeypatch, "echo half > $out; echo 'error: no such thing' >&2; exit 1")
    with pytest.raises(build.BuildError, match="no such thing"):
        build.build(lambda message: None)
    assert not list(tmp_path.rglob("liblutserve.so"))


def test_no_compiler(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(build.BuildError, match="/nonexistent/c\\+\\+"):
        build.build(lambda message: None)


def test_cache_that_cannot_be_written(cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LUTSERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="cannot write the kernel cache"):
        build.build(lambda message: None)


# --- loading ------------------------------------------------------------------------------------------------


def test_auto_falls_back_with_one_warning(cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with caplog.at_level(logging.WARNING, logger="vllm.lutserve.kernels"):
        assert library.load.__wrapped__() == "reference"
    (record,) = caplog.records
    assert "/nonexistent/c++" in record.getMessage() and "slower" in record.getMessage()


def test_library_that_cannot_be_loaded_falls_back(cache, monkeypatch, tmp_path, caplog):
    fake_compiler(tmp_path, monkeypatch, "echo no library > $out")
    with caplog.at_level(logging.WARNING, logger="vllm.lutserve.kernels"):
        assert library.load.__wrapped__() == "reference"
    assert len(caplog.records) == 1


def test_cpu_backend_is_demanded(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("LUTSERVE_BACKEND", "cpu")
    with pytest.raises(UserError, match=r"LUTSERVE_BACKEND=cpu.*/nonexistent/c"):
        library.load.__wrapped__()


def test_reference_backend_compiles_nothing(cache, monkeypatch, tmp_path):
    log = fake_compiler(tmp_path, monkeypatch, "touch $out")
    monkeypatch.setenv("LUTSERVE_BACKEND", "reference")
    assert library.load.__wrapped__() == "reference"
    assert not log.exists()


def test_unknown_backend(cache, monkeypatch):
    monkeypatch.setenv("LUTSERVE_BACKEND", "gpu")
    with pytest.raises(UserError, match="auto, reference, cpu, triton"):
        library.load.__wrapped__()


def test_one_openmp_runtime():
    """The kernels run on torch's threads: loading them brings no other runtime into the process."""
    code = (
        "import torch\nfrom lutserve.kernels import activation, library\n"
        "def runtimes():\n"
        "    return {l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.rsplit('/', 1)[-1]}\n"
        "before = runtimes()\nassert library.load().startswith('cpu/')\n"
        "activation.act_and_mul(torch.ones(64, 8192).half(), torch.ones(65536).half())\n"
        "assert runtimes() == before, (before, runtimes())\n"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc/self/maps")
    environment = {**os.environ, "LUTSERVE_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tables_need_no_torch():
    code = (
        "import sys; import lutserve.luts; lutserve.luts.validate('nli-4'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
