"""Run by test_peft under torchrun: the first gradient of a LoRA student on each rank, written to files."""

import sys
from pathlib import Path

import torch
from test_peft import TEACHERS, first_gradient


def main(folder: Path) -> None:
    for name in TEACHERS:
        trainer, gradient = first_gradient(name, folder / "run", 2, 2)
        result = {"gradient": gradient, "world": trainer.accelerator.num_processes, "logs": trainer.state.log_history[0]}
        torch.save(result, folder / f"{name}_{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
