"""`lutserve formats analyse` and `lutserve formats hardware`: everything in one object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lutserve import formats, machine
from lutserve.analysis import families, mac, pareto, synthesis
from lutserve.analysis.published import MACS, SWEEP, SWEEP_MODELS
from lutserve.errors import UserError
from lutserve.formats import Codebook

SCHEMA = "lutserve-formats-1"
HARDWARE_SCHEMA = "lutserve-hardware-1"


def analyse(records: Sequence[Path] = ()) -> dict[str, Any]:
    """Compare the formats.

    Args:
        records: of `lutserve.benchmarks.quantizers`, whose W4A4 cells join the published accuracies.

    Returns:
        formats: every listed one of at most 4 bits, with shape and SQNR. sf4: SQNR by degrees of freedom.
        apot: the family. published_sf4: the paper's LAMBADA results by degrees of freedom. pareto: accuracy
        against MAC area. made_with: machine and versions.

    """
    own = [pareto.own(record) for record in records]
    listed = [book for book in map(formats.get, formats.NAMES) if len(book.values) <= formats.TABLE]
    return {
        "schema": SCHEMA,
        "made_with": machine.collect(),
        "formats": [
            book.to_json() | {"shape": families.shape(book), "sqnr_db": families.errors(book)}
            for book in listed
        ],
        "sf4": families.sweep(),
        "published_sf4": {"models": SWEEP_MODELS, "lambada_perplexity_and_accuracy": SWEEP},
        "apot": families.apot(),
        "pareto": [comparison.to_json() for comparison in (*own, *pareto.published())],
    }


def hardware(
    books: Iterable[Codebook], yosys: list[str] | None, done: Callable[[str], None] = lambda name: None
) -> dict[str, Any]:
    """Published and synthesised MAC units of formats.

    Args:
        books: the formats; those that are not published have an estimate only.
        yosys: the command (`synthesis.find`), None for no synthesis.
        done: told the name of each format that is done.

    Returns:
        yosys: its version, or None. units: for each format bits, the accumulator's bits and the chip overhead
        by formula, published (areas in square micrometres, or None) and synthesised (NAND2, or None).

    """
    units = []
    for book in books:
        known = MACS.get(book.name)
        made = synthesis.synthesise(book, yosys) if yosys else None
        units.append(
            {
                "format": book.name,
                "bits": book.bits,
                "accumulator_bits_by_formula": mac.accumulator_bits(book),
                "overhead_by_formula": known
                and round(mac.overhead(known.area, MACS["int4"].area, book.bits), 2),
                "published": known and asdict(known) | {"area": round(known.area, 1)},
                "synthesised": made and asdict(made) | {"nand2": made.nand2},
            }
        )
        done(book.name)
    return {
        "schema": HARDWARE_SCHEMA,
        "made_with": machine.collect(),
        "yosys": synthesis.version(yosys) if yosys else None,
        "units": units,
    }


def write_verilog(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write <format>.sv of every unit in a result of `hardware`: the smallest multiplier and the accumulator.

    UserError if the folder or a file cannot be written.
    """
    files = []
    for unit in found["units"]:
        book = formats.get(unit["format"])
        way = unit["synthesised"]["way"] if unit["synthesised"] else "signed"
        files.append(folder / f"{book.name}.sv")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files[-1].write_text(f"{mac.multiplier(book, way)}\n{mac.accumulator(book)}")
        except OSError as error:
            raise UserError(f"cannot write {files[-1]}: {error.strerror}") from None
    return files
