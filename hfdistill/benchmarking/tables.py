"""Results as Markdown: what was measured where, one table a workload, growth, and the targets."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..report import results_table
from .jobs import CANDIDATES, DEFAULT, KEPT
from .measuring import SAME_GRADIENT, SAME_LOSS, ratio
from .targets import judge


REFERENCE = "bare"
TITLES = {name: candidate.title for name, candidate in CANDIDATES.items()}


def write_tables(results: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes the Markdown file of a benchmark."""
    path = Path(path)
    path.write_text(benchmark_text(results), encoding="utf-8")
    return path


def benchmark_text(results: Mapping[str, Any]) -> str:
    """The whole Markdown text.

    Args:
        results: as [`run_benchmark`](hfdistill.benchmarking.run.run_benchmark) returns them.
    """
    machine = results["machine"]
    blocks = [f"# Benchmark on {machine['gpu'] or machine['cpu']}", _about(results)]
    for name, entry in results["workloads"].items():
        if entry.get("allocators") or entry.get("memory_mb"):
            blocks += [f"## {name}: {entry.get('title', '')}".rstrip(": "), *_workload_blocks(results, entry)]
    if results.get("growth"):
        blocks += ["## Growth", _HOW_GROWTH, _growth(results)]
    if results.get("table_growth"):
        blocks += ["## Stored teacher: memory of a reader", results_table(_table_rows(results))]
    blocks += ["## Targets", _HOW_TARGETS, results_table(judge(results, TITLES))]
    if results.get("left_out"):
        blocks += ["## Left out", results_table([{"candidate": TITLES[n], "why": why} for n, why in results["left_out"].items()])]
    return "\n\n".join(blocks) + "\n"


_HOW_GROWTH = "How many times longer a step takes, and its time against the bare loop before and after."
_HOW_TARGETS = (
    "`here` is the median over rounds of the ratio of the two steps in the same round. `floor` is the arithmetic of our step (operations "
    "of the forward passes of both models, three of the student's for training) as a share of a plain step of the same student, times what "
    "the stock Trainer takes of the time of the other. Traffic of memory is no part of it: where that is saved, a figure can lie below."
)


def _about(results: Mapping[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    peers = ", ".join(f"{name} {version}" for name, version in results["peers"].items()) or "none installed"
    lines = [
        f"- {results['date']}, `{results['command']}`" if results.get("command") else f"- {results['date']}",
        f"- {machine['cores']} cores ({', '.join(machine['flags']) or 'no vector extensions known'}), {settings['threads']} threads, "
        f"{machine['system']}; matrix products {machine['float32_gflops']:,} GFLOP/s in fp32, {machine['bfloat16_gflops']:,} in bf16",
        "- " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        f"- peers: {peers}" + "".join(f"; {name} is absent ({why})" for name, why in results["absent"].items()),
        f"- sizes: {settings['size']}; {'bf16 autocast' if settings['bf16'] else 'fp32'} student, random weights, no dropout, gradients "
        "clipped, fused AdamW, for all alike",
        "- time: a step divided by that of the bare loop in the same round, median over rounds, candidates interleaved in one process; "
        "CPU time likewise. Peers are called without their progress bars, logs and checkpoints.",
        "- default: the allocator of glibc as it is. kept: after two calls of mallopt, so that freed memory is not given back to the "
        "system (`keep_memory_pages`).",
        "- same loss: the first loss and gradient of the student against the same formula in plain PyTorch.",
        "- memory: the most above the models and the data, with gradients and optimizer, in a process of its own.",
    ]
    return "\n".join(lines)


def _workload_blocks(results: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    blocks = [results_table(workload_rows(entry))]
    notes = [f"- {TITLES[name]}: {CANDIDATES[name].note}" for name in _names(entry) if CANDIDATES[name].note]
    across = _across(entry)
    if across:
        notes.append(across)
    for allocator, own in entry["allocators"].items():
        if "error" in own:
            notes.append(f"- allocator {allocator} failed: {own['error']}")
        notes += [f"- {TITLES[name]} failed ({allocator}): {why}" for name, why in own.get("failed", {}).items()]
    return [*blocks, "\n".join(notes)] if notes else blocks


def _names(entry: Mapping[str, Any]) -> list[str]:
    measured = {name for own in entry["allocators"].values() for name in own.get("times", {})} | entry.get("memory_mb", {}).keys()
    return [name for name in CANDIDATES if name in measured]


def workload_rows(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of one workload, for `results_table`."""
    rows = []
    for name in _names(entry):
        row: dict[str, Any] = {"candidate": TITLES[name], "objective": CANDIDATES[name].objective}
        for allocator in (DEFAULT, KEPT):
            times = entry["allocators"].get(allocator, {}).get("times", {})
            known = name in times and REFERENCE in times
            row[f"time ({allocator})"] = ratio(times, name, REFERENCE) if known else None
            row[f"CPU time ({allocator})"] = ratio(times, name, REFERENCE, "cpu") if known else None
            row[f"s ({allocator})"] = statistics.median(times[name]["wall"]) if name in times else None
        memory = entry.get("memory_mb", {}).get(name)
        row["memory (MB)"] = memory if isinstance(memory, (int, float)) else None
        row["same loss"] = same_loss(entry.get("checks", {}).get(name))
        rows.append(row)
    return rows


def same_loss(check: Mapping[str, float] | None) -> str | None:
    """Whether a candidate minimises the same, in words."""
    if check is None:
        return None
    if check["gradient_difference"] > SAME_GRADIENT:
        return f"gradient off by {check['gradient_difference']:.1e}"
    return "yes" if check["loss_difference"] <= SAME_LOSS else "gradient yes, value no"


def _across(entry: Mapping[str, Any]) -> str | None:
    """What keeping the pages alone does to the bare loop: seconds of two processes."""
    medians = []
    for allocator in (DEFAULT, KEPT):
        times = entry["allocators"].get(allocator, {}).get("times", {})
        if REFERENCE not in times:
            return None
        medians.append({name: statistics.median(own["wall"]) for name, own in times.items()})
    both = [name for name in ("bare", "textbook", "fast") if all(name in one for one in medians)]
    words = ", ".join(f"{TITLES[name]} {medians[1][name] / medians[0][REFERENCE]:.2f}" for name in both)
    return f"- With kept pages, in times of the bare loop with the default allocator (two processes): {words}."


def _growth(results: Mapping[str, Any]) -> str:
    rows = []
    for title, answer in results["growth"].items():
        if "error" in answer:
            rows.append({"growth": title, "candidate": f"failed: {answer['error']}"})
            continue
        for name, factor in answer["value"]["factors"].items():
            before, after = answer["value"]["ratios"][name]
            rows.append({"growth": title, "candidate": TITLES[name], "factor": factor, "before": before, "after": after})
    return results_table(rows)


def _table_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "examples": row["examples"],
            "table (MB)": row["table_mb"],
            "batches read": row["batches"],
            "resident before (MB)": row["before_mb"],
            "resident after (MB)": row["resident_mb"],
        }
        for row in results["table_growth"]
    ]
