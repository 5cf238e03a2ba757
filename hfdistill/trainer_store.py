"""Training from stored answers: the teacher is asked once, before training, and then left alone."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping

from torch.utils.data import Dataset
from transformers import Trainer

from .capture_plan import CapturePlan
from .counting import EXAMPLE_ID
from .losses.logits import SoftTargetsLoss
from .teachers import FrozenTeacher, StoredTeacher, TeacherStore, store_teacher
from .teachers.fingerprints import collator_settings, processor_settings
from .teachers.store_keys import KeyedCollator, changes_with_the_epoch, check_epochs, check_numbered, example_ids
from .teachers.store_writing import check_kinds
from .terms import resolve_terms
from .vocabulary_terms import LANGUAGE_MODELS, loss_rows


logger = logging.getLogger(__name__)


class TrainerStore(Trainer):
    """A Trainer with a `teacher` and an `objective`, as [`DistillationTrainer`] sets them, that can keep the teacher's answers on disk."""

    _store_epochs = 1
    _numbered = False

    # ---- Set-up ----

    def _stored_teacher(self, teacher):
        """Where there is a `teacher_store` but no teacher, what is in the folder is the teacher of the terms that need one."""
        if teacher is not None or self.args.teacher_store is None:
            return teacher
        wanted = any(not term.is_task for term in resolve_terms(self.args, self._given_terms))
        return StoredTeacher(self._store_folder) if wanted else None

    @property
    def _store_folder(self) -> str:
        return self.args.teacher_store.replace("{seed}", str(self.args.seed))

    def _check_store(self) -> None:
        """Refuses before training what cannot be trained from stored answers."""
        args, stored = self.args, isinstance(self.teacher, StoredTeacher)
        if self.teacher is None or self.train_dataset is None or not (stored or args.teacher_store is not None):
            return
        if not stored and not isinstance(self.teacher, FrozenTeacher):
            kind = "a function, whose answers have no fingerprint" if callable(self.teacher) else type(self.teacher).__name__
            kind = "the student with its adapters off" if hasattr(self.teacher, "follow") else kind
            raise ValueError(
                f"teacher_store={args.teacher_store!r} keeps the answers of a model, but the teacher is {kind}. Pass a model, or leave "
                "teacher_store out."
            )
        if stored and args.eval_with_teacher and self.teacher.live is None:
            raise ValueError(
                "eval_with_teacher=True asks the teacher about evaluation data, but only its answers to training data are stored. Set it "
                "to False, or pass the teacher itself together with teacher_store."
            )
        if stored and "similar" in [args.layer_map, *(t.term.layer_map for t in self.objective.terms.values() if t.layered)]:
            raise ValueError(
                "layer_map='similar' compares the layers of both models on a batch, but the teacher's blocks are not in memory. Write the "
                "pairs ('0:1,1:3'), as the run that stored them has printed."
            )
        check_kinds(self._teacher_plan())
        self._numbered = _lacks_numbers(self.train_dataset)
        if not self._numbered:
            check_numbered(self.train_dataset)
        check_epochs(self._training_collator())
        if getattr(self._training_collator(), "mixes", False):
            changes_with_the_epoch(self.train_dataset, self._training_collator(), [])  # which says why
        kind = self.teacher.store.manifest.logits if stored else args.teacher_store_logits
        if kind in ("top_k", "top_k_without_tail") and self._teacher_plan().logits:
            self._check_top_k(kind)

    def _check_top_k(self, kind: str) -> None:
        """One temperature, and losses that know what to do with the mass outside."""
        others = [term.name for term in self._logit_terms() if type(term.loss) is not SoftTargetsLoss]
        if others:
            raise ValueError(
                f"The term {others[0]!r} needs all logits of the teacher, but teacher_store_logits={kind} keeps the largest ones. Set it "
                "to hidden, or use soft_targets alone."
            )
        if self.objective.teacher_columns is not None:
            raise ValueError(
                f"teacher_store_logits={kind} keeps classes of the teacher, but the student's vocabulary is a part of it under other ids. "
                "Set it to hidden."
            )
        self._store_temperature()
        if kind == "top_k_without_tail":
            logger.warning(
                "teacher_store_logits=top_k_without_tail is biased: what the student gives to classes outside the top %d is not punished. "
                "top_k has one bucket for them.",
                self.args.teacher_store_top_k,
            )

    def _logit_terms(self):
        return [term for term in self.objective.terms.values() if term.signal == "logits" and not term.term.is_task]

    def _store_temperature(self) -> float:
        """The one temperature of all logit terms, at which the mass of the tail is stored.

        Raises:
            ValueError: for several, or one that changes.
        """
        found = set()
        for term in self._logit_terms():
            schedule = term.schedules.get("temperature")
            if schedule is not None and schedule.type != "constant":
                raise ValueError(
                    f"The temperature of the term {term.name!r} changes in training, but the probability outside the top k is stored for "
                    "one temperature. Set teacher_store_logits=hidden, or a constant temperature."
                )
            found.add(float(schedule(0.0) if schedule is not None else getattr(term.loss, "temperature", 1.0)))
        if len(found) > 1:
            raise ValueError(
                f"Terms have the temperatures {sorted(found)}, but the probability outside the top k is stored for one. Set "
                "teacher_store_logits=hidden, or one temperature."
            )
        return found.pop() if found else 1.0

    def _training_collator(self):
        collator = self.data_collator
        return collator.for_training() if hasattr(collator, "for_training") else collator

    # ---- Storing ----

    def store_teacher(self) -> TeacherStore:
        """Lets the teacher answer the training data, as far as that is not stored in `teacher_store` yet; `train` calls it.

        All processes have to call it. What the terms of the objective need over the whole training is stored, for the batches that the
        collator makes for training.
        """
        args, collator = self.args, self._training_collator()
        if args.teacher_store is None or not isinstance(self.teacher, FrozenTeacher):
            raise ValueError(
                f"There is nothing to store (teacher_store is {args.teacher_store!r}, the teacher {type(self.teacher).__name__}). Name a "
                "folder in teacher_store, and pass a model as the teacher."
            )
        self._number_examples()
        plan = self._teacher_plan()
        top_k = args.teacher_store_logits in ("top_k", "top_k_without_tail") and plan.logits
        self._needs_example_ids = True
        self._signature_columns = None  # of both models and the number
        language_model = self.objective.task in LANGUAGE_MODELS
        start = time.perf_counter()
        store = store_teacher(
            self._store_folder,
            self.teacher,
            self._collated_rows(),
            collator,
            plan,
            logits=args.teacher_store_logits,
            top_k=args.teacher_store_top_k,
            temperature=self._store_temperature() if top_k else 1.0,
            classes=self.objective.vocabulary,
            rows_of=self._rows_of if language_model else None,
            positions=self._positions(self.objective.terms.values()) if language_model else None,
            dtype=args.teacher_store_dtype,
            epochs=self._epochs_to_store(),
            batch_size=args.teacher_batch_size or args.per_device_train_batch_size,
            num_workers=args.dataloader_num_workers,
            processors=(self.processing_class, self.teacher_processing_class),
            pooling=self.teacher.capture.run_pooling,
            numbered=self._numbered,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            wait=self.accelerator.wait_for_everyone,
            progress=not args.disable_tqdm,
        )
        if self.is_world_process_zero():
            print(
                f"Stored teacher: {len(store)} answers, {store.bytes / 1e6:.1f} MB in {store.folder} ({time.perf_counter() - start:.1f} s)"
            )
            if top_k:
                mean, worst = store.lost_mass()
                print(
                    f"Probability outside the top {store.columns['top_ids'].size} at temperature {store.manifest.temperature:g}: mean "
                    f"{mean:.4f}, above {worst:.4f} for the worst percent of the positions"
                )
        return store

    def _rows_of(self, batch):
        return loss_rows(batch, list(self.objective.terms.values()), self.objective.task, self.objective.positions)

    def _positions(self, terms) -> list[str]:
        """What `_rows_of` gives, in words."""
        terms, kinds = [term for term in terms if term.signal == "logits"], self.objective.positions
        own = {"labelled" if term.term.is_task or term.loss.unit == "labels" else kinds for term in terms}
        return [f"{name} ({self.objective.task})" for name in (["all"] if "all" in own else sorted(own))]  # labels are at real tokens

    def _collated_rows(self):
        """The training data with the columns that the collator gets in training."""
        if not self.args.remove_unused_columns:
            return self.train_dataset
        if _has_columns(self.train_dataset):
            return self._remove_unused_columns(self.train_dataset, "training")
        self._set_signature_columns_if_needed()
        return _KeptColumns(self.train_dataset, self._signature_columns)

    def _number_examples(self) -> None:
        """Gives examples of a `datasets.Dataset` their position as number; hashes of the inputs tell where positions have changed."""
        if _lacks_numbers(self.train_dataset):
            self.train_dataset = self.train_dataset.add_column(EXAMPLE_ID, range(len(self.train_dataset)))
            self._numbered = True
            self._signature_columns = None

    def _epochs_to_store(self) -> int:
        """As many as the run has, where `teacher_store_epochs` does not say."""
        return self.args.teacher_store_epochs or self._epochs_of_run()

    def _epochs_of_run(self) -> int:
        args = self.args
        if args.max_steps <= 0:
            return math.ceil(args.num_train_epochs)
        batches, whole = len(self.train_dataset), math.floor if args.dataloader_drop_last else math.ceil
        for cut in (args.train_batch_size, self.accelerator.num_processes):
            batches = whole(batches / cut)
        return math.ceil(args.max_steps / max(math.ceil(batches / args.gradient_accumulation_steps), 1))

    # ---- Training ----

    def train(self, *args, **kwargs):
        """As `Trainer.train`; before it, the teacher is stored where `teacher_store` is set."""
        self._take_stored_teacher()
        return super().train(*args, **kwargs)

    def _take_stored_teacher(self) -> None:
        """From now on the teacher is what is stored of it."""
        if isinstance(self.teacher, StoredTeacher):
            self._check_stored()
        elif self.teacher is not None and self.args.teacher_store is not None and self._teacher_plan() != CapturePlan(logits=False):
            live, store = self.teacher, self.store_teacher()
            self._repeat_epochs(store, min(self._epochs_to_store(), store.manifest.epochs))
            live.capture.release()
            self.teacher = StoredTeacher(store, live if self.args.eval_with_teacher else None)
            self._teacher_rows = self._teacher_projects = True
        self._signature_columns = None  # with the number of each example

    def _check_stored(self) -> None:
        """A store that was given in place of a teacher answers the questions of this run, as far as that can be known before training."""
        store = self.teacher.store
        if not store.complete:
            raise ValueError(
                f"{store!r} is not complete: the run that wrote it was killed. Pass the teacher together with teacher_store once more, "
                "which stores what is missing."
            )
        self._number_examples()
        self._needs_example_ids = True
        self._signature_columns = None
        plan = self._teacher_plan()
        self.teacher.capture.check(plan)
        self._check_stored_examples(store)
        self._check_stored_rows(store)
        pooling = store.manifest.fingerprint["teacher"]["pooling"]
        if plan.pooled and pooling != self.teacher.capture.pooling:
            raise ValueError(
                f"The stored teacher's pooled vectors are those of pooling={pooling!r}, but this run has {self.teacher.capture.pooling!r}. "
                f"Set pooling={pooling!r}, or store the teacher again."
            )
        then, now = store.manifest.temperature, None
        if then is not None and plan.logits and (now := self._store_temperature()) != then:
            raise ValueError(
                f"The mass outside the stored top k is that at temperature {then:g}, but the terms have {now:g}. Set temperature to "
                f"{then:g}, or store the teacher again."
            )
        now = {"collator": collator_settings(self._training_collator()), "processors": [processor_settings(self.processing_class)]}
        stored = store.manifest.fingerprint
        if "seed" not in stored["collator"]:  # its draws change nothing
            now["collator"].pop("seed", None)
        parts = ["collator"]
        if stored["processors"] and None not in (stored["processors"][0], now["processors"][0]):
            now["processors"] += stored["processors"][1:]  # the teacher's own is not here to be compared
            parts.append("processors")
        store.check_fingerprint(now, parts)
        self._repeat_epochs(store, min(self.args.teacher_store_epochs or store.manifest.epochs, store.manifest.epochs))

    def _check_stored_examples(self, store: TeacherStore) -> None:
        """All examples have answers; of data without columns each is looked up when its batch is, since to read them all takes long."""
        if not hasattr(self.train_dataset, "with_format"):
            return
        ids = example_ids(self.train_dataset)
        for epoch in range(store.manifest.epochs):
            there = store.has(ids, epoch)
            if not there.all():
                raise ValueError(
                    f"The stored teacher in {str(store.folder)!r} has no answers to {int((~there).sum())} of {len(ids)} training examples "
                    f"(such as {EXAMPLE_ID} {ids[~there][0]}): it was stored for {store.manifest.examples} other ones. Train on those, or "
                    "pass the teacher and name another folder in teacher_store, which stores these."
                )

    def _check_stored_rows(self, store: TeacherStore) -> None:
        """Logits are stored at the positions, and of the classes, that are compared."""
        if not self._teacher_plan().logits:
            return
        stored, task = store.manifest.fingerprint["stored"], self.objective.task
        now = self._positions(self._logit_terms() if self._head == "full" else self.objective.terms.values())
        then = stored["positions"] if task in LANGUAGE_MODELS else None
        if then is not None and not {"all", f"all ({task})"} & set(then) and set(now) - set(then):
            raise ValueError(
                f"The stored teacher in {str(store.folder)!r} has logits at {' and '.join(then)} positions, but this run compares them at "
                f"{' and '.join(now)} ones. Set kd_positions to what it was stored with, or store the teacher again."
            )
        shared = self.objective.vocabulary or store.manifest.vocabulary
        if stored["classes"] is not None and stored["classes"] != min(shared, store.manifest.vocabulary):
            raise ValueError(
                f"The stored teacher in {str(store.folder)!r} has the largest of {stored['classes']} classes, but student and teacher "
                f"share {shared}. Store the teacher again, with this student."
            )

    def _repeat_epochs(self, store: TeacherStore, stored: int) -> None:
        """Where inputs change from epoch to epoch, those of `stored` ones come again and again."""
        self._store_epochs = stored
        if store.manifest.changes and stored < self._epochs_of_run():
            logger.warning(
                "The teacher's answers are stored for %d of %d epochs, and inputs change from epoch to epoch: masks and augmentation of "
                "these are repeated, the student's too. teacher_store_epochs=%d stores all.",
                stored,
                self._epochs_of_run(),
                self._epochs_of_run(),
            )

    def data_epoch(self, epoch: int) -> int:
        """The epoch that the collator draws for: where the teacher's inputs change with it, stored ones are repeated."""
        repeats = isinstance(self.teacher, StoredTeacher) and self.teacher.store.manifest.changes
        return epoch % self._store_epochs if repeats else epoch

    def get_train_dataloader(self):
        """As `Trainer`; with a stored teacher each batch carries the keys of its examples."""
        if not isinstance(self.teacher, StoredTeacher):
            return super().get_train_dataloader()
        collator = self.data_collator
        self.data_collator = KeyedCollator(collator, self.teacher.store.manifest.inputs, self._numbered, self._store_epochs)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator


class _KeptColumns(Dataset):
    """Rows of a data set that is none of `datasets`, without the columns that neither model nor the collator reads."""

    def __init__(self, dataset, names):
        self.dataset, self.names = dataset, frozenset(names)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i):
        row = self.dataset[i]
        return {name: value for name, value in row.items() if name in self.names} if isinstance(row, Mapping) else row


def _has_columns(dataset) -> bool:
    """Whether it is a `datasets.Dataset`, of which the trainer removes columns before the collator sees them."""
    import datasets

    return isinstance(dataset, datasets.Dataset)


def _lacks_numbers(dataset) -> bool:
    return _has_columns(dataset) and EXAMPLE_ID not in dataset.column_names
