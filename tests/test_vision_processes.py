"""Two CPU processes with half a batch each train the student, the adapters and the memory bank of one process with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vision_families as vision
from safetensors.torch import load_file
from training import Rows, arguments, run

from hfdistill import Term


STEPS = 3
TERMS = {
    "kd": [Term("task", weight=0.5), Term("soft_targets", weight=0.5)],
    "hint": [Term("task"), Term("hint", layer_map="0:0,1:2"), Term("attention_transfer", weight=100.0, layer_map="1:2")],
    "crd": [Term("task"), Term("crd", options={"dim": 8, "negatives": 5})],
    "relations": [
        Term("task"),
        Term("rkd_distance", options={"gather": True}),
        Term("similarity_preserving", layer_map="1:2", options={"gather": True}),
        Term("info_nce", options={"projection": 8, "gather": True}),
    ],
    "vid": [Term("task"), Term("vid", layer_map="0:0,1:2")],
}


def train(name: str, folder: Path, rows: int):
    """A ViT, since the batch norm of a CNN has the statistics of its own rows."""
    student, teacher = vision.build("vit", 1, seed=1), vision.build("vit", 2, seed=2)
    args = arguments(folder, max_steps=STEPS, per_device_train_batch_size=rows, learning_rate=1e-2, optim="sgd")
    trainer, _ = run(student, teacher, Rows(vision.batch(32, rows=16)), args, objective=TERMS[name])
    return trainer


@pytest.mark.slow
def test_two_processes_train_the_student_of_one(tmp_path):
    worker = Path(__file__).with_name("two_processes_vision.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{worker.parent}{os.pathsep}{worker.parent.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(worker), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in TERMS:
        both = [torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)]
        one = train(name, tmp_path / "one" / name, rows=8)
        start = vision.build("vit", 1, seed=1).state_dict()
        logs = [log for log in one.state.log_history if "loss" in log]
        for rank in both:
            assert rank["world"] == 2
            for key, tensor in one.model.state_dict().items():
                torch.testing.assert_close(rank["student"][key], tensor, rtol=1e-4, atol=2e-6, msg=f"{name}: {key}")
            assert rank["objective"].keys() == one.objective.state_dict().keys()
            for key, tensor in one.objective.state_dict().items():
                torch.testing.assert_close(rank["objective"][key], tensor, rtol=1e-4, atol=2e-6, msg=f"{name}: {key}")
            for seen, expected in zip(rank["logs"], logs):
                for term in TERMS[name]:
                    assert seen[term.name] == pytest.approx(expected[term.name], rel=1e-4, abs=1e-6), (name, term.name)
        assert any(not torch.equal(tensor, start[key]) for key, tensor in one.model.state_dict().items())


def test_a_resumed_run_goes_on_with_the_same_memory_bank(tmp_path):
    """CRD: 4 steps in one go against 2 steps, a checkpoint, and 2 more: weights, banks and negatives are the same."""

    def go(folder, resume=None, **options):
        student, teacher = vision.build("vit", 1, seed=1), vision.build("vit", 2, seed=2)
        args = arguments(
            folder, max_steps=4, per_device_train_batch_size=8, learning_rate=1e-2, save_strategy="steps", save_steps=2, **options
        )
        return run(student, teacher, Rows(vision.batch(32, rows=16)), args, objective=TERMS["crd"], resume=resume)[0]

    whole = go(tmp_path / "whole")
    resumed = go(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-2"))
    for ours, theirs in ((whole.model, resumed.model), (whole.objective, resumed.objective)):
        for key, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[key]), key
    banks = [key for key in whole.objective.state_dict() if "memory" in key]
    early = load_file(tmp_path / "whole/checkpoint-2/distillation_state.safetensors")
    assert len(banks) == 2
    for key in banks:  # the run went on writing into them
        assert not torch.equal(early[key], whole.objective.state_dict()[key])


def test_memories_have_a_row_for_each_training_example_and_for_nothing_else(tmp_path):
    """Ids with gaps, as a split leaves them: 8 rows, not 9001; and a run that repeats examples counts each once."""
    batch = vision.batch(32, rows=8)
    batch["example_id"] = torch.tensor([9000, 3, 70, 12, 500, 41, 8, 33])
    trainer, _ = run(vision.build("vit", 1), vision.build("vit", 2), Rows(batch), arguments(tmp_path), objective=TERMS["crd"])
    loss = trainer.objective.terms["crd"].loss
    assert loss.examples == 8 and loss.memory_v1.shape == (8, 8)
    # All eight were trained on in the one step, so every row has been written: each is a unit vector now.
    assert torch.allclose(loss.memory_v1.norm(dim=1), torch.ones(8))
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
    trainer, _ = run(vision.build("vit", 1), vision.build("vit", 2), Rows(twice), arguments(tmp_path), objective=TERMS["crd"])
    assert trainer.objective.terms["crd"].loss.examples == 8


def test_a_memory_bank_needs_numbered_examples(tmp_path):
    batch = vision.batch(32, rows=16)
    del batch["example_id"]
    with pytest.raises(ValueError, match="no column 'example_id'. Add one number for each example"):
        run(vision.build("vit", 1), vision.build("vit", 2), Rows(batch), arguments(tmp_path), objective=TERMS["crd"])
