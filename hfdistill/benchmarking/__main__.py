"""A child process of the benchmark; see `jobs`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .jobs import run_job


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    Path(job["answer"]).write_text(json.dumps(run_job(job)), encoding="utf-8")
