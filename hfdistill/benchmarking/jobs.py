"""One measurement in a process of its own: `python -m hfdistill.benchmarking '{"kind": "times", ...}'`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..memory_pages import keep_memory_pages
from .candidates import OWN, Candidate, Setting, candidates_of
from .machine import count_work, describe_machine
from .measuring import measure_growth, measure_memory, measure_times, profile_steps
from .peers import OTHERS, peer_versions
from .workloads import Workload, build_workload


CANDIDATES: dict[str, Candidate] = {**OWN, **OTHERS}
KEPT, DEFAULT = "kept", "default"
"""Allocator modes: pages kept after two calls of mallopt, or as glibc does it."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore"}
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run_job(job: Mapping[str, Any]) -> Any:
    """Does what `job` says, in this process.

    Args:
        job: `kind`, `device`, `threads`, `bf16`, `allocator`, and what the function of that kind in `KINDS` reads.
    """
    torch.set_num_threads(job["threads"])
    pages = keep_memory_pages() if job.get("allocator") == KEPT else nullcontext()
    with pages, tempfile.TemporaryDirectory(prefix="hfdistill_benchmark_") as folder:
        setting = Setting(torch.device(job["device"]), job["bf16"], Path(folder))
        return KINDS[job["kind"]](job, setting)


def in_a_process(job: Mapping[str, Any]) -> dict[str, Any]:
    """`{"value": ...}` of [`run_job`] in a new process, which prints how far it is, or `{"error": ...}`: the last line of its errors."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | _OFFLINE
    environment |= {"OMP_NUM_THREADS": str(job["threads"]), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if job["kind"] == "memory":  # memory that is freed goes back at once, so that what was freed before is not used unseen
        environment |= _GIVE_BACK
    with tempfile.TemporaryDirectory(prefix="hfdistill_benchmark_") as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", "hfdistill.benchmarking", json.dumps({**job, "answer": str(answer)})]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment)
        if done.returncode == 0 and answer.is_file():
            return {"value": json.loads(answer.read_text(encoding="utf-8"))}
    last = (done.stderr.strip() or "no output").splitlines()[-1]
    return {"error": f"exit code {done.returncode}: {last}"}


def _workload(job: Mapping[str, Any]) -> Workload:
    return build_workload(job["workload"], job["size"])


def _times(job, setting):
    workload = _workload(job)
    chosen = candidates_of(job["workload"], job["candidates"], CANDIDATES)
    result = measure_times(workload, chosen, setting, job["rounds"])
    return {**result, "title": workload.title, "work": count_work(workload)}


def _memory(job, setting):
    return measure_memory(_workload(job), CANDIDATES[job["candidate"]], setting)


def _growth(job, setting):
    chosen = candidates_of(job["workload"], job["candidates"], CANDIDATES)
    return measure_growth(job["workload"], job["size"], tuple(job["changes"]), chosen, setting, job["rounds"])


def _profile(job, setting):
    return profile_steps(_workload(job), CANDIDATES[job["candidate"]], setting)


def _write_table(job, setting):
    from .table_growth import write_table

    return write_table(job["folder"], job["examples"])


def _read_table(job, setting):
    from .table_growth import read_table

    return read_table(job["folder"], job["examples"], job["batches"])


def _machine(job, setting):
    present, absent = peer_versions()
    return {"machine": describe_machine(setting.device), "peers": present, "absent": absent}


KINDS: dict[str, Callable[[Mapping[str, Any], Setting], Any]] = {
    "machine": _machine,
    "times": _times,
    "memory": _memory,
    "growth": _growth,
    "profile": _profile,
    "write_table": _write_table,
    "read_table": _read_table,
}
