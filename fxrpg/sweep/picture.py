"""The picture of a sweep: test error against degrees of freedom, both logarithmic, where a power law is a straight line."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fxrpg.sweep.outcome import Outcome, points, shown


@dataclass(frozen=True)
class Palette:
    """Colours for a light or a dark page."""

    paper: str
    ink: str
    grid: str
    runs: str
    law: str
    dense: str


LIGHT = Palette(paper="#ffffff", ink="#1c2733", grid="#dbe1e8", runs="#0b63ce", law="#c2410c", dense="#5b6b7b")
DARK = Palette(paper="#161d26", ink="#e4eaf1", grid="#303b48", runs="#6cb0ff", law="#ffa15c", dense="#9aa9b8")
WIDE, NARROW = (8.0, 4.6), (3.4, 4.2)
"""Inches."""


def write_png(found: Outcome, title: str, path: Path) -> None:
    """The picture on white paper, as a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font does not have
        _figure(found, title, LIGHT, WIDE).savefig(path, dpi=150)


def svg_address(found: Outcome, palette: Palette, size: tuple[float, float]) -> str:
    """The picture without a title as a data: address, the same bytes for the same runs."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fxrpg", "svg.fonttype": "path"}):
        _figure(found, "", palette, size).savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(found: Outcome, title: str, palette: Palette, size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor=palette.paper)
    axes = figure.subplots()
    dofs = [size.dof for size in found.sizes if size.dof is not None]
    fraction = ", fraction of the weights" if any(isinstance(dof, float) for dof in dofs) else ""
    axes.set(xscale="log", yscale="log", xlabel=f"degrees of freedom{fraction}", ylabel="test error")
    axes.set(xlim=_limits(dofs), ylim=_limits(_heights(found)))
    figure.suptitle(title, color=palette.ink, parse_math=False)
    _draw_runs(axes, found, palette)
    _draw_dense(axes, found, palette)
    _draw_law(axes, found, palette)
    _label_axes(axes, found, palette, size)
    columns = 2 if size == WIDE else 1
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, labelcolor=palette.ink, fontsize=9)
    return figure


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Where a logarithmic axis begins and ends: with some room about the values, be they one."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    room = max(1.3, (high / low) ** 0.08)
    return low / room, high * room


def _heights(found: Outcome) -> list[float]:
    """Every error that is drawn."""
    errors = [100 - accuracy for size in found.all for accuracy in size.accuracies]
    errors += [100 - size.mean + (size.std or 0) for size in found.all]
    limit = [100 - found.dense.mean + found.within] if found.dense else []
    return [max(error, _least_error(found)) for error in errors + limit]


def _draw_runs(axes: Any, found: Outcome, palette: Palette) -> None:
    """Every run as a faint dot, and the mean of each size with its standard deviation."""
    from matplotlib.patheffects import withStroke

    least = _least_error(found)
    for place, size in enumerate(found.sizes):
        errors = np.maximum(100 - np.array(size.accuracies), least)
        axes.plot([size.dof] * len(errors), errors, ".", color=palette.runs, alpha=0.45, markersize=5, zorder=2)
        mean, std = max(100 - size.mean, least), size.std or 0.0
        label = None if place else "mean and standard deviation over seeds"
        down = min(std, mean - least)
        axes.errorbar(size.dof, mean, [[down], [std]], fmt="o", color=palette.runs, capsize=4, label=label, zorder=3)
        halo = [withStroke(linewidth=3, foreground=palette.paper)]
        style = {"textcoords": "offset points", "color": palette.ink, "fontsize": 9, "zorder": 4, "path_effects": halo}
        axes.annotate(f"{100 - size.mean:.1f}%", (size.dof, mean), (8, 5), **style)


def _draw_dense(axes: Any, found: Outcome, palette: Palette) -> None:
    if found.dense is None:
        return
    error = max(100 - found.dense.mean, _least_error(found))
    axes.axhline(error, color=palette.dense, linewidth=1.5, label=f"dense: {100 - found.dense.mean:.2f}%", zorder=1)
    limit = 100 - found.dense.mean + found.within
    label = f"dense + {points(found.within)}"
    if found.within:
        axes.axhline(limit, color=palette.dense, linewidth=1, linestyle=":", label=label, zorder=1)


def _draw_law(axes: Any, found: Outcome, palette: Palette) -> None:
    if found.law is None:
        return
    x = np.array([size.dof for size in found.sizes if size.dof not in found.law.unused], dtype=float)
    label = f"{found.law.a:.3g}% · DoF$^{{{-found.law.b:.2f}}}$"
    axes.plot(x, found.law.a * x**-found.law.b, "--", color=palette.law, linewidth=1.5, label=label, zorder=1)


def _label_axes(axes: Any, found: Outcome, palette: Palette, size: tuple[float, float]) -> None:
    dofs = [size.dof for size in found.sizes if size.dof is not None]
    few = dofs if len(dofs) <= 6 else dofs[:: -(-len(dofs) // 6)]
    axes.set_xticks(few, [shown(dof) for dof in few], rotation=35 if size == NARROW else 0)
    low, high = axes.get_ylim()
    ticks = [digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5)]
    chosen = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(chosen, [f"{tick:g}%" for tick in chosen])
    axes.minorticks_off()
    axes.grid(color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor(palette.paper)
    axes.tick_params(colors=palette.ink, labelsize=9)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(palette.ink)
    for name, spine in axes.spines.items():
        spine.set_color(palette.grid)
        spine.set_visible(name in ("left", "bottom"))


def _least_error(found: Outcome) -> float:
    """Where a run without errors is drawn: a logarithmic axis has no zero."""
    errors = [100 - accuracy for size in found.all for accuracy in size.accuracies if accuracy < 100]
    return min(errors, default=1.0) / 2
