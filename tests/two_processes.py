"""Run by test_denominators under torchrun: the first gradient of every family on each rank, written to files."""

import sys
from pathlib import Path

import torch
from test_denominators import FAMILIES, LANGUAGE_MODELS, first_gradient, language_model_gradient


def main(folder: Path) -> None:
    for family in FAMILIES:
        for adapters in (False, True):
            # 8 rows on 2 ranks: 2 x 2 rows each. The sampler deals them out in turn, so ranks hold unequal numbers of tokens.
            trainer, gradient = first_gradient(family, folder / "run", 2, 2, adapters)
            result = {"gradient": gradient, "world": trainer.accelerator.num_processes, "logs": trainer.state.log_history[0]}
            torch.save(result, folder / f"{family}_{adapters}_{trainer.accelerator.process_index}.pt")
    for name in LANGUAGE_MODELS:
        trainer, gradient = language_model_gradient(name, folder / "run", 2, 2)
        torch.save({"gradient": gradient, "head": trainer._head}, folder / f"{name}_{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
