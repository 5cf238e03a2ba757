"""Run by test_vision_processes under torchrun: a few steps of vision terms on each rank, their end written to files."""

import sys
from pathlib import Path

import torch
from test_vision_processes import TERMS, train


def main(folder: Path) -> None:
    for name in TERMS:
        trainer = train(name, folder / "run" / name, rows=4)
        result = {
            "student": trainer.model.state_dict(),
            "objective": trainer.objective.state_dict(),
            "logs": [log for log in trainer.state.log_history if "loss" in log],
            "world": trainer.accelerator.num_processes,
        }
        torch.save(result, folder / f"{name}_{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
