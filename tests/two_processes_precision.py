"""Run by test_teacher_setup under torchrun: which precision each rank takes when they measure differently."""

import sys
from pathlib import Path

import families
import torch
import training

from hfdistill import teacher_setup


def main(folder: Path) -> None:
    teacher_setup.half_precision_excluded = lambda device: None
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
    args = training.arguments(folder / "run", teacher_dtype="auto", per_device_train_batch_size=4)
    rank = args.process_index
    teacher_setup.compare_speed = lambda *_: (1.0, 0.1) if rank == 0 else (0.1, 1.0)
    trainer, _ = training.run(student, teacher, training.ragged("bert"), args)
    (folder / f"{rank}.txt").write_text(f"{trainer.accelerator.num_processes} {next(teacher.parameters()).dtype}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]))
