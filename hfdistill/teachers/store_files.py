"""Files that are whole or not there, whenever a process is killed."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path


_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]  # of whose processes the numbers are known


def write_aside(path: Path, write, new: bool = False) -> None:
    """`write(temporary path)`, then a rename: the file is there whole, or not at all, whenever the process is killed.

    Raises:
        ValueError: where it must be `new` and is there.
    """
    partial = path.with_name(f".{path.name}.{_MACHINE}.{os.getpid()}.partial")
    write(partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    if new:
        try:
            os.link(partial, path)  # fails where the name is taken, which a rename does not
            partial.unlink()
            return
        except OSError as error:  # some file systems have no second names
            if path.exists():
                partial.unlink()
                raise ValueError(
                    f"{path} has been made by another run at the same time. Let one run store the teacher, then start the other again."
                ) from error
    os.replace(partial, path)


def remove_partials(folder: Path) -> None:
    """Files aside that runs have left which were killed on this machine; those of others may still be written."""
    for path in folder.glob(".*.partial"):
        *_, machine, process, _ = path.name.split(".")
        if machine == _MACHINE and process.isdigit() and not _runs(int(process)):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether there is another process of that number."""
    if process == os.getpid():
        return False
    if os.name == "nt":  # where signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
