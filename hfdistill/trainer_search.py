"""`Trainer.hyperparameter_search` for a trainer that has an objective: what a trial sets is known before its student is made."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, set_seed
from transformers.trainer_utils import enable_full_determinism


class TrainerSearch(Trainer):
    """A Trainer whose `objective` is that of distillation, while a search keeps the value of a trial under the same name."""

    _search: _Searched | None = None

    def hyperparameter_search(self, *args, **kwargs):
        """As `Trainer.hyperparameter_search`, for any argument: `temperature`, `kd_weight`, `objective`, `learning_rate`, `seed`, ...

        Every trial gets a fresh student of its own seed from `model_init` and its own objective, and what could not train is refused
        as at construction. It was tried with optuna alone.

        Raises:
            ValueError: with `teacher_store`, whose folder is for one run.
        """
        if self.args.teacher_store is not None:
            raise ValueError(
                "hyperparameter_search with teacher_store: trials ask other questions (signals, temperature, seed), and one folder answers "
                "those of one run. Leave teacher_store out, or store the teacher first and pass teacher=StoredTeacher(folder)."
            )
        self._search = _Searched(self)
        try:
            return Trainer.hyperparameter_search(self._search, *args, **kwargs)
        finally:
            self._search = None

    def _report_to_hp_search(self, trial, step, metrics):
        terms = self.objective
        try:
            super()._report_to_hp_search(trial, step, metrics)
        finally:  # a pruned trial leaves with an exception
            if self.objective is not terms:
                self._search.objective, self.objective = self.objective, terms

    def _set_up_trial(self, trial) -> None:
        """Transformers sets the arguments of a trial after its model was made, too late for the seed and the objective."""
        if trial is not None and self._search is not None:
            self._hp_search_setup(trial)
            self.args._check_numbers()
            self.args._check_choices()
            enable_full_determinism(self.args.seed) if self.args.full_determinism else set_seed(self.args.seed)


class _Searched:
    """The trainer as the search sees it: the same but for `objective`, which is the value of the trial."""

    def __init__(self, trainer: Trainer):
        vars(self).update(_trainer=trainer, objective=None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_trainer":  # copies ask before there is a trainer
            raise AttributeError(name)
        return getattr(self._trainer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "objective":
            vars(self)[name] = value
        else:
            setattr(self._trainer, name, value)
