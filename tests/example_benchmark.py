"""Results of a benchmark as the JSON holds them, with round numbers."""

from __future__ import annotations

from hfdistill.benchmarking.jobs import CANDIDATES


SECONDS = {  # of every step, by workload
    "W1": {"bare": 1.0, "stock": 0.5, "textbook": 1.25, "textbrewer": 1.0, "off": 1.04, "fast": 0.7, "masked": 0.25, "masked_bf16": 0.2},
    "W3": {"bare": 0.1, "stock": 0.05, "torchdistill": 0.1, "off": 0.13, "fast": 0.09, "stored": 0.052, "textbook": 0.11},
}


def results(flags=("avx2",)) -> dict:
    """Of a machine with these instruction sets; the kept allocator is twice as fast as the default one."""

    def times(seconds, factor):
        return {name: {"wall": [factor * value] * 3, "cpu": [2 * factor * value] * 3} for name, value in seconds.items()}

    check = {"loss": 1.0, "reference_loss": 1.0, "loss_difference": 1e-7, "gradient_difference": 1e-6}
    workloads = {
        name: {
            "title": f"workload {name}",
            "work": {"student": 2.0, "student_head": 1.0, "teacher": 3.0, "teacher_head": 1.0, "labelled": 0.1},
            "checks": dict.fromkeys(seconds, check),
            "allocators": {"kept": {"times": times(seconds, 1.0), "failed": {}}},
            "memory_mb": {},
        }
        for name, seconds in SECONDS.items()
    }
    workloads["W1"]["allocators"]["default"] = {"times": times(SECONDS["W1"], 2.0), "failed": {"stored": "ValueError: no room"}}
    workloads["W1"]["memory_mb"] = {"textbook": 2000.0, "fast": 400.0, "bare": "exit code 1: killed"}
    workloads["W1"]["checks"] = {**workloads["W1"]["checks"], "textbrewer": {**check, "loss_difference": 8.0}}
    assert set(SECONDS["W1"]) | set(SECONDS["W3"]) <= set(CANDIDATES)
    return {
        "date": "2026-01-01 00:00 UTC",
        "command": "python scripts/benchmark.py",
        "machine": {
            "cpu": "Some CPU", "gpu": None, "flags": list(flags), "cores": 2, "threads": 2, "system": "Linux x86_64",
            "float32_gflops": 100.0, "bfloat16_gflops": 400.0 if "amx_bf16" in flags else 1.0,
        },
        "settings": {"size": "full", "threads": 2, "device": "cpu", "bf16": False},
        "versions": {"torch": "2.0"},
        "peers": {"textbrewer": "0.2.1"},
        "absent": {"torchdistill": "ModuleNotFoundError: No module named 'torchdistill'"},
        "left_out": {"bf16": "no bf16 instructions here"},
        "workloads": workloads,
        "growth": {
            "vocabulary": {"value": {"factors": {"bare": 3.0, "fast": 2.5}, "ratios": {"bare": [1, 1], "fast": [0.6, 0.5]}}},
            "length": {"error": "exit code 1: killed"},
        },
        "table_growth": [
            {"examples": 10, "batches": 3, "table_mb": 40.0, "before_mb": 390.0, "resident_mb": 400.0},
            {"examples": 100, "batches": 3, "table_mb": 400.0, "before_mb": 390.0, "resident_mb": 408.0},
        ],
    }  # fmt: skip
