"""The whole run: files, absent peers, what is kept of a former run, and the script as a user calls it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from example_benchmark import results

from hfdistill import run_benchmark
from hfdistill.benchmarking import peers, run
from hfdistill.benchmarking.pictures import _panels, plot_benchmark
from hfdistill.benchmarking.tables import benchmark_text, workload_rows


ROOT = Path(__file__).parents[2]


def test_absent_peers_are_reported_and_leave_no_trace(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {"textbrewer": ("no_such_package", "no-such-package"), "torch": ("torch", "torch")})
    present, absent = peers.peer_versions()
    assert list(present) == ["torch"] and absent == {"textbrewer": "ModuleNotFoundError: No module named 'no_such_package'"}
    left_out = run._left_out(results(flags=("amx_bf16",))["machine"], absent)
    assert left_out == {"textbrewer": "not installed: ModuleNotFoundError: No module named 'no_such_package'"}
    assert {"bf16", "masked_bf16"} <= run._left_out(results()["machine"], {}).keys()


def test_the_stand_in_for_a_model_zoo_is_gone_afterwards():
    with suppress(importlib.metadata.PackageNotFoundError):
        pytest.skip(f"torchvision {importlib.metadata.version('torchvision')} is installed")
    with peers._model_zoo():
        from torchvision.models.densenet import _DenseBlock, _Transition  # noqa: F401
        from torchvision.models.resnet import BasicBlock, conv1x1  # noqa: F401
    assert not [name for name in sys.modules if name.split(".")[0] == "torchvision"]


@pytest.fixture
def children(monkeypatch):
    """Child processes that answer at once; the jobs they got."""
    jobs, canned = [], results()

    def answer(job):
        jobs.append(dict(job))
        if job["kind"] == "machine":
            return {"value": {key: canned[key] for key in ("machine", "peers", "absent")}}
        if job["kind"] == "times":
            entry = canned["workloads"]["W1"]
            chosen = [name for name in job["candidates"] if name in entry["allocators"]["kept"]["times"]]
            times = {name: entry["allocators"]["kept"]["times"][name] for name in chosen}
            checks = {name: entry["checks"][name] for name in chosen}
            return {"value": {"times": times, "checks": checks, "failed": {}, "title": "a title", "work": entry["work"]}}
        if job["kind"] == "memory":
            return {"value": 100.0} if job["candidate"] != "bare" else {"error": "exit code 1: killed"}
        if job["kind"] == "growth":
            return {"value": canned["growth"]["vocabulary"]["value"]}
        if job["kind"] == "read_table":
            return {"value": canned["table_growth"][job["examples"] > 40]}
        return {"value": "a profile" if job["kind"] == "profile" else None}

    monkeypatch.setattr(run, "in_a_process", answer)
    return jobs


def test_a_run_writes_results_table_and_picture(children, tmp_path, capsys):
    found = run_benchmark(["W1", "W3"], size="tiny", rounds=3, threads=1, folder=tmp_path, profile=["W1:fast"], device="cpu")
    path = tmp_path / "results_some_cpu_tiny.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "profile_W1_fast.txt").read_text() == "a profile"
    text = path.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert "torchdistill is absent (ModuleNotFoundError" in text
    asked = [(job["kind"], job.get("workload"), job.get("allocator")) for job in children]
    assert asked[:4] == [("machine", None, None), ("times", "W1", "default"), ("times", "W1", "kept"), ("times", "W3", "kept")]
    assert [job["rounds"] for job in children if job["kind"] == "times"] == [2, 3, 3]
    assert all({"bf16", "torchdistill"}.isdisjoint(job["candidates"]) for job in children if job["kind"] == "times")
    assert found["workloads"]["W1"]["memory_mb"]["bare"] == "exit code 1: killed"
    assert not list(tmp_path.glob("table_*"))


def test_a_part_measured_anew_keeps_the_rest(children, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "plot_benchmark", lambda results, path: None)
    run_benchmark(["W1", "W3"], size="tiny", parts=["times", "memory"], folder=tmp_path, device="cpu", threads=1)
    found = run_benchmark(["W3"], size="tiny", parts=["times"], folder=tmp_path, device="cpu", threads=1)
    assert found["workloads"]["W1"]["memory_mb"] and found["workloads"]["W1"]["allocators"].keys() == {"default", "kept"}
    anew = run_benchmark(["W3"], size="tiny", parts=["times"], folder=tmp_path, device="cpu", threads=2)  # no comparison with one thread
    assert list(anew["workloads"]) == ["W3"]


def test_a_failed_process_is_written_down(children, tmp_path, monkeypatch):
    answer = run.in_a_process
    monkeypatch.setattr(run, "plot_benchmark", lambda results, path: None)
    monkeypatch.setattr(run, "in_a_process", lambda job: {"error": "exit code 9: out of memory"} if job["kind"] == "times" else answer(job))
    found = run_benchmark(["W3"], size="tiny", parts=["times"], folder=tmp_path, device="cpu")
    assert found["workloads"]["W3"]["allocators"]["kept"] == {"error": "exit code 9: out of memory"}
    assert "allocator kept failed: exit code 9: out of memory" in benchmark_text(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workloads": ["W9"]}, "no workload 'W9'"),
        ({"candidates": ["fats"]}, "no candidate 'fats'"),
        ({"parts": ["time"]}, "no part 'time'. Did you mean 'times'"),
        ({"profile": ["W1"]}, "no candidate 'W1'"),
        ({"size": "big"}, "size must be one of"),
        ({"rounds": 0}, "at least one round"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_measured(options, message):
    with pytest.raises(ValueError, match=message):
        run_benchmark(**options)


def test_tables_show_what_was_measured():
    canned = results()
    rows = {row["candidate"]: row for row in workload_rows(canned["workloads"]["W1"])}
    own = rows["hfdistill"]
    assert (own["time (default)"], own["time (kept)"], own["s (default)"], own["memory (MB)"]) == (0.7, 0.7, 1.4, 400.0)
    assert own["CPU time (kept)"] == 0.7 and rows["TextBrewer"]["same loss"] == "gradient yes, value no"
    assert rows["bare loop"]["memory (MB)"] is None
    text = benchmark_text(canned)
    assert "hfdistill, stored teacher failed (default): ValueError: no room" in text
    assert "With kept pages, in times of the bare loop with the default allocator (two processes): bare loop 0.50" in text
    assert "| length | failed: exit code 1: killed |" in text
    assert text.count("\n## ") == 6  # two workloads, growth, stored table, targets, left out


def test_pictures_have_a_panel_for_each_measurement(tmp_path):
    canned = results()
    panels = _panels(canned)
    assert [title for title, *_ in panels] == ["W1, default allocator", "W1, kept allocator", "W3, kept allocator", "W1, memory"]
    assert panels[0][1]["fast"] == 0.7 and panels[3][1] == {"textbook": 2000.0, "fast": 400.0}
    assert plot_benchmark(canned, tmp_path / "a.png").stat().st_size > 10_000
    assert plot_benchmark({**canned, "workloads": {}}, tmp_path / "b.png") is None


@pytest.mark.slow
def test_the_script_as_a_user_calls_it(tmp_path):
    command = [sys.executable, "scripts/benchmark.py", "--size", "tiny", "--workloads", "W5", "--candidates", "bare,stock,fast,gkd"]
    options = ["--rounds", "1", "--threads", "1", "--folder", str(tmp_path), "--profile", "W5:fast", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    path = next(tmp_path.glob("results_*_tiny.json"))
    found = json.loads(path.read_text())
    assert {"bare", "stock", "fast"} <= found["workloads"]["W5"]["allocators"]["kept"]["times"].keys()
    assert found["workloads"]["W5"]["memory_mb"]["fast"] >= 0 and len(found["table_growth"]) == 2 and found["growth"]
    assert "aten::" in (tmp_path / "profile_W5_fast.txt").read_text()
    assert found["absent"].keys() | found["peers"].keys() == {"textbrewer", "torchdistill", "trl", "liger"}
