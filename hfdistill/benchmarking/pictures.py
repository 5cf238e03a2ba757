"""The picture of a benchmark: time of a step against the bare loop, and peak memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .jobs import CANDIDATES, DEFAULT, KEPT
from .measuring import ratio
from .tables import REFERENCE, TITLES


_OURS, _PEER, _PLAIN, _ALONE = "#0072B2", "#E69F00", "#7F7F7F", "#BBBBBB"  # Okabe and Ito's, and greys
_KINDS = {"hfdistill": _OURS, "another library": _PEER, "loop or subclass, distilling": _PLAIN, "student alone": _ALONE}
_ROW = 0.235


def plot_benchmark(results: Mapping[str, Any], path: str | os.PathLike) -> Path | None:
    """One PNG: a panel of bars for each workload and allocator mode, and for memory where it was measured.

    Args:
        results: as [`run_benchmark`](hfdistill.benchmarking.run.run_benchmark) returns them.
        path (`str`): of the PNG.

    Returns:
        `Path` or `None`: `None` where matplotlib is not installed (a line says so), or nothing was measured.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        print("No picture: matplotlib is not installed. Get it with: pip install 'hfdistill[plots]'")
        return None
    panels = _panels(results)
    if not panels:
        return None
    pairs = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    heights = [_ROW * max(len(values) for _, values, _ in pair) + 0.9 for pair in pairs]
    figure = Figure(figsize=(13.0, sum(heights) + 0.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pairs), 2, squeeze=False, height_ratios=heights).flatten()
    for axis, panel in zip(axes, panels):
        _draw(axis, *panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles = [Patch(color=colour, label=label) for label, colour in _KINDS.items()]
    figure.legend(handles=handles, loc="outside upper center", frameon=False, ncols=len(handles), fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _panels(results: Mapping[str, Any]) -> list[tuple[str, dict[str, float], str]]:
    """Title, value by candidate, and what the axis shows."""
    panels = []
    for name, entry in results["workloads"].items():
        for allocator in (DEFAULT, KEPT):
            times = entry["allocators"].get(allocator, {}).get("times", {})
            if REFERENCE in times:
                values = {one: ratio(times, one, REFERENCE) for one in CANDIDATES if one in times}
                panels.append((f"{name}, {allocator} allocator", values, "time of a step (bare loop = 1)"))
    for name, entry in results["workloads"].items():
        memory = {one: value for one, value in entry.get("memory_mb", {}).items() if isinstance(value, (int, float))}
        if memory:
            memory = {one: memory[one] for one in CANDIDATES if one in memory}
            panels.append((f"{name}, memory", memory, "peak of a step above its start (MB)"))
    return panels


def _colour(name: str) -> str:
    candidate = CANDIDATES[name]
    if candidate.peer:
        return _PEER
    if candidate.title.startswith("hfdistill"):
        return _OURS
    return _ALONE if candidate.objective == "alone" else _PLAIN


def _draw(axis, title: str, values: Mapping[str, float], label: str) -> None:
    names = list(values)
    rows = range(len(names))
    axis.barh(rows, list(values.values()), color=[_colour(name) for name in names], height=0.68, zorder=2)
    for row, value in zip(rows, values.values()):
        axis.annotate(f"{value:.2f}" if "time" in label else f"{value:,.0f}", (value, row), xytext=(3, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    if "time" in label:
        axis.axvline(1.0, color="#333333", linestyle="--", linewidth=1.0, zorder=3)
    axis.set_yticks(list(rows), [TITLES[name] for name in names], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(values.values()))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(label, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
