"""The two models of a recipe: given by name, built from each other, or trained from scratch on embedded data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, set_seed

from .alignment import resolve_vocabulary
from .data.byte_level import SPECIAL_TOKENS as BYTE_LEVEL_KINDS
from .data.byte_level import train_byte_level
from .data.tokenizer import train_wordpiece
from .data.vocabulary import prune_tokenizer
from .models.layer_map import resolve_layer_map
from .models.peft_student import lora_config, wrap_student
from .models.student import build_student
from .recipe_arguments import RecipeArguments
from .stages import resolve_stages
from .suggest import did_you_mean
from .teachers.loading import AUTO_CLASSES, load_named_part, load_teacher, load_tokenizer


# Maps that are drawn or measured anew, or that only a built student knows: weights cannot be copied by them.
_NO_COPIES = ("random", "similar", "original")


class ModelPair:
    """Teacher, students and tokenizer of a recipe.

    A teacher given by name is loaded at once, so that the recipe can look at its labels; `complete` makes everything else.

    Args:
        recipe: [`RecipeArguments`].
        args: [`DistillationTrainingArguments`].
        task: which head, a key of `AUTO_CLASSES`: `sequence`, `token`, `question_answering`, `masked_lm`, `causal_lm`, `base`.
        entries: config entries that the data decide, such as `num_labels`, for a given teacher that is still to be fine-tuned.

    Attributes:
        teacher: the teacher; a recipe that has trained it puts it back here.
        teacher_is_given: by name, so not from scratch.
        tokenizer: of the student, and of a teacher from scratch.
        teacher_tokenizer: what lies beside the teacher, or `tokenizer`; `None` where there is none.

    Raises:
        ValueError: for checkpoints that cannot be had, sizes that do not exist, vocabularies that differ.
    """

    def __init__(self, recipe: RecipeArguments, args, task: str, entries: dict[str, Any] | None = None):
        self.recipe, self.args, self.task = recipe, args, task
        self.options = {"cache_dir": recipe.cache_dir, "trust_remote_code": recipe.trust_remote_code}
        self.entries: dict[str, Any] = dict(entries or {})
        self.teacher: nn.Module | None = None
        self.tokenizer = self.teacher_tokenizer = None
        name = recipe.teacher_model_name_or_path
        self.teacher_is_given = name is not None
        if recipe.prune_vocabulary and (name is None or recipe.model_name_or_path is not None):
            raise ValueError(
                "prune_vocabulary cuts a given teacher's vocabulary for a student that is built from it, but "
                + (
                    "no teacher is given. Its tokenizer is trained on your texts: set vocab_size"
                    if name is None
                    else "a student is given too"
                )
                + ", or leave prune_vocabulary out."
            )
        self._check_config()
        self.peft_config = lora_config(recipe, task)
        if recipe.stages is not None:
            resolve_stages(recipe.stages)  # a misspelt stage should not wait for the teacher's training
        if name is not None:
            own = {**self.entries, **self._other_head} if recipe.teacher_training else {}
            self.teacher = load_teacher(name, task, {**self.options, **own, **(args.teacher_model_init_kwargs or {})})

    @property
    def _other_head(self) -> dict[str, bool]:
        return {"ignore_mismatched_sizes": True} if getattr(self.recipe, "ignore_mismatched_sizes", False) else {}

    @property
    def auto_class(self):
        return getattr(transformers, AUTO_CLASSES[self.task])

    @property
    def token_types(self) -> bool | None:
        """True where the teacher reads segments, which a student's own tokenizer may leave out; `None` leaves it to the tokenizer."""
        return True if getattr(self.teacher.config, "type_vocab_size", 0) > 1 else None

    @property
    def needs_teacher_training(self) -> bool:
        return not self.teacher_is_given or bool(self.recipe.teacher_training)

    def _check_config(self) -> None:
        sizes = self.recipe.teacher_config
        if sizes:
            known = self._scratch_config({}).to_dict()
            for key in sizes:
                if key not in known:
                    raise ValueError(f"unknown key {key!r} in teacher_config.{did_you_mean(key, known)} It would have no effect")

    def _scratch_config(self, sizes: dict[str, Any]):
        kind = (self.recipe.teacher_config or {}).get("model_type", "bert")
        return AutoConfig.for_model(kind, **{key: value for key, value in sizes.items() if key != "model_type"})

    def complete(self, texts: Iterable[str] = (), max_length: int = 512, entries: dict[str, Any] | None = None) -> ModelPair:
        """Tokenizer, and a teacher from scratch where none is given.

        Args:
            texts: for a tokenizer trained from scratch; never held-out data.
            max_length: tokens per row, the positions of a model from scratch.
            entries: config entries of both models, such as labels.
        """
        recipe, args = self.recipe, self.args
        self.entries |= entries or {}
        teacher_name, student_name = recipe.teacher_model_name_or_path, recipe.model_name_or_path
        own = recipe.tokenizer_name or student_name or teacher_name
        if own:
            self.tokenizer = load_named_part(AutoTokenizer, own, "tokenizer", **self.options)
        else:
            kind = (recipe.teacher_config or {}).get("model_type")
            with args.main_process_first(desc="tokenizer"):
                if kind in BYTE_LEVEL_KINDS:
                    self.tokenizer = train_byte_level(texts, vocab_size=recipe.vocab_size, kind=kind, max_length=max_length)
                else:
                    self.tokenizer = train_wordpiece(texts, vocab_size=recipe.vocab_size, max_length=max_length)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # GPT-2; padding is told by the attention mask, not by the id
        if self.teacher is not None:
            for key, value in self.entries.items():
                setattr(self.teacher.config, key, value)
            self.teacher_tokenizer = load_tokenizer(teacher_name)
            if student_name is not None:
                vocabulary = load_named_part(AutoConfig, student_name, "student", revision=recipe.model_revision, **self.options).vocab_size
            else:
                vocabulary = self.teacher.config.vocab_size
            resolve_vocabulary(vocabulary, self.teacher.config.vocab_size, self.tokenizer, self.teacher_tokenizer)
            if recipe.prune_vocabulary:
                self._prune(texts)
        else:
            self.teacher_tokenizer = self.tokenizer
            self.teacher = self.from_scratch(recipe.teacher_config, max_length, self.entries)
        return self

    def _prune(self, texts: Iterable[str]) -> None:
        """Cuts tokenizer and teacher to the tokens of `texts`; the teacher without its other rows answers as before."""
        name = self.teacher.config._name_or_path
        with self.args.main_process_first(desc="vocabulary"):
            self.tokenizer, kept = prune_tokenizer(self.tokenizer, list(texts))
        self.teacher = build_student(self.teacher, vocabulary=kept)
        self.teacher.config._name_or_path = name
        self.teacher_tokenizer = self.tokenizer

    def from_scratch(self, sizes: dict[str, Any] | None, max_length: int, entries: dict[str, Any] | None = None) -> nn.Module:
        """A model of this task with random weights, seeded by `args.seed`, in the vocabulary of the tokenizer."""
        tokenizer = self.tokenizer
        ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        if self.task == "causal_lm" or (sizes or {}).get("model_type") == "roberta":
            first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
            ids |= {"bos_token_id": tokenizer.bos_token_id if first is None else first}
            ids |= {"eos_token_id": tokenizer.eos_token_id if last is None else last}
        # RoBERTa counts its positions from pad_token_id + 1 on.
        positions = max_length + (tokenizer.pad_token_id + 1 if (sizes or {}).get("model_type") == "roberta" else 0)
        config = self._scratch_config({"max_position_embeddings": positions, **ids, **(entries or {}), **(sizes or {})})
        set_seed(self.args.seed)
        return self.auto_class.from_config(config)

    def student(self, seed: int, say: Callable | None = None, **sizes: Any) -> nn.Module:
        """A fresh student: the given checkpoint, or one built from the teacher as it is now.

        Args:
            seed: of the weights that are not copied.
            say: called with one line on what was copied.
            sizes: instead of `student_layers` and `student_config`, as in `build_student` (for the student of one stage).
        """
        recipe = self.recipe
        set_seed(seed)
        config = self.peft_config
        if recipe.model_name_or_path is not None and not sizes:
            given = load_named_part(
                self.auto_class,
                recipe.model_name_or_path,
                "student",
                revision=recipe.model_revision,
                **self.options,
                **self.entries,
                **self._other_head,
            )
            return given if config is None else wrap_student(given, config, seed)
        sizes = {"num_hidden_layers": recipe.student_layers, **(recipe.student_config or {}), **sizes}
        depth = self.teacher.config.num_hidden_layers
        if sizes["num_hidden_layers"] is None:
            sizes["num_hidden_layers"] = max(depth // 2, 1)
        copied, own = self._copied_map(sizes["num_hidden_layers"], depth), self.args.layer_map
        copy_weights = recipe.student_init == "teacher"
        student = build_student(self.teacher, layer_map=copied, copy_weights=copy_weights, seed=seed, **sizes)
        if say is not None and copy_weights:
            if copied != own:
                say(f"Weights are copied by {copied!r}: {own!r} does not give each student block one teacher block")
            say(f"Student from teacher: {student.copy_report}")
        return student if config is None else wrap_student(student, config, seed)

    def _copied_map(self, layers: int, depth: int) -> Any:
        own = self.args.layer_map
        if own in _NO_COPIES or layers != self.recipe.student_layers and ":" in own:  # pairs are those of the run's student
            return "uniform"
        return own if [s for s, _ in resolve_layer_map(own, layers, depth)] == list(range(layers)) else "uniform"
