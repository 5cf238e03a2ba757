"""Which checkpoint of a killed run can be trusted."""

from __future__ import annotations

import json
import os
from pathlib import Path


def last_whole_checkpoint(folder: str | os.PathLike, ranks: int = 1) -> str | None:
    """The newest checkpoint in `folder` that was written to its end; those cut short by a kill are passed over.

    Args:
        ranks: processes of the run, each of which leaves its random state. A checkpoint of another number of them is passed over.
    """
    folders = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in folders:
        try:
            json.loads((path / "trainer_state.json").read_text())  # the trainer writes it last
        except (OSError, ValueError):
            continue
        states = {"rng_state.pth"} if ranks == 1 else {f"rng_state_{rank}.pth" for rank in range(ranks)}
        if states == {file.name for file in path.glob("rng_state*.pth")}:
            return str(path)
    return None
