"""Run by test_trainer_store under torchrun: each process writes its part of the store, and both train from all of it."""

import sys
from pathlib import Path

import torch
from stored_runs import train


def main(folder: Path) -> None:
    for name in ("classification", "masked_lm"):
        # two rows on each in place of two micro-batches of two
        trainer = train(name, folder / "run", store=folder / name, gradient_accumulation_steps=1)
        torch.save(trainer.model.state_dict(), folder / f"{name}_{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
