"""The benchmark's plots, from what was measured and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from models import AXES
from suites import OURS, PLAIN, POWERS, SCALED, by_columns
from tables import PLACES, TITLES, Measured, Missing, picture

# Colours that people with colour blindness tell apart (Okabe & Ito), and markers besides.
STYLES = {
    "curvlinops": ("#0072B2", "o"),
    "curvlinops-for-pytorch": ("#D55E00", "s"),
    "backpack-for-pytorch": ("#009E73", "^"),
    "hessian-eigenthings": ("#CC79A7", "D"),
    "nngeometry": ("#E69F00", "v"),
    "kronfluence": ("#56B4E9", "P"),
}
CASE_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
INK = "#444444"


def draw(content: dict[str, Any], folder: Path) -> None:
    """Write a plot for each suite and device."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for device, suites in content["devices"].items():
            for suite, measured in suites.items():
                make = scaling if suite == "scaling" else dots
                figure = make(Measured(measured), f"{TITLES[suite]}, {PLACES[device]}")
                figure.savefig(
                    folder / picture(suite, device), dpi=150, metadata={"Software": None}
                )


def dots(measured: Measured, title: str) -> Figure:
    """Draw a panel for each model: a row for each case, and a dot for each library that has it."""
    height = 1.4 + 0.24 * len(measured.cases)
    figure = Figure(figsize=(3.4 * len(measured.problems), height), layout="constrained")
    panels = figure.subplots(1, len(measured.problems), sharey=True, squeeze=False)[0]
    handles = {}
    for axes, problem in zip(panels, measured.problems, strict=True):
        gradient = measured.cell(OURS, problem, "gradient")
        for position, what in enumerate(measured.cases):
            # ours last, on top
            for library in (*measured.peers, OURS):
                quartiles = measured.quartiles(library, problem, what)
                if isinstance(quartiles, Missing) or isinstance(gradient, Missing) or not gradient:
                    continue
                low, middle, high = (max(q / gradient, 1e-3) for q in quartiles)
                colour, marker = STYLES[library]
                axes.plot([low, high], [position] * 2, color=colour, linewidth=1)
                (handles[library],) = axes.plot(
                    middle, position, marker, color=colour, markersize=5, markeredgewidth=0
                )
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        axes.set_title(problem)
        axes.grid(axis="both", color="#eeeeee")
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(measured.cases)), measured.cases)
    panels[0].set_ylim(len(measured.cases) - 0.5, -0.5)
    figure.suptitle(title)
    for axes in panels:
        axes.set_xlabel("relative to the gradient")
    shown = [library for library in (OURS, *measured.peers) if library in handles]
    figure.legend(
        [handles[library] for library in shown],
        [measured.label(library) for library in shown],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def scaling(measured: Measured, title: str) -> Figure:
    """Draw a panel for each axis: a line for each case, dashed for peers."""
    names = [*AXES, "columns"]
    figure = Figure(figsize=(2.6 * len(names), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, name in zip(panels, names, strict=True):
        for library, line in ((OURS, "-"), *((peer, "--") for peer in measured.peers)):
            for what, colour in zip(SCALED, CASE_COLOURS, strict=True):
                x, y = curve(measured, name, library, what)
                if x:
                    label = f"{what}, {measured.label(library)}"
                    (handles[label],) = axes.plot(
                        x, y, line, color=colour, marker="o", markersize=3, linewidth=1.2
                    )
        values = sorted({float(x) for curve in axes.lines for x in curve.get_xdata()})
        decorate(axes, name, values)
    figure.suptitle(title)
    figure.supylabel("relative to the gradient")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    return figure


def curve(measured: Measured, axis: str, library: str, what: str) -> tuple[list[int], list[float]]:
    """Return the values of an axis that a library has, and its ratios there."""
    if axis == "columns":
        powers = POWERS if what in PLAIN else []
        points = [("columns", by_columns(what, k), k) for k in powers]
        points = [point for point in points if point[1] in measured.cases]
    else:
        problems = [p for p in measured.problems if p.startswith(f"{axis} ")]
        points = [(p, what, int(p.split()[1])) for p in problems]
    found = [(value, measured.relative(library, p, case)) for p, case, value in points]
    known = [(value, cell) for value, cell in found if not isinstance(cell, Missing)]
    return [value for value, _ in known], [cell for _, cell in known]


def decorate(axes: Axes, name: str, values: list[float]) -> None:
    """Set up a panel of the scaling plot, with the values that were measured as ticks."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [f"{value:.0f}" for value in values])
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes.set_xlabel("number of columns" if name == "columns" else name)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
