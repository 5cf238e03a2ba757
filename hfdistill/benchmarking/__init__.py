"""What a step costs, against other ways to take it: `run_benchmark`, which `scripts/benchmark.py` calls."""

from .run import run_benchmark


__all__ = ["run_benchmark"]
