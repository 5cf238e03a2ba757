"""What should be reached: figures of each candidate against another one, and whether they are met on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .machine import floor, has_fast_bf16


IN_FP32 = {"bf16": "fast", "masked_bf16": "masked", "channels_last_bf16": "channels_last", "scores_bf16": "scores"}
"""Candidate with a bf16 teacher -> the same in fp32, for machines where bf16 is no faster."""
BF16_SPEED = 3.2
"""How many times faster a BERT-base teacher was in bf16 on two cores with AMX."""
SHORT_STEP = 0.2
"""Seconds: below it, the trainer's own milliseconds are more than a few percent of a step."""


@dataclass(frozen=True)
class Target:
    """`ours` divided by `others`, at most `limit`.

    Args:
        workload, allocator: where.
        ours, others: names of candidates; the fastest of several counts.
        limit: at most this.
        kind: `time`, or `memory` (peak of a step above its start).
        long_steps: holds where the other takes more than 0.2 s.
    """

    workload: str
    allocator: str
    ours: tuple[str, ...]
    others: tuple[str, ...]
    limit: float
    kind: str = "time"
    long_steps: bool = False


LIGER = ("liger", "liger_compiled")
CNN = ("bf16", "channels_last_bf16")
TARGETS = (
    Target("W1", "default", ("masked_bf16",), ("stock",), 0.45),
    Target("W1", "kept", ("masked_bf16",), ("stock",), 0.58),
    Target("W1", "default", ("masked_bf16",), ("textbook",), 0.12),
    Target("W1", "kept", ("masked_bf16",), ("textbook",), 0.30),
    Target("W1", "default", ("bf16",), ("textbrewer",), 0.40),
    Target("W1", "kept", ("bf16",), ("textbrewer",), 0.80),
    Target("W2", "kept", ("bf16",), ("textbook",), 0.78),
    Target("W2", "kept", ("bf16",), ("textbrewer",), 0.70),
    Target("W3", "kept", ("bf16",), ("torchdistill",), 0.78),
    Target("W4", "kept", CNN, ("torchdistill",), 0.78),
    Target("W5", "default", ("fast",), ("gkd",), 0.25),
    Target("W5", "kept", ("fast",), ("gkd",), 0.62),
    Target("W5", "default", ("fast",), LIGER, 0.36),
    Target("W5", "kept", ("fast",), LIGER, 0.84),
    Target("W3", "kept", ("stored",), ("stock",), 1.05),
    Target("W4", "kept", ("stored",), ("stock",), 1.05),
    Target("bert_base", "kept", ("bf16",), ("stock",), 1.20),
    *(Target(name, "kept", ("off",), ("bare",), 1.05, long_steps=True) for name in ("W1", "W2", "W3", "W4", "W5", "bert_base")),
    Target("W1", "default", ("fast",), ("textbook",), 0.23, "memory"),
    Target("W5", "default", ("fast",), ("gkd",), 0.21, "memory"),
)
TABLE_LIMIT = 1.05
"""Resident memory of a reader when its stored table grows tenfold, at most."""


def judge(results: Mapping[str, Any], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row for each target: the limit, the figure here, whether it is met, and the arithmetic floor.

    Where bf16 has no instructions of its own, the fp32 candidate stands in for the one with a bf16 teacher.

    Args:
        results: as [`run_benchmark`](hfdistill.benchmarking.run.run_benchmark) returns them.
        titles: of the candidates.
    """
    rows = [_judge(target, results, titles) for target in TARGETS]
    table = results.get("table_growth")
    if table:
        first, last = table[0], table[-1]
        here = last["resident_mb"] / first["resident_mb"]
        what = f"reader of a stored table of {last['table_mb']:,.0f} MB"
        rows.append(
            {"workload": "stored table", "what": what, "against": f"of {first['table_mb']:,.0f} MB", "measure": "resident memory",
             "at most": TABLE_LIMIT, "here": here, "met": _word(here, TABLE_LIMIT)}
        )  # fmt: skip
    return rows


def _judge(target: Target, results: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    stands_in = not has_fast_bf16(results["machine"]) and any(name in IN_FP32 for name in target.ours)
    ours = tuple(IN_FP32.get(name, name) for name in target.ours) if stands_in else target.ours
    entry = results["workloads"].get(target.workload, {})
    if target.kind == "memory":
        known = {name: value for name, value in entry.get("memory_mb", {}).items() if isinstance(value, (int, float))}
    else:
        times = entry.get("allocators", {}).get(target.allocator, {}).get("times", {})
        known = {name: statistics.median(own["wall"]) for name, own in times.items()}
    our, other = _least(ours, known), _least(target.others, known)
    row: dict[str, Any] = {
        "workload": target.workload,
        "what": titles[our or ours[0]],
        "against": titles[other or target.others[0]],
        "measure": "peak memory" if target.kind == "memory" else f"time, {target.allocator}",
        "at most": target.limit,
        "here": None,
        "met": "not measured",
        "floor": None,
        "remark": None,
    }
    if our is None or other is None:
        return row
    if target.kind == "memory":
        row["here"] = known[our] / known[other]
    else:
        row["here"] = _ratio(times, our, other)
        if "work" in entry and "stock" in times and not target.long_steps:
            row["floor"] = _floor(entry["work"], our, results["machine"]) * _ratio(times, "stock", other)
    row["met"] = _word(row["here"], target.limit)
    if target.long_steps and known[other] <= SHORT_STEP:
        row["met"], row["remark"] = "step is short", f"{1000 * (known[our] - known[other]):+.0f} ms"
    if stands_in:
        row["remark"] = "teacher in fp32: no bf16 instructions here"
        if row["floor"] is not None:
            own = {"masked": "masked" in our, "stored": False}
            shorter = row["floor"] * floor(entry["work"], **own, teacher_speed=BF16_SPEED) / floor(entry["work"], **own)
            row["remark"] += f"; floor with a teacher {BF16_SPEED} times faster {shorter:.2f}"
    return row


def _floor(work: Mapping[str, float], name: str, machine: Mapping[str, Any]) -> float:
    speed = machine["bfloat16_gflops"] / machine["float32_gflops"] if "bf16" in name else 1.0
    return floor(work, masked="masked" in name, stored="stored" in name, teacher_speed=max(speed, 1.0))


def _least(names: Sequence[str], known: Mapping[str, float]) -> str | None:
    return min((name for name in names if name in known), key=known.__getitem__, default=None)


def _ratio(times: Mapping[str, Mapping[str, list[float]]], name: str, reference: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name]["wall"], times[reference]["wall"], strict=True))


def _word(value: float, limit: float) -> str:
    return "yes" if value <= limit else "no"
