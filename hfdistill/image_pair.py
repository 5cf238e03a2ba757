"""The two models of an image recipe: given by name, built from each other, or trained from scratch; and how each wants its images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, set_seed

from .data.image_collator import Preparation
from .model_pair import ModelPair
from .models.peft_student import wrap_student
from .suggest import did_you_mean
from .teachers.loading import load_image_processor, load_named_part


logger = logging.getLogger(__name__)


class ImageModelPair(ModelPair):
    """Teacher, students and image processors of a recipe.

    Args:
        recipe: [`ImageDataArguments`].
        args: [`DistillationTrainingArguments`].
        entries: config entries that the data decide, such as `num_labels`.

    Attributes:
        image_processor: prepares images for the student.
        teacher_image_processor: for the teacher, where one lies beside it; else the student's.

    A `student_config` with a `model_type` is a model of that family with random weights; without one the student is built from the
    teacher, narrower or shallower (transformers only). `architectures: [DeiTForImageClassificationWithTeacher]` names its class
    where a family has several.

    Raises:
        ValueError: for checkpoints that cannot be had, and config entries that do not exist.
    """

    default_kind = "vit"

    def __init__(self, recipe, args, entries: dict[str, Any] | None = None):
        super().__init__(recipe, args, "image", entries)
        self.image_processor = self.teacher_image_processor = None
        another = "model_type" in (recipe.student_config or {})
        if another:
            self._check_entries(recipe.student_config, "student_config")
        config = self.teacher.config if self.teacher is not None else self._scratch_config(recipe.teacher_config or {})
        if not another and recipe.model_name_or_path is None and not hasattr(config, "num_hidden_layers"):
            raise ValueError(
                f"A student cannot be built from the teacher, a {config.model_type}: only transformers are cut to fewer or "
                "narrower blocks. Describe the student with student_config (model_type: resnet, hidden_sizes: [...], ...), or "
                "pass --model_name_or_path."
            )

    def _check_config(self) -> None:
        if self.recipe.teacher_config:
            self._check_entries(self.recipe.teacher_config, "teacher_config")

    def _check_entries(self, sizes: Mapping[str, Any], where: str) -> None:
        known = self._scratch_config({"model_type": sizes.get("model_type", self.default_kind)}).to_dict()
        for key in sizes:
            if key not in known and key != "architectures":
                raise ValueError(f"unknown key {key!r} in {where}.{did_you_mean(key, known)} It would have no effect")
        _model_class(sizes)

    def _scratch_config(self, sizes: Mapping[str, Any]):
        own = {key: value for key, value in sizes.items() if key not in ("model_type", "architectures")}
        return AutoConfig.for_model(sizes.get("model_type", self.default_kind), **own)

    def complete(self, entries: dict[str, Any] | None = None) -> ImageModelPair:
        """Image processors, and a teacher from scratch where none is given.

        Args:
            entries: config entries of both models, such as labels.
        """
        recipe = self.recipe
        self.entries |= entries or {}
        named = recipe.image_processor_name or recipe.model_name_or_path
        if named:
            self.image_processor = load_named_part(AutoImageProcessor, named, "image processor of the student", **self.options)
        if recipe.teacher_model_name_or_path:
            self.teacher_image_processor = load_image_processor(recipe.teacher_model_name_or_path, **self.options)
            if self.teacher_image_processor is None:
                logger.warning(
                    "There is no image processor beside the teacher %s: it gets images as the student does, whatever it was trained on. "
                    "Save its processor there (preprocessor_config.json) if it answers badly.",
                    recipe.teacher_model_name_or_path,
                )
        if self.image_processor is None:
            built = "model_type" not in (recipe.student_config or {})
            self.image_processor = self.teacher_image_processor if built and self.teacher_image_processor is not None else self._own()
        if self.teacher_image_processor is None:
            self.teacher_image_processor = self.image_processor
        if self.teacher is None:
            self.teacher = self.from_scratch(recipe.teacher_config or {}, self.entries, self.teacher_image_processor)
        else:
            for key, value in self.entries.items():
                setattr(self.teacher.config, key, value)
        return self

    def _own(self):
        """A plain processor: resize to a square, scale to 0..1, normalise."""
        size = {"height": self.recipe.image_size, "width": self.recipe.image_size}
        # The Pil class is named because the Auto classes warn where torchvision is absent; it is saved as ViTImageProcessor.
        return transformers.ViTImageProcessorPil(size=size, image_mean=self.recipe.image_mean, image_std=self.recipe.image_std)

    def from_scratch(self, sizes: Mapping[str, Any], entries: Mapping[str, Any] | None = None, processor=None, seed=None) -> nn.Module:
        """A model with random weights.

        Args:
            sizes: config entries; `model_type` (default ViT) and `architectures` choose the class.
            entries: further config entries, such as labels.
            processor: whose image size is that of the model, where its config has one. Default: the student's.
            seed: of the weights. Default: `args.seed`.
        """
        preparation = Preparation(processor or self.image_processor)
        preparation.check_size()
        size = preparation.size
        plain = self._scratch_config({"model_type": sizes.get("model_type", self.default_kind)})
        own = {"image_size": size[0] if size[0] == size[1] else list(size)} if hasattr(plain, "image_size") else {}
        config = self._scratch_config({**own, **(entries or {}), **sizes})
        set_seed(self.args.seed if seed is None else seed)
        model_class = _model_class(sizes)
        return self.auto_class.from_config(config) if model_class is None else model_class(config)

    def student(self, seed: int, say: Callable | None = None, **sizes: Any) -> nn.Module:
        """A fresh student: the given checkpoint, one of another family from scratch, or one built from the teacher.

        Args:
            seed: of the weights that are not copied.
            say: called with one line on what was copied.
            sizes: instead of `student_layers` and `student_config` (for the student of one stage).
        """
        own = {**(self.recipe.student_config or {}), **sizes}
        if self.recipe.model_name_or_path is not None and not sizes or "model_type" not in own:
            return super().student(seed, say, **sizes)
        student = self.from_scratch(own, self.entries, seed=seed)
        return student if self.peft_config is None else wrap_student(student, self.peft_config, seed)


def _model_class(sizes: Mapping[str, Any]) -> type[nn.Module] | None:
    """The class that `architectures` names; `None` where it names none."""
    names = sizes.get("architectures") or []
    if not names:
        return None
    model_class = getattr(transformers, names[0], None)
    if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        raise ValueError(f"architectures names {names[0]!r}, which is no model of Transformers.{did_you_mean(names[0], dir(transformers))}")
    return model_class
