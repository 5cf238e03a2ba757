"""Pictures of many trainings: methods beside each other, and a metric against what a sweep has changed."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .plots import COLOURS


_OWN, _OTHER = "#0072B2", "#56B4E9"
_LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D31", "#7F7F7F")
_COSTS = {"step_seconds": "seconds a step", "memory_mb": "memory of three steps (MB)"}
_MARKERS = "osD^v<>P"


def plot_methods(outcome: Mapping[str, Any], path: str | os.PathLike) -> Path | None:
    """One PNG of a comparison of methods: the metric of each with its spread, from the best down, seconds of a step, and memory.

    Dashed lines are the teacher and the student alone. Panels of what was not measured are left out.

    Args:
        outcome (`dict`): as [`compare_methods`](hfdistill.method_comparison.compare_methods) returns it.
        path (`str`): of the PNG.

    Returns:
        `Path` or `None`: `None` where matplotlib is not installed; a line says so.
    """
    entries = sorted(outcome["methods"].items(), key=lambda item: -item[1]["value"]["mean"])
    panels = {key: label for key, label in _COSTS.items() if any(entry.get(key) is not None for _, entry in entries)}
    figure = _figure(6.8 + 2.4 * len(panels), 0.3 * len(entries) + 1.7)
    if figure is None:
        return None
    axes = figure.subplots(1, 1 + len(panels), sharey=True, width_ratios=(2.2, *[1] * len(panels)), squeeze=False)[0]
    rows, values = range(len(entries)), [entry["value"] for _, entry in entries]
    colours = [_OWN if name == outcome["reference"] else _OTHER for name, _ in entries]
    axis = axes[0]
    for row, value, colour in zip(rows, values, colours):
        axis.errorbar(value["mean"], row, xerr=value["std"] or None, fmt="o", color=colour, markersize=7, capsize=3, zorder=3)
        if len(value["values"]) > 1:
            axis.plot(value["values"], [row] * len(value["values"]), ".", color="#333333", markersize=4, alpha=0.7, zorder=4)
    references = {"teacher": outcome["teacher"], "student_alone": outcome["alone"] and outcome["alone"]["value"]["mean"]}
    for (key, value), label in zip(references.items(), ("teacher", "student alone")):
        if value is not None:
            axis.axvline(value, color=COLOURS[key], linestyle="--", linewidth=1.2, zorder=1, label=f"{label}  {value:.3f}")
    axis.set_yticks(list(rows), [f"{name}  {value['mean']:.3f}" for (name, _), value in zip(entries, values)])
    axis.set_ylim(len(entries) - 0.4, -0.6)
    metric, seeds = outcome["metric"].replace("_", " "), len(outcome["seeds"])
    axis.set_xlabel(f"{metric} (mean ± sd of {seeds} seeds; dots: seeds)" if seeds > 1 else metric)
    _tidy(axis)
    for own, (key, label) in zip(axes[1:], panels.items()):
        alone = (outcome["alone"] or {}).get(key)
        for row, (_, entry), colour in zip(rows, entries, colours):
            if (cost := entry.get(key)) is not None:
                own.barh(row, cost, color=colour, height=0.6, zorder=2)
                place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
                own.annotate(f"{cost:.3g}", (cost, row), **place)
        if alone is not None:
            own.axvline(alone, color=COLOURS["student_alone"], linestyle="--", linewidth=1.2, zorder=3)
        own.set_xlim(0, 1.22 * max(entry[key] for _, entry in entries if entry.get(key) is not None))
        own.set_xlabel(label)
        own.tick_params(axis="y", length=0)
        _tidy(own)
    figure.legend(loc="outside upper right", frameon=False, ncols=2, fontsize=9)
    return _save(figure, path)


def plot_sweep(outcome: Mapping[str, Any], path: str | os.PathLike) -> Path | None:
    """One PNG of a sweep: the metric against the setting that comes first (temperature, where it was swept).

    A grid has one line for each combination of the other settings, with the standard deviation over seeds; single trials of a
    sampler are points.

    Args:
        outcome (`dict`): as [`run_sweep`](hfdistill.sweep.run_sweep) returns it.
        path (`str`): of the PNG.

    Returns:
        `Path` or `None`: `None` where matplotlib is not installed (a line says so), and where nothing that was swept is a number.
    """
    points = outcome["points"]
    names = sorted((name for name in outcome["space"] if _numeric(points, name)), key=lambda name: name.split(".")[-1] != "temperature")
    figure = _figure(7.0, 4.4) if names else None
    if figure is None:
        return None
    axis, name, grid = figure.subplots(), names[0], outcome["kind"] == "grid"
    lines: dict[str, list[Mapping]] = {}
    for point in points:
        others = {key: value for key, value in point["settings"].items() if key != name}
        label = ", ".join(f"{_words(key)} {_short(value)}" for key, value in others.items()) if grid else "trials"
        lines.setdefault(label, []).append(point)
    ticks = sorted({point["settings"][name] for point in points})
    logarithmic = ticks[0] > 0 and ticks[-1] >= 4 * ticks[0]
    for number, ((label, own), colour) in enumerate(zip(lines.items(), itertools.cycle(_LINES))):
        own = sorted(own, key=lambda point: point["settings"][name])
        shift = 0.012 * (number - (len(lines) - 1) / 2)  # side by side, or the spread of one would hide that of another
        xs = [point["settings"][name] for point in own]
        xs = [x * (ticks[-1] / ticks[0]) ** shift if logarithmic else x + shift * (ticks[-1] - ticks[0]) for x in xs]
        ys, spread = [point["value"]["mean"] for point in own], [point["value"]["std"] for point in own]
        style = {"fmt": f"{_MARKERS[number % len(_MARKERS)]}{'-' if grid else ''}", "markersize": 6, "capsize": 3, "linewidth": 1.4}
        axis.errorbar(xs, ys, yerr=spread if any(spread) else None, color=colour, label=label, zorder=3, **style)
    if logarithmic:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if grid and len(ticks) <= 12:
        axis.set_xticks(ticks)
        axis.minorticks_off()
    seeds, metric = outcome["seeds"], outcome["metric"].replace("_", " ")
    spread = f" (mean ± sd of {len(seeds)} seeds)" if grid and len(seeds) > 1 else ""
    axis.set_xlabel(_words(name))
    axis.set_ylabel(f"{metric} on validation data{spread}")
    _tidy(axis)
    if len(lines) > 1:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return _save(figure, path)


def _numeric(points, name: str) -> bool:
    values = [point["settings"][name] for point in points]
    return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figure(width: float, height: float):
    """A figure of its own with its own canvas, which leaves the user's pyplot alone; `None` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture: matplotlib is not installed. Get it with: pip install 'hfdistill[plots]'")
        return None
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axis) -> None:
    axis.grid(True, alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure, path: str | os.PathLike) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
