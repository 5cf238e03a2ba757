"""What a distillation trainer writes and reads beside the student: adapters and layer maps in checkpoints, and the model card."""

from __future__ import annotations

import json
import logging
import os

from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from .hub import distillation_card
from .models.anatomy import unwrap_peft
from .models.layer_map import layer_map_table
from .run_card import card_fields
from .side_file import changed_maps, load_side_file, read_record, save_side_file


logger = logging.getLogger(__name__)


class TrainerFiles(Trainer):
    """A Trainer with an `objective` and a `card`, as [`DistillationTrainer`] sets them, and a `_bind` that resolves layer maps."""

    _renamed = False

    # ---- Checkpoints ----

    def _record(self) -> dict:
        maps = {name: term.pairs for name, term in self.objective.terms.items() if term.layered}
        return {"layer_maps": maps, "objective": self.objective.describe()}

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # A pickle that nothing reads, with the paths of this machine in it, and pushed with the rest.
            path = os.path.join(output_dir if output_dir is not None else self.args.output_dir, TRAINING_ARGS_NAME)
            if os.path.exists(path):
                os.remove(path)

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:  # before super(), which pushes and rotates
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            save_side_file(folder, self.objective, self._record())
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._renamed = False
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint, self.model if model is None else model)
        self._load_side_file(resume_from_checkpoint)

    def _load_best_model(self):
        self._renamed = False
        super()._load_best_model()
        self._load_renamed(self.state.best_model_checkpoint, self.model)
        if self.state.best_model_checkpoint and read_record(self.state.best_model_checkpoint) is not None:
            self._load_side_file(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result):
        self._renamed = bool(load_result.missing_keys and load_result.unexpected_keys)
        if not self._renamed:
            super()._issue_warnings_after_load(load_result)

    def _load_renamed(self, folder: str, model) -> None:
        """Loads weights that a checkpoint holds under other names than the model.

        Transformers writes some models (ViT, DeiT) under their older names, and its Trainer reads a checkpoint by the names in memory:
        it would go on from random weights with no more than a warning.
        """
        if not self._renamed:
            return
        inner = unwrap_peft(self.accelerator.unwrap_model(model))
        plain = isinstance(inner, PreTrainedModel) and inner is self.accelerator.unwrap_model(model)
        stored, info = inner, {"missing_keys": ["those of the model"], "unexpected_keys": []}
        if plain:
            stored, info = type(inner).from_pretrained(folder, output_loading_info=True)
        if info["missing_keys"] or info["unexpected_keys"]:
            raise ValueError(
                f"The checkpoint {os.path.basename(folder)} holds other weights than {type(inner).__name__} has (missing: "
                f"{sorted(info['missing_keys'])[:3]}, unexpected: {sorted(info['unexpected_keys'])[:3]}): training would go on from random "
                "ones. Resume with the model of that run, or start anew without resume_from_checkpoint."
            )
        inner.load_state_dict(stored.state_dict())

    def _load_side_file(self, folder: str) -> None:
        record = read_record(folder)
        if record is not None:
            changed = changed_maps(record, self._record()["layer_maps"])
            for name, (then, today) in changed.items():
                if "none" in (then, today) or then is None or self._layer_map_of(name) != "similar":
                    raise ValueError(
                        f"The checkpoint {os.path.basename(folder)} was trained with layer map {then} for the term {name!r}, now {today}. "
                        "Use the settings of that run, or start anew without resume_from_checkpoint."
                    )
            if changed:  # all by similarity, chosen on the untrained student: the choice of the run goes on
                self._bind(fixed_maps={name: then for name, (then, _) in changed.items()})
            if record["objective"] != json.loads(json.dumps(self.objective.describe())):
                logger.warning(
                    "The objective has changed since the checkpoint %s (then %s, now %s): the run goes on with the new one.",
                    os.path.basename(folder),
                    record["objective"],
                    self.objective.describe(),
                )
        load_side_file(folder, self.objective)

    def _layer_map_of(self, name: str):
        own = self.objective.terms[name].term.layer_map
        return self.args.layer_map if own is None else own

    # ---- The Hub ----

    def create_model_card(
        self,
        language=None,
        license=None,
        tags=None,
        model_name=None,
        finetuned_from=None,
        tasks=None,
        dataset_tags=None,
        dataset=None,
        dataset_args=None,
    ):
        """Writes `README.md` into `output_dir`: teacher, objective as resolved, layer maps, data, settings, results.

        What the trainer cannot know (results over seeds, limits, ...) is taken from `trainer.card`, a dict of
        [`CardContext`] fields, which wins over what the trainer finds. The arguments are those of `Trainer`.
        """
        if not self.is_world_process_zero():
            return
        given = {
            "student_name": model_name,
            "base_model": finetuned_from,
            "dataset": ", ".join([dataset] if isinstance(dataset, str) else dataset or []),
            "dataset_ids": dataset_tags,
            "pipeline_tag": tasks if isinstance(tasks, str) or not tasks else tasks[0],
            "license": license,
            "language": language,
            "tags": [tags] if isinstance(tags, str) else tags,
        }
        context = {**card_fields(self), **{name: value for name, value in given.items() if value}, **self.card}
        distillation_card(context).save(os.path.join(self.args.output_dir, "README.md"))

    def layer_map_tables(self) -> dict[str, str]:
        """Markdown table of the layer map of each term that has one."""
        return {
            name: "random, drawn anew each step" if term.pairs is None else layer_map_table(term.pairs, *term.depths)
            for name, term in self.objective.terms.items()
            if term.layered
        }
