"""Run by test_batch_contract: two processes with losses that gather, each with its part of a batch; results go to files."""

import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from losses.test_batch_contract import BATCH_CASES, SPLITS, backward, call, draw, rows


def main(folder: Path, rank: int) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {}
    for name in BATCH_CASES:
        for split in SPLITS:
            loss, student, teacher = draw(name, samples=sum(split))
            loss.gather = True
            own = slice(0, split[0]) if rank == 0 else slice(split[0], None)
            student, teacher = rows(student, own), rows(teacher, own)
            value, gradients = backward(loss, student, teacher)
            results[f"{name} {split}"] = result = {"total": value.total.detach(), "count": value.count, "gradients": gradients}
            if list(loss.parameters()):
                result["parameters"] = list(torch.autograd.grad(call(loss, student, teacher).total, list(loss.parameters())))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    start = multiprocessing.get_context("fork")  # torch is imported once, and has not computed anything yet
    ranks = [start.Process(target=main, args=(Path(sys.argv[1]), rank)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(process.exitcode != 0 for process in ranks))
