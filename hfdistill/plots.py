"""The picture of a run: what was gained against what it costs, and how the parts of the loss went down."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import BASELINE_NAMES, MODEL_NAMES
from .step_clock import PROFILE_NAMES


# Okabe and Ito's palette: distinct for colour-blind readers too.
COLOURS = {
    "teacher": "#333333",
    "student_alone": "#E69F00",
    "student_distilled": "#0072B2",
    "control": "#009E73",
    "tfidf_logreg": "#CC79A7",
}
_OTHER_COLOURS = ("#D55E00", "#56B4E9", "#8C6D31", "#7F7F7F")
_PART_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", *_OTHER_COLOURS)
_NOT_A_LOSS = {"loss", "step", "epoch", "grad_norm", "learning_rate", "total_flos", "num_input_tokens_seen", *PROFILE_NAMES}
_LOG_AXIS_FROM = 8.0
_LINE_HEIGHT = 0.075  # of the panel: the least distance between two labels


def plot_results(
    results: Mapping[str, Any], path: str | os.PathLike, log_history: Sequence[Mapping[str, Any]] | None = None
) -> Path | None:
    """One PNG with two panels: the metric against the size of the model, and the parts of the loss over the steps.

    Baselines without a size (TF-IDF) are horizontal lines. The axis of sizes is logarithmic where the largest model is at
    least 8 times the smallest. Of the loss parts the weighted values are drawn where they were logged: they add up to the loss.

    Args:
        results (`dict`): as [`write_results`](hfdistill.report.write_results) takes them.
        path (`str`): of the PNG.
        log_history (`list[dict]`, *optional*): `trainer.state.log_history` of the distilled student. Without it there is one panel.

    Returns:
        `Path` or `None`: `None` where matplotlib is not installed; a line says so, and the run goes on.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture of the results: matplotlib is not installed. Get it with: pip install 'hfdistill[plots]'")
        return None
    steps = [entry for entry in log_history or [] if "loss" in entry and "step" in entry]
    # A figure of its own with its own canvas leaves the user's pyplot and its backend alone.
    figure = Figure(figsize=(11.5 if steps else 6.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if steps else 1, squeeze=False)[0]
    _draw_sizes(axes[0], results)
    if steps:
        last = f", stage {results['stages'][-1]['name']!r}" if results.get("stages") else ""  # its log is that of the last stage
        _draw_losses(axes[1], steps, f"Loss parts of the distilled student{last}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _points(results: Mapping[str, Any]) -> list[tuple[str, str, float | None, float, float]]:
    """Key, label, size (`None` without one), metric and its standard deviation of everything that was measured."""
    metric = results["metric"]
    entries = {key: results[key] for key in MODEL_NAMES if results.get(key) is not None}
    names = {**MODEL_NAMES, **{key: BASELINE_NAMES.get(key, key) for key in results["baselines"]}}
    for key, entry in results["baselines"].items():
        entries[key] = entry if isinstance(entry, Mapping) and "mean" not in entry else {metric: entry}
    if "control" in entries and "size_mb" not in entries["control"]:  # it is the same student
        entries["control"] = {**entries["control"], "size_mb": results["student_distilled"]["size_mb"]}
    points = []
    for key, entry in entries.items():
        value = entry.get(metric)
        if value is not None:
            mean, deviation = (value["mean"], value["std"]) if isinstance(value, Mapping) else (value, 0.0)
            points.append((key, names[key].split(":")[0], entry.get("size_mb"), mean, deviation))
    return points


def _draw_sizes(axis, results: Mapping[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    from matplotlib.transforms import blended_transform_factory

    points = _points(results)
    sizes = [point[2] for point in points if point[2] is not None]
    values = [edge for *_, mean, deviation in points for edge in (mean - deviation, mean + deviation)]
    span = max(max(values) - min(values), 1e-3)
    axis.set_ylim(min(values) - 0.12 * span, max(values) + 0.12 * span)
    if max(sizes) >= _LOG_AXIS_FROM * min(sizes):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(min(sizes) / 2, max(sizes) * 2)
    else:
        pad = max(max(sizes) - min(sizes), 0.2 * max(sizes))
        axis.set_xlim(max(min(sizes) - 0.35 * pad, 0), max(sizes) + 0.35 * pad)
    to_panel = axis.transData + axis.transAxes.inverted()
    beside = blended_transform_factory(axis.transAxes, axis.transData)
    middle = sum(to_panel.transform((size, 0))[0] for size in (min(sizes), max(sizes))) / 2
    colours = _colours([key for key, *_ in points])
    lines, labels, taken = [], [], Counter()
    for key, label, size, mean, deviation in points:
        if size is None:
            axis.axhline(mean, color=colours[key], linestyle="--", linewidth=1.2, zorder=1)
            lines.append((key, label, mean))
            continue
        x, y = to_panel.transform((size, mean))
        x += 0.014 * taken[size]  # students of one size stand side by side, or one would hide the other
        taken[size] += 1
        axis.errorbar(x, mean, yerr=deviation or None, fmt="o", color=colours[key], markersize=7, capsize=3, zorder=3, transform=beside)
        labels.append((key, f"{label}  {mean:.3f}", x, y, 1 if x <= middle + 0.05 else -1))
    for (key, text, x, y, towards), free in zip(labels, _spread([label[3] for label in labels]), strict=True):
        axis.annotate(
            text, xy=(x, y), xytext=(x + 0.075 * towards, free), xycoords="axes fraction", textcoords="axes fraction",
            ha="left" if towards > 0 else "right", va="center", fontsize=9, color=colours[key], zorder=4,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            arrowprops={"arrowstyle": "-", "color": colours[key], "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5},
        )  # fmt: skip
    if lines:
        handles = [axis.plot([], [], "--", color=colours[key], label=f"{label}  {mean:.3f}")[0] for key, label, mean in lines]
        axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=9, ncols=min(len(handles), 2))
    metric, seeds = results["metric"].replace("_", " "), len(results["seeds"])
    axis.set_xlabel("size on disk (MB)")
    axis.set_ylabel(f"{metric} (students: mean ± sd of {seeds} seeds)" if seeds > 1 else metric)
    axis.set_title("What distillation bought", fontsize=11)
    _tidy(axis)


def _draw_losses(axis, steps: Sequence[Mapping[str, Any]], title: str) -> None:
    parts = list(dict.fromkeys(key for entry in steps for key in entry if key.endswith("_weighted")))
    weighted = bool(parts)
    if not weighted:
        numbers = (key for entry in steps for key, value in entry.items() if isinstance(value, (int, float)))
        parts = list(dict.fromkeys(key for key in numbers if key not in _NOT_A_LOSS and not key.startswith("eval_")))
    axis.plot([e["step"] for e in steps], [e["loss"] for e in steps], color="#333333", linewidth=2, label="loss", marker=_marker(steps))
    for part, colour in zip(parts, itertools.cycle(_PART_COLOURS)):
        drawn = [(entry["step"], entry[part]) for entry in steps if part in entry]
        name = part.removesuffix("_weighted").replace("_", " ")
        label = f"{name} × weight" if weighted else name
        axis.plot(*zip(*drawn, strict=True), color=colour, linewidth=1.5, label=label, marker=_marker(drawn))
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss (mean per row)")
    axis.set_title(title, fontsize=11)
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    axis.legend(frameon=False, fontsize=9)
    _tidy(axis)


def _marker(drawn: Sequence) -> str | None:
    return "o" if len(drawn) < 3 else None


def _colours(keys: Sequence[str]) -> dict[str, str]:
    others = itertools.cycle(_OTHER_COLOURS)
    return {key: COLOURS.get(key) or next(others) for key in keys}


def _spread(heights: Sequence[float]) -> list[float]:
    """The same heights, in the same order, moved apart to at least a line and kept inside the panel."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = [heights[i] for i in order]
    for _ in range(200):  # neighbours push each other apart by equal shares, and the edges of the panel push back
        for low in range(len(placed) - 1):
            missing = _LINE_HEIGHT - (placed[low + 1] - placed[low])
            if missing > 0:
                placed[low] -= missing / 2
                placed[low + 1] += missing / 2
        placed = [min(max(y, 0.04), 0.96) for y in placed]
    result = list(heights)
    for place, i in zip(placed, order, strict=True):
        result[i] = place
    return result


def _tidy(axis) -> None:
    axis.grid(True, alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def plot_variants(outcome: Mapping[str, Any], path: str | os.PathLike) -> Path | None:
    """One PNG of an ablation: a bar a variant (mean over seeds, one dot a seed), lines for the teacher and the student alone.

    Args:
        outcome (`dict`): as [`run_ablation`](hfdistill.ablation.run_ablation) returns it.
        path (`str`): of the PNG.

    Returns:
        `Path` or `None`: `None` where matplotlib is not installed; a line says so.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture of the ablation: matplotlib is not installed. Get it with: pip install 'hfdistill[plots]'")
        return None
    names, values = list(outcome["variants"]), list(outcome["variants"].values())
    figure = Figure(figsize=(8.0, 0.42 * len(names) + 1.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    rows = range(len(names))
    colours = [COLOURS["student_distilled"], *[_OTHER_COLOURS[1]] * (len(names) - 1)]
    axis.barh(rows, [value["mean"] for value in values], color=colours, height=0.62, zorder=2)
    for row, value in zip(rows, values):
        axis.plot(value["values"], [row] * len(value["values"]), "o", color="#333333", markersize=3.5, zorder=4)
    references = {"teacher": outcome["teacher"], "student_alone": outcome["alone"] and outcome["alone"]["mean"]}
    for key, value in references.items():
        if value is not None:
            label = f"{MODEL_NAMES[key]}  {value:.3f}"
            axis.axvline(value, color=COLOURS[key], linestyle="--", linewidth=1.2, zorder=3, label=label)
    everything = [edge for value in values for edge in value["values"]] + [value for value in references.values() if value is not None]
    span = max(max(everything) - min(everything), 1e-3)
    axis.set_xlim(max(min(everything) - 0.25 * span, 0), max(everything) + 0.08 * span)
    axis.set_yticks(list(rows), [f"{name}  {value['mean']:.3f}" for name, value in zip(names, values)])
    axis.invert_yaxis()
    axis.set_xlabel(f"{outcome['metric'].replace('_', ' ')} (the axis does not start at 0); dots: seeds {outcome['seeds']}")
    axis.grid(axis="x", color="#DDDDDD", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", frameon=False, ncols=2, fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
