"""Lets a teacher answer all training data once, and writes what it says: shard by shard, by several processes, again after a kill."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..capture_plan import CapturePlan
from ..signals import ATTENTION_SIGNALS
from .fingerprints import collator_settings, config_settings, library_versions, plain, processor_settings, weights_hash
from .frozen import FrozenTeacher
from .store_asking import KINDS, TeacherAsker
from .store_files import remove_partials
from .store_format import HEAD, MANIFEST, SHARDS, Manifest, StoredRow, StoredSignal, write_head, write_shard
from .store_keys import STORE_KEYS, KeyedCollator, changes_with_the_epoch, example_ids, ids_hash, input_columns, random_states_kept
from .store_table import TeacherStore, is_remote, resolve_folder


SHARD_ROWS = 2048
SHARD_BYTES = 64 * 2**20


def store_teacher(
    folder: str | os.PathLike,
    teacher: FrozenTeacher | nn.Module,
    dataset,
    collator: Callable,
    plan: CapturePlan | None = None,
    *,
    logits: str = "auto",
    top_k: int = 64,
    temperature: float = 1.0,
    classes: int | None = None,
    rows_of: Callable[[Mapping], Tensor] | None = None,
    positions: Sequence[str] | None = None,
    dtype: str = "float16",
    epochs: int | None = 1,
    batch_size: int = 32,
    num_workers: int = 0,
    processors: Sequence[Any] = (),
    pooling: str = "auto",
    numbered: bool = False,
    process_index: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
    progress: bool = True,
) -> TeacherStore:
    """Stores what `teacher` answers to every example of `dataset`, or checks that it is stored already.

    `DistillationTrainer` does this itself where `teacher_store` is set. What is in the folder stays: a run that was killed goes on with
    the answers that are missing, with any number of processes.

    Args:
        folder: is made; one with other answers is refused. A data set on the Hub (`hf://datasets/user/name`) is only read.
        teacher ([`FrozenTeacher`] or `nn.Module`): a model; answers of functions have no fingerprint.
        dataset: map-style, with one `example_id` for each example.
        collator: makes the batches of training; what it draws depends on seed, epoch and `example_id` alone.
        plan ([`CapturePlan`], *optional*): what is stored. Default: logits.
        logits: `full`; `hidden`, for vocabularies: the input of the output embedding, and that embedding once, which is exact up to
            `dtype`; `top_k` with one bucket for all other classes; `top_k_without_tail`, which is biased; or `auto`: `hidden` for
            vocabularies, else `full`.
        top_k, temperature: of `top_k`; the mass outside is known at this temperature alone.
        classes (*optional*): of `top_k`, how many classes of the vocabulary the student has too; others are left out. Default: all.
        rows_of (*optional*): gives the positions of a batch whose logits of a vocabulary are stored, integer in its flattened
            `(batch * length)`. Default: all real tokens.
        positions (*optional*): what `rows_of` gives, in words, for the fingerprint.
        dtype: what is written: `float32`, `bfloat16` or `float16`.
        epochs: how many are stored, where inputs change from epoch to epoch; where they do not, one.
        batch_size, num_workers: of the pass over the data.
        processors: tokenizers or image processors, student's and teacher's, for the fingerprint.
        pooling: of the signal `pooled`.
        numbered: `example_id` was added for the store; the collator need not see it.
        process_index, num_processes, wait: this process, how many there are, and a barrier for them.
        progress: show a bar on the first process.

    Raises:
        ValueError: for what cannot be stored (attention, streams, inputs drawn without a seed), and a folder with other answers.
    """
    plan = plan or CapturePlan()
    teacher = teacher if isinstance(teacher, FrozenTeacher) else FrozenTeacher(teacher)
    check_kinds(plan, logits)
    remote, folder, ids = is_remote(folder), resolve_folder(folder), example_ids(dataset)
    if (folder / MANIFEST).is_file():  # what is there may be more than this run needs, and is then completed
        plan = plan.union(_plan_of(Manifest.read(folder).signals))
    teacher.capture.run_pooling = pooling
    with random_states_kept():
        by_rows = plan.logits and logits != "full"
        changes = changes_with_the_epoch(dataset, collator, teacher.columns, numbered, rows_of if by_rows else None)
        epochs = (epochs or 1) if changes else 1
        first = [dataset[i] for i in range(min(2, len(dataset)))]
        inputs = input_columns(KeyedCollator(collator, [], numbered)(first), teacher.columns)
        keyed = KeyedCollator(collator, inputs, numbered)
        asker = TeacherAsker(teacher, plan, keyed(first), logits, top_k, temperature, rows_of, dtype, classes)
        manifest = replace(asker.manifest(inputs, len(ids), epochs), example_ids=ids_hash(ids), changes=changes)
        about_rows = {"classes": asker.classes, "positions": _positions(manifest, rows_of, positions)}
        manifest.fingerprint = store_fingerprint(teacher, collator, processors, manifest, dtype, about_rows)
        if process_index == 0 and not remote:
            _prepare(folder, manifest, asker)
        wait()
        store = TeacherStore(folder)
        store.check_fingerprint(manifest.fingerprint)
        if remote and not all(store.has(ids, epoch).all() for epoch in range(epochs)):
            raise ValueError(
                f"{store!r} is on the Hub, where nothing is added to it, and has not all answers to {len(ids)} examples and {epochs} "
                "epochs of this run. Copy it into a folder (`hf download --repo-type dataset --local-dir`) and name that, or store fewer "
                "epochs."
            )
        writer = _ShardWriter(folder, store.manifest, process_index)
        bar = tqdm(total=manifest.examples * epochs, desc="Storing the teacher", unit="example", disable=not progress or process_index != 0)
        for epoch in range(epochs):
            missing = _missing(store, ids, epoch)
            wait()  # nobody writes before all have looked
            bar.update(manifest.examples - len(missing))
            for keys, signals in _answers(asker, dataset, keyed, missing[process_index::num_processes], epoch, batch_size, num_workers):
                for row in asker.rows(keys, signals, epoch):
                    writer.add(row)
                bar.update(min(len(keys.ids) * num_processes, bar.total - bar.n))
        writer.close()
        bar.close()
        wait()
    store.refresh()
    if not all(store.has(ids, epoch).all() for epoch in range(epochs)):
        raise ValueError(
            f"{store!r} is not complete although every process has written its part: another run writes to the same folder, or the "
            "processes see different folders. Use one folder that all processes share, and one run at a time."
        )
    return store


def check_kinds(plan: CapturePlan, logits: str = "auto") -> None:
    """Refuses what is not stored: attention, and unknown kinds of logits."""
    if logits not in (*KINDS, "auto"):
        raise ValueError(f"logits must be one of {['auto', *KINDS]}, got {logits!r}.")
    attention = [name for name in ATTENTION_SIGNALS if getattr(plan, name)]
    if attention:
        raise ValueError(
            f"{' and '.join(attention)} of a teacher are not stored: attention maps take as many numbers as heads x length x length for "
            "each block (393 kB in float16 for one block of BERT-base and 128 tokens), so reading them costs more than the teacher. "
            "Remove the terms on attention, or leave teacher_store out (a bfloat16 teacher is cheaper)."
        )


def store_fingerprint(
    teacher: FrozenTeacher, collator, processors: Sequence[Any], manifest: Manifest, dtype: str, about_rows: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that decides the stored answers, in JSON types; a seed where inputs change with the epoch alone."""
    capture, dtypes = teacher.capture, {str(p.dtype).removeprefix("torch.") for p in teacher.model.parameters()}
    pooled = any(column.signal == "pooled" for column in manifest.signals)
    own = {name: value for name, value in collator_settings(collator).items() if manifest.changes or name != "seed"}
    fingerprint = {
        "teacher": {
            "class": type(capture.inner).__name__,
            "weights": weights_hash(teacher.model),
            "config": {name: value for name, value in config_settings(capture.inner).items() if name != "problem_type"},
            "dtype": ", ".join(sorted(dtypes)),
            "autocast": _autocast_dtype(teacher),
            "token_ids": plain(capture.token_ids),
            "pooling": capture.pooling if pooled else None,
        },
        "examples": manifest.examples,
        "example_ids": manifest.example_ids,
        "inputs": manifest.inputs,
        "processors": [processor_settings(processor) for processor in processors],
        "collator": own,
        "stored": {
            "signals": sorted(own.column for own in manifest.signals),
            "dtype": dtype,
            "logits": manifest.logits,
            "top_k": next((own.size for own in manifest.signals if own.signal == "top_ids"), None),
            "temperature": manifest.temperature,
            **about_rows,
        },
        "versions": library_versions(),
    }
    return json.loads(json.dumps(fingerprint))  # as it is read back


def _positions(manifest: Manifest, rows_of, given: Sequence[str] | None) -> list[str] | None:
    """At which positions logits are stored; `None` where they are stored whole."""
    if manifest.logits in (None, "full"):
        return None
    return ["all"] if rows_of is None else sorted(given or ["chosen by a function"])


def _autocast_dtype(teacher: FrozenTeacher) -> str | None:
    device = next((p.device.type for p in teacher.model.parameters()), "cpu")
    with teacher.autocast():
        return str(torch.get_autocast_dtype(device)).removeprefix("torch.") if torch.is_autocast_enabled(device) else None


def _plan_of(signals: Sequence[StoredSignal]) -> CapturePlan:
    """What has to be fetched to fill these columns."""
    plan = CapturePlan(logits=False)
    names = {f.name for f in fields(CapturePlan)}
    for own in signals:
        name = own.signal if own.signal in names else "logits"
        plan = plan.union(replace(CapturePlan(logits=False), **{name: True if own.key is None else frozenset([own.key])}))
    return plan


def _missing(store: TeacherStore, ids: np.ndarray, epoch: int) -> np.ndarray:
    """Places in the data of the examples without an answer."""
    return np.flatnonzero(~store.has(ids, epoch))


def _answers(asker: TeacherAsker, dataset, keyed: KeyedCollator, places: np.ndarray, epoch: int, batch_size: int, num_workers: int):
    """`(keys, signals)` of one batch after the other."""
    collator = keyed.collator
    before = getattr(collator, "epoch", 0)
    if hasattr(collator, "set_epoch"):
        collator.set_epoch(epoch)
    cuts = [places[start : start + batch_size].tolist() for start in range(0, len(places), batch_size)]
    try:
        for batch in DataLoader(dataset, batch_sampler=cuts, collate_fn=keyed, num_workers=num_workers) if cuts else ():
            yield batch[STORE_KEYS], asker(batch)
    finally:
        if hasattr(collator, "set_epoch"):
            collator.set_epoch(before)


def _prepare(folder: Path, manifest: Manifest, asker: TeacherAsker) -> None:
    """Makes the folder, or sees that what is there answers the same questions."""
    if (folder / MANIFEST).is_file():
        stored = Manifest.read(folder)
        TeacherStore(folder).check_fingerprint(manifest.fingerprint)
        if stored.epochs < manifest.epochs:
            replace(stored, epochs=manifest.epochs).write(folder)
    else:
        others = [path.name for path in folder.glob("*") if path.name not in (HEAD, SHARDS) and not path.name.endswith(".partial")]
        if others:
            raise ValueError(
                f"teacher_store {str(folder)!r} holds other files ({', '.join(sorted(others)[:3])}) and no {MANIFEST}: the table would be "
                "mixed up with them. Give a new or empty folder."
            )
        if any((folder / SHARDS).glob("*.arrow")):
            raise ValueError(
                f"teacher_store {str(folder)!r} holds answers and no {MANIFEST}, so of which teacher they are is not known. Delete the "
                "folder: this run then stores its teacher there."
            )
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        needed, free = asker.bytes_per_example * manifest.examples * manifest.epochs, shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"Storing the teacher takes about {needed / 1e9:.1f} GB ({manifest.examples} examples, {manifest.epochs} epochs), but only "
                f"{free / 1e9:.1f} GB are free at {str(folder)!r}. Store fewer signals or epochs (teacher_store_epochs), fewer logits "
                "(teacher_store_logits=top_k), or choose another disk."
            )
        if asker.head is not None:
            manifest.head_hash = write_head(folder, asker.head.embedding.weight, asker.head.embedding.bias)
        manifest.write(folder, new=True)  # last: where it is, the head is
    for place in (folder, folder / SHARDS):
        remove_partials(place)


class _ShardWriter:
    """Collects rows and writes them as shards of this process, under names that no other run has, which may write at the same time."""

    def __init__(self, folder: Path, manifest: Manifest, process_index: int):
        self.folder, self.manifest, self.process, self.run = folder / SHARDS, manifest, process_index, secrets.token_hex(4)
        taken = [int(path.stem.split("-")[2]) for path in self.folder.glob(f"part-{process_index:04d}-*.arrow")]
        self.number, self.pending, self.bytes = max(taken, default=-1) + 1, [], 0

    def add(self, row: StoredRow) -> None:
        self.pending.append(row)
        self.bytes += row.bytes
        if len(self.pending) >= SHARD_ROWS or self.bytes >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Writes what is left."""
        if self.pending:
            path = self.folder / f"part-{self.process:04d}-{self.number:06d}-{self.run}.arrow"
            write_shard(path, self.manifest.signals, self.pending, self.manifest.store_id)
            self.number, self.pending, self.bytes = self.number + 1, [], 0
