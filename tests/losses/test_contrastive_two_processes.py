"""Two processes with a part of the batch each against one with the whole: values, gradients, queue, memories and Z of two steps.

This file is its own worker: `python test_contrastive_two_processes.py RANK FOLDER`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfdistill.losses.contrastive import InfoNCELoss
from hfdistill.losses.memory_bank import CRDLoss


pytestmark = pytest.mark.slow

CLASSES = [0, 1, 2, 0, 1, -100, 2, 0, -100, 1, 2, 2]
BATCHES = ([3, 5, 0, 9, 11, 1, 7], [2, 3, 8, 4, 2, 6])  # the second has an id on both ranks
CUTS = (2, 4)  # rows of rank 0
LOSSES = {
    "crd": lambda: CRDLoss(dim=4, negatives=3, classes=CLASSES),
    "crd relax": lambda: CRDLoss(dim=4, negatives=30, mode="relax", classes=CLASSES),
    "info_nce": lambda: InfoNCELoss(projection=4, gather=True),
    "info_nce queue": lambda: InfoNCELoss(projection=4, queue_size=9, gather=True, positives="labels"),
    "info_nce own samples": lambda: InfoNCELoss(projection=4, queue_size=9),
}


def two_steps(name, rank=None):
    """Total, count, gradients and buffers after each of two steps of plain SGD; `rank` `None` has the whole batch."""
    torch.manual_seed(0)
    loss = LOSSES[name]()
    loss.prepare((2, 6), (2, 9))
    loss.double()
    student_layer = torch.nn.Linear(5, 6).double()
    parameters = dict(student_layer.named_parameters()) | dict(loss.named_parameters())
    results = []
    for step, (ids, cut) in enumerate(zip(BATCHES, CUTS)):
        generator = torch.Generator().manual_seed(step)
        inputs, teacher = (torch.randn(len(ids), width, generator=generator, dtype=torch.float64) for width in (5, 9))
        own = slice(None) if rank is None else slice(0, cut) if rank == 0 else slice(cut, None)
        ids = torch.tensor(ids)
        options = {"example_ids": ids, "labels": torch.tensor(CLASSES)[ids]}
        value = loss(student_layer(inputs[own]), teacher[own], **{key: options[key][own] for key in loss.needs})
        gradients = dict(zip(parameters, torch.autograd.grad(value.total, list(parameters.values()))))
        buffers = {key: buffer.clone() for key, buffer in loss.named_buffers()}
        if rank is not None:
            for gradient in gradients.values():  # what the trainer does: the sum over ranks
                torch.distributed.all_reduce(gradient)
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter -= 0.1 * gradients[key]
        results.append({"total": value.total.detach(), "count": value.count, "gradients": gradients, "buffers": buffers})
    loss.eval()  # nothing is exchanged or kept any more, but where the samples of all are compared
    if name == "crd" and rank != 1:
        loss(student_layer(inputs), teacher, example_ids=ids)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, str(Path(__file__))]
    workers = [subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(error[-3000:] for error in errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "info_nce own samples"])
def test_two_processes_are_one(ranks, name):
    for step, alone in enumerate(two_steps(name)):
        parts = [rank[name][step] for rank in ranks]
        assert parts[0]["count"] != parts[1]["count"]
        assert parts[0]["count"] + parts[1]["count"] == alone["count"]
        torch.testing.assert_close(parts[0]["total"] + parts[1]["total"], alone["total"], rtol=1e-11, atol=0)
        for part in parts:
            for kind in ("gradients", "buffers"):
                assert part[kind].keys() == alone[kind].keys()
                for key, tensor in alone[kind].items():
                    torch.testing.assert_close(part[kind][key], tensor, rtol=1e-10, atol=1e-12, msg=f"{kind} {key} of step {step}")


@pytest.mark.parametrize("name", LOSSES)
def test_both_processes_keep_the_same(ranks, name):
    """Bit for bit: only one of them is saved."""
    for first, second in zip(*(rank[name] for rank in ranks)):
        assert all(torch.equal(tensor, second["buffers"][key]) for key, tensor in first["buffers"].items())
    if name != "info_nce":
        assert first["buffers"]


def test_without_gather_each_process_compares_its_own_samples(ranks):
    """Values are those of the parts alone, but the queue has the teacher's vectors of both."""
    name = "info_nce own samples"
    whole, parts = two_steps(name)[0], [rank[name][0] for rank in ranks]
    assert sum(part["total"] for part in parts) < 0.9 * whole["total"]
    torch.testing.assert_close(parts[0]["buffers"]["queue"], whole["buffers"]["queue"])
    assert parts[0]["buffers"]["queue_filled"] == len(BATCHES[0])


def main(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save({name: two_steps(name, rank) for name in LOSSES}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
