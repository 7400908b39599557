"""Pictures of `lutserve formats analyse`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from lutserve import figure

#: degrees of freedom of the density behind the formats' values, and where the largest value lies on it
_NU, _END = 5, 4.0


def draw(analysis: dict[str, Any], folder: Path) -> list[Path]:
    """Draw an analysis (`report.analyse`) into a folder and return the files."""
    figure.folder(folder)
    pictures = {"values": _values, "shapes": _shapes, "sf4": _sweep, "apot": _apot, "pareto": _pareto}
    files = []
    for name, picture in pictures.items():
        files.append(folder / f"{name}.png")
        figure.save(picture(analysis), files[-1])
    return files


def _values(analysis: dict[str, Any]) -> Any:
    """The values of every format on one axis, under the density that they have to cover."""
    rows = analysis["formats"]
    drawing = figure.new(10, 2 + 0.25 * len(rows))
    axes = drawing.subplots()
    x = np.linspace(-1, 1, 400)
    density = t.pdf(x * _END, _NU)
    axes.fill_between(x, len(rows) + 4 * density / density.max(), len(rows), alpha=0.3)
    for place, row in enumerate(reversed(rows)):
        axes.plot(row["shape"], [place] * len(row["shape"]), "o", markersize=4)
    axes.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    axes.set_xlabel(f"value over the largest; above, Student's t, nu = {_NU}")
    return drawing


def _shapes(analysis: dict[str, Any]) -> Any:
    """Values by their place in the list."""
    drawing = figure.new(9, 7)
    axes = drawing.subplots()
    for number, row in enumerate(analysis["formats"]):
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        places = np.linspace(0, 1, len(row["shape"]))
        axes.plot(places, row["shape"], style, marker=".", label=row["name"])
    axes.set_xlabel("place in the list")
    axes.set_ylabel("value over the largest")
    axes.legend(fontsize="small", ncols=2)
    return drawing


def _sweep(analysis: dict[str, Any]) -> Any:
    """SQNR of SF4 by nu; NF4 as a line."""
    *rows, normal = analysis["sf4"]
    drawing = figure.new(8, 5)
    axes = drawing.subplots()
    for number, data in enumerate(normal["sqnr_db"]):
        values = [row["sqnr_db"][data]["g128"] for row in rows]
        axes.semilogx([row["nu"] for row in rows], values, marker=".", color=f"C{number}", label=data)
        axes.axhline(normal["sqnr_db"][data]["g128"], color=f"C{number}", linestyle=":")
    axes.set_xlabel("degrees of freedom of SF4; dotted: NF4")
    axes.set_ylabel("SQNR in dB, groups of 128")
    axes.legend(title="data")
    return drawing


def _apot(analysis: dict[str, Any]) -> Any:
    """Every APoT family's magnitudes beside SF4's."""
    drawing = figure.new(8, 6)
    axes = drawing.subplots()
    for row in analysis["apot"]:
        magnitudes = [value for value in row["values"] if value >= 0]
        places = np.linspace(0, 1, len(magnitudes))
        strong = row["known_as"] is not None
        label = f"{row['known_as']}: {row['name']}" if strong else None
        axes.plot(places, magnitudes, color="C0" if strong else "0.75", zorder=2 + strong, label=label)
    for row in analysis["formats"]:
        if row["name"] == "sf4_5":
            magnitudes = [value for value in row["shape"] if value >= 0]
            axes.plot(np.linspace(0, 1, len(magnitudes)), magnitudes, "C1--", label="sf4_5", zorder=4)
    axes.set_xlabel("place among the magnitudes")
    axes.set_ylabel("value over the largest")
    axes.legend()
    return drawing


def _pareto(analysis: dict[str, Any]) -> Any:
    """Accuracy against MAC area, the front as a line; formats without a MAC at the left edge."""
    comparisons = analysis["pareto"]
    rows = -(-len(comparisons) // 3)
    drawing = figure.new(12, 3.5 * rows)
    for place, comparison in enumerate(comparisons, 1):
        axes = drawing.add_subplot(rows, 3, place)
        points = {point["format"]: point for point in comparison["points"]}
        for name, point in points.items():
            if point["area"] is None:
                axes.axhline(point["score"], color="0.6", linestyle=":")
                left = {"xy": (0, point["score"]), "xycoords": ("axes fraction", "data")}
                axes.annotate(name, **left, fontsize="x-small")
            else:
                axes.plot(point["area"], point["score"], "o", color="C0", markersize=4)
                axes.annotate(name, (point["area"], point["score"]), fontsize="x-small")
        front = [points[name] for name in comparison["front"]]
        axes.step([p["area"] for p in front], [p["score"] for p in front], "C1", where="post")
        axes.set_title(comparison["name"], fontsize="small", wrap=True)
        axes.set_ylabel(comparison["score"], fontsize="x-small")
        axes.set_xlabel("MAC area, µm² (28 nm)", fontsize="x-small")
    return drawing
