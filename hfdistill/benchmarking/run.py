"""The whole benchmark: one process for each measurement, results saved after each of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..report import versions
from ..suggest import did_you_mean
from .candidates import candidates_of
from .jobs import CANDIDATES, DEFAULT, KEPT, in_a_process
from .machine import has_fast_bf16
from .pictures import plot_benchmark
from .tables import benchmark_text, write_tables
from .targets import IN_FP32
from .workloads import WORKLOADS


PARTS = ("times", "memory", "growth", "table")
# Big tensors are asked from the system anew in every step of these; the others have none.
BOTH_ALLOCATORS = ("W1", "W5")
MEMORY = {
    "W1": ("stock", "bare", "textbook", "textbrewer", "fast", "stored", "masked", "masked_stored"),
    "W2": ("textbook", "textbrewer", "fast"),
    "W3": ("textbook", "torchdistill", "fast"),
    "W4": ("textbook", "torchdistill", "fast"),
    "W5": ("stock", "bare", "textbook", "gkd", "trl_chunked", "liger", "fast", "stored"),
    "bert_base": ("stock", "textbook", "fast"),
}
GROWTH = {
    "full": {
        "sequence length 128 to 512, batch 4": ("W1", [{"batch": 4, "length": 128}, {"batch": 4, "length": 512}]),
        "batch 4 to 16, 128 tokens": ("W1", [{"batch": 4}, {"batch": 16}]),
        "vocabulary 30,522 to 151,936, batch 4": ("W1", [{"batch": 4}, {"batch": 4, "vocabulary": 151_936}]),
    },
    "tiny": {"vocabulary 64 to 128": ("W1", [{}, {"vocabulary": 128}])},
}
GROWING = ("bare", "fast", "masked")
TABLES = {"full": ((5_000, 50_000), 200), "tiny": ((40, 400), 3)}
"""Size -> examples of two stored tables, and batches that are read from each."""


def run_benchmark(
    workloads: Sequence[str] | None = None,
    candidates: Sequence[str] | None = None,
    parts: Sequence[str] = PARTS,
    size: str = "full",
    rounds: int = 5,
    threads: int | None = None,
    device: str | None = None,
    bf16: bool | None = None,
    folder: str | os.PathLike = "benchmarks",
    profile: Sequence[str] = (),
    command: str = "",
) -> dict[str, Any]:
    """Measures steps of hfdistill against a bare loop, the stock Trainer, and other libraries where they are installed.

    Every workload and allocator mode is a process of its own, in which the candidates take steps in turns. Memory is measured in a
    process for each candidate. `results_<processor>.json`, a Markdown table and a picture are written to `folder`. Figures of a former
    command are kept where machine, versions and size are the same, so a part can be measured anew.

    Args:
        workloads, candidates: by name; default: all.
        parts: of `times`, `memory`, `growth` and `table` (a stored teacher that grows).
        size: `full`, or `tiny` to try it out.
        rounds: measured steps of each candidate; about half as many with the default allocator where both are measured, which is slow.
        threads: of PyTorch; default: all cores.
        device: `cpu` or `cuda`; default: what there is.
        bf16: autocast to bf16 for all candidates; default: on a GPU.
        folder: where the results go.
        profile: `workload:candidate` pairs whose operations are listed, in `profile_<workload>_<candidate>.txt`.
        command: how it was called, for the record.

    Returns:
        `dict`: what is in the JSON file.

    Raises:
        ValueError: for unknown names, and `rounds` or `threads` below 1.
    """
    names = list(WORKLOADS) if workloads is None else list(workloads)
    pairs = [tuple(pair.split(":")) for pair in profile]
    _check(names, candidates, parts, size, rounds, threads, pairs)
    device = device or _device()
    bf16 = device == "cuda" if bf16 is None else bf16
    base = {"size": size, "threads": threads or os.cpu_count() or 1, "device": device, "bf16": bf16, "rounds": rounds}
    about = _must(in_a_process({"kind": "machine", **base}))
    header = {**about, "versions": versions(), "settings": {key: base[key] for key in ("size", "threads", "device", "bf16")}}
    path = Path(folder, f"results_{_slug(about['machine'])}{'' if size == 'full' else f'_{size}'}.json")
    results = {**_former(path, header), **header, "command": command}
    results["left_out"] = _left_out(about["machine"], about["absent"])
    save = _saver(path, results)
    if "times" in parts:
        for name in names:
            for allocator in _allocators(name, device):
                chosen = [c for c in candidates_of(name, candidates, CANDIDATES) if c not in results["left_out"]]
                fewer = (rounds + 1) // 2 if len(_allocators(name, device)) > 1 and allocator == DEFAULT else rounds
                _measure_times(results, name, allocator, {**base, "candidates": chosen, "rounds": fewer})
                save()
    if "memory" in parts:
        for name in names:
            for candidate in MEMORY[name]:
                if candidate not in results["left_out"] and (candidates is None or candidate in candidates):
                    _say(f"{name}: memory of {CANDIDATES[candidate].title}")
                    answer = in_a_process({"kind": "memory", **base, "workload": name, "candidate": candidate})
                    _entry(results, name).setdefault("memory_mb", {})[candidate] = answer.get("value", answer.get("error"))
                    save()
    if "growth" in parts:
        for title, (name, changes) in GROWTH[size].items():
            _say(f"{name}: {title}")
            job = {**base, "candidates": list(GROWING), "workload": name, "changes": changes, "allocator": KEPT}
            results.setdefault("growth", {})[title] = in_a_process({"kind": "growth", **job})
            save()
    if "table" in parts:
        _measure_table(results, base, Path(folder))
        save()
    for name, candidate in pairs:
        _say(f"{name}: profile of {CANDIDATES[candidate].title}")
        text = _must(in_a_process({"kind": "profile", **base, "workload": name, "candidate": candidate, "allocator": KEPT}))
        path.with_name(f"profile_{name}_{candidate}.txt").write_text(text, encoding="utf-8")
    save()
    plot_benchmark(results, path.with_suffix(".png"))
    print(f"\n{benchmark_text(results)}\n{path}", flush=True)
    return results


def _measure_times(results: dict, name: str, allocator: str, job: Mapping[str, Any]) -> None:
    _say(f"{name}, allocator {allocator}: {len(job['candidates'])} candidates, {job['rounds']} rounds")
    start = time.perf_counter()
    answer = in_a_process({"kind": "times", **job, "workload": name, "allocator": allocator})
    entry = _entry(results, name)
    if "error" in answer:
        entry["allocators"][allocator] = {"error": answer["error"]}
        print(f"  failed: {answer['error']}", flush=True)
        return
    value = answer["value"]
    entry |= {"title": value["title"], "work": value["work"], "checks": {**entry.get("checks", {}), **value["checks"]}}
    entry["allocators"][allocator] = {"times": value["times"], "failed": value["failed"], "seconds": time.perf_counter() - start, **_now()}


def _measure_table(results: dict, base: Mapping[str, Any], folder: Path) -> None:
    sizes, batches = TABLES[base["size"]]
    rows = []
    for examples in sizes:
        _say(f"stored table of {examples:,} examples")
        place = folder / f"table_{examples}"
        job = {**base, "folder": str(place), "examples": examples, "batches": batches}
        try:
            answer = in_a_process({"kind": "write_table", **job})
            answer = answer if "error" in answer else in_a_process({"kind": "read_table", **job})
        finally:
            shutil.rmtree(place, ignore_errors=True)
        if "error" in answer:
            print(f"  failed: {answer['error']}", flush=True)
            return
        rows.append(answer["value"])
    results["table_growth"] = rows


def _entry(results: dict, name: str) -> dict[str, Any]:
    return results.setdefault("workloads", {}).setdefault(name, {"allocators": {}})


def _allocators(name: str, device: str) -> tuple[str, ...]:
    if device != "cpu":
        return (DEFAULT,)
    return (DEFAULT, KEPT) if name in BOTH_ALLOCATORS else (KEPT,)


def _left_out(machine: Mapping[str, Any], absent: Mapping[str, str]) -> dict[str, str]:
    """Candidates that cannot be measured here, and why."""
    found = {name: f"not installed: {absent[one.peer]}" for name, one in CANDIDATES.items() if one.peer in absent}
    if not has_fast_bf16(machine):
        why = (
            f"no bf16 instructions here: products of matrices run at {machine['bfloat16_gflops']} GFLOP/s, in fp32 at "
            f"{machine['float32_gflops']}"
        )
        found |= dict.fromkeys(IN_FP32, why)
    return found


def _former(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Results of a former command on the same machine with the same versions."""
    if not path.is_file():
        return {}
    former = json.loads(path.read_text(encoding="utf-8"))
    same = ("versions", "settings")
    if any(former.get(key) != header[key] for key in same) or former["machine"]["cpu"] != header["machine"]["cpu"]:
        print(f"{path} is of other versions or settings: it is written anew.", flush=True)
        return {}
    return former


def _saver(path: Path, results: dict[str, Any]) -> Callable[[], None]:
    def save() -> None:
        results.update(_now())
        results.setdefault("workloads", {})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_tables(results, path.with_suffix(".md"))

    return save


def _check(names, candidates, parts, size, rounds, threads, pairs) -> None:
    for name in [*names, *(pair[0] for pair in pairs)]:
        if name not in WORKLOADS:
            raise ValueError(f"There is no workload {name!r}.{did_you_mean(name, WORKLOADS)} Known: {', '.join(WORKLOADS)}.")
    for name in [*(candidates or []), *(pair[-1] for pair in pairs)]:
        if name not in CANDIDATES:
            raise ValueError(f"There is no candidate {name!r}.{did_you_mean(name, CANDIDATES)} Known: {', '.join(CANDIDATES)}.")
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"There is no part {part!r}.{did_you_mean(part, PARTS)} Known: {', '.join(PARTS)}.")
    if size not in GROWTH:
        raise ValueError(f"size must be one of {', '.join(GROWTH)}, got {size!r}.")
    if rounds < 1 or (threads is not None and threads < 1):
        raise ValueError(f"Measuring needs at least one round and one thread, got rounds={rounds} and threads={threads}.")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _slug(machine: Mapping[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "_", (machine["gpu"] or machine["cpu"]).lower()).strip("_")


def _must(answer: Mapping[str, Any]) -> Any:
    if "error" in answer:
        raise RuntimeError(f"A measurement failed: {answer['error']}")
    return answer["value"]


def _now() -> dict[str, str]:
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}


def _say(text: str) -> None:
    print(text, flush=True)
