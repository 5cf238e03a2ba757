"""Each file in recipes/accelerate starts what its name says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env


CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"
PROBE = """
import sys, torch
from accelerate import PartialState

state = PartialState(cpu="--use_cpu" in sys.argv)  # as TrainingArguments(use_cpu=True) does, without its long import
total = torch.ones(1)
if state.num_processes > 1:
    torch.distributed.all_reduce(total)
line = f"PROBE {state.num_processes} {state.process_index} {state.distributed_type.value} {state.device.type} {state.backend} {int(total)}"
sys.stdout.write(line + "\\n")  # one write: two ranks share the pipe
sys.stdout.flush()
"""


def launch(name: str, tmp_path: Path, *flags: str, **environment: str) -> list[str]:
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_") and k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / name), str(script), *flags]
    run = subprocess.run(
        command, cwd=tmp_path, env={**inherited, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    return sorted(line.removeprefix("PROBE ") for line in run.stdout.splitlines() if line.startswith("PROBE"))


def test_every_config_has_a_test():
    assert sorted(path.name for path in CONFIGS.glob("*.yaml")) == ["cpu.yaml", "gpu.yaml", "multi_gpu.yaml", "two_cpu.yaml"]


def test_cpu_starts_one_process(tmp_path):
    assert launch("cpu.yaml", tmp_path, CUDA_VISIBLE_DEVICES="") == ["1 0 NO cpu None 1"]


@pytest.mark.slow
def test_two_cpu_starts_two_joined_gloo_ranks(tmp_path):
    assert launch("two_cpu.yaml", tmp_path, "--use_cpu") == ["2 0 MULTI_CPU cpu gloo 2", "2 1 MULTI_CPU cpu gloo 2"]


def resolve(name: str, *flags: str):
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), *flags, "script.py"])
    args, _, _ = _validate_launch_command(args)
    return args


@pytest.mark.parametrize(("flags", "processes"), [((), "2"), (("--num_processes", "4"), "4")])
def test_multi_gpu_asks_for_one_process_per_gpu(flags, processes):
    args = resolve("multi_gpu.yaml", *flags)
    assert args.multi_gpu and not args.use_cpu and not args.cpu
    environment = prepare_multi_gpu_env(args)
    assert args.nproc_per_node == processes
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment.get("ACCELERATE_USE_CPU") != "True"


def test_gpu_asks_for_one_process_that_may_use_the_gpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    args = resolve("gpu.yaml")
    assert not args.multi_gpu and args.num_processes == 1
    command, environment = prepare_simple_launcher_cmd_env(args)
    assert command == [sys.executable, "script.py"]
    assert environment["ACCELERATE_USE_CPU"] == "False"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
