"""Compile the kernels ahead of time, with no GPU and no driver, and read what they use from the machine code.

    python -m lutserve.kernels.gpu.aot [docs/gpu.md]

rewrites the table of resources between the two marks of that page.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lutserve.kernels.gpu.catalogue import KERNELS, Kernel

BEGIN, END = "<!-- made by python -m lutserve.kernels.gpu.aot -->", "<!-- end -->"
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_MMA = ("HGMMA", "IGMMA", "HMMA", "IMMA")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses: registers a thread, bytes of stack and of shared memory, opcodes."""

    registers: int
    stack: int
    shared: int
    opcodes: Counter[str]
    ptx: str

    @property
    def mma(self) -> str:
        """The tensor-core instruction in the machine code, or nothing."""
        return next((name for name in _MMA if self.opcodes[name]), "")

    @property
    def spills(self) -> int:
        """Loads and stores of spilled registers."""
        return self.opcodes["LDL"] + self.opcodes["STL"]


def compile_for(kernel: Kernel, architecture: int) -> Resources:
    """Compile for sm_<architecture>, 80 or 90."""
    names = kernel.function.arg_names
    signature = {name: kernel.arguments.get(name, "constexpr").partition(":")[0] for name in names}
    aligned = [i for i, name in enumerate(names) if kernel.arguments.get(name, "").endswith(":16")]
    source = ASTSource(
        fn=kernel.function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in kernel.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {
        "num_warps": kernel.warps,
        "num_stages": kernel.stages,
        "enable_fp_fusion": kernel.fusion,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _dump("-res-usage", cubin.name)
        code = _dump("-sass", cubin.name)
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    opcodes = Counter(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code, re.MULTILINE)
    )
    return Resources(
        int(found["REG"]), int(found["STACK"]), compiled.metadata.shared, opcodes, compiled.asm["ptx"]
    )


def _dump(what: str, cubin: str) -> str:
    done = subprocess.run([_CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def compile_all() -> dict[tuple[Kernel, int], Resources]:
    """Compile every kernel of the catalogue for each of its architectures."""
    return {(kernel, sm): compile_for(kernel, sm) for kernel in KERNELS for sm in kernel.architectures}


def table(compiled: Mapping[tuple[Kernel, int], Resources]) -> Iterator[str]:
    """Yield the lines of the table of resources."""
    yield "| kernel | architecture | registers | shared, KiB | spills | tensor cores | instructions |"
    yield "|---|---|---|---|---|---|---|"
    for (kernel, architecture), used in compiled.items():
        yield (
            f"| {kernel.name} | sm_{architecture} | {used.registers} | {used.shared / 1024:.0f} | "
            f"{used.spills} | {used.mma or '-'} | {used.opcodes.total()} |"
        )


def update(page: Path) -> None:
    """Put the table between the two marks of the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text("\n".join((before + BEGIN, "", *table(compile_all()), "", END + after)))


if __name__ == "__main__":
    update(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/gpu.md"))
