"""`distillation_state.safetensors`: what a run needs beside the student to go on (adapters, layer maps). No pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


FILE = "distillation_state.safetensors"
FORMAT = 1


def save_side_file(folder: str | os.PathLike, module: nn.Module, record: dict[str, Any]) -> None:
    """Writes the state of `module` and a JSON `record` into `folder`; aside first, then renamed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    partial = folder / (FILE + ".partial")
    save_file(tensors, partial, metadata={"format": "pt", "hfdistill": json.dumps({"format": FORMAT, **record})})
    os.replace(partial, folder / FILE)


def read_record(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The JSON record, or `None` where the checkpoint was not written by hfdistill.

    Raises:
        ValueError: when the file is damaged or of a newer format.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["hfdistill"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}). Resume from an earlier checkpoint.") from error
    if record["format"] > FORMAT:
        raise ValueError(f"{path} has format {record['format']}, this version of hfdistill reads up to {FORMAT}. Upgrade hfdistill.")
    return record


def load_side_file(folder: str | os.PathLike, module: nn.Module) -> None:
    """Loads what `save_side_file` wrote into `module`.

    Raises:
        ValueError: when the file is missing although there is something to load, or when its tensors do not fit.
    """
    path = Path(folder) / FILE
    own = module.state_dict()
    if not path.is_file():
        if own:
            raise ValueError(
                f"{path} is missing, but the objective has {len(own)} adapter tensors: they would start from random values in the middle "
                "of the "
                "run. Resume from a complete checkpoint, or start anew without resume_from_checkpoint."
            )
        return
    with safe_open(path, "pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}
    wrong = [
        f"{key}: checkpoint {tuple(saved[key].shape) if key in saved else 'none'}, now {tuple(own[key].shape) if key in own else 'none'}"
        for key in sorted(own.keys() | saved.keys())
        if key not in saved or key not in own or saved[key].shape != own[key].shape
    ]
    if wrong:
        raise ValueError(
            f"The adapters in {path} do not fit this objective ({'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''}): terms, layer "
            "maps or "
            "models have changed since the checkpoint. Use the settings of that run, or start anew without resume_from_checkpoint."
        )
    with torch.no_grad():
        module.load_state_dict(saved)


def changed_maps(record: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name of a term -> its layer map in the checkpoint and now, where they differ; `"none"` for a term that is not there."""
    saved = {name: pairs and [tuple(pair) for pair in pairs] for name, pairs in record["layer_maps"].items()}
    names = sorted(saved.keys() | now.keys())
    both = {name: (saved.get(name, "none"), now.get(name, "none")) for name in names}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}
