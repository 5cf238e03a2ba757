"""What all recipes ask for: the two models, the stages, the seeds. Light to import, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from .peft_arguments import PeftArguments


def recipe_field(default, text: str, **more):
    """A dataclass field with its help text, for the arguments of a recipe; a callable default is a factory.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Arguments:
        ...     max_seq_length: int = recipe_field(128, "Tokens per row; longer texts are cut.")
        >>> Arguments().max_seq_length
        128
    """
    metadata = {"help": text, **more}
    return field(default_factory=default, metadata=metadata) if callable(default) else field(default=default, metadata=metadata)


_ = recipe_field


@dataclass
class RecipeArguments(PeftArguments):
    """Student, teacher, stages and seeds of a recipe; what is trained how is in [`DistillationTrainingArguments`]."""

    model_name_or_path: str | None = _(None, "Student checkpoint (folder or Hub id). Default: built from the teacher.")
    student_layers: int | None = _(None, "Blocks of a student built from the teacher. Default: half of the teacher's.")
    student_config: dict | None = _(
        None, "Further sizes of a student built from the teacher: hidden_size, num_attention_heads, intermediate_size, ..."
    )
    student_init: str = _(
        "teacher", "Weights of a student built from the teacher: copied by layer_map, or random.", choices=["teacher", "random"]
    )
    teacher_model_name_or_path: str | None = _(None, "Teacher checkpoint (folder or Hub id). Default: a small model trained from scratch.")
    teacher_config: dict | None = _(None, "Sizes of a teacher trained from scratch, as in BertConfig (or that of its model_type).")
    teacher_training: dict | None = _(
        None, "Training arguments of the teacher, such as max_steps; set to fine-tune a given checkpoint too."
    )
    allow_weak_teacher: bool = _(False, "Go on although the teacher is no better than a trivial answer.")
    tokenizer_name: str | None = _(None, "Tokenizer, where it lies neither beside the teacher nor beside the student.")
    vocab_size: int = _(3000, "Pieces of the tokenizer trained for a teacher from scratch.")
    prune_vocabulary: bool = _(
        False, "Keep only the tokens that the training texts use, in both models; only for a student built from a given teacher."
    )
    model_revision: str = _("main", "Revision of the student checkpoint.")
    trust_remote_code: bool = _(False, "Run code that comes with a checkpoint.")
    cache_dir: str | None = _(None, "Where downloads are kept.")
    stages: list[dict] | None = _(
        None,
        "The student's training in several steps, one mapping each: name, data, teacher, student, progressive, carry_adapters, "
        "and any training arguments of that stage (objective or weights, max_steps, learning_rate, frozen_parts, ...).",
    )
    max_train_samples: int | None = _(None, "Use only that many training rows.")
    max_eval_samples: int | None = _(None, "Use only that many rows of each held-out split.")
    preprocessing_num_workers: int | None = _(None, "Processes for tokenizing.")
    seeds: list[int] = _(lambda: [0, 1, 2], "Seeds of the student; the first one is published.")
    baselines: bool = _(True, "Also train what the distilled student must be compared with: the same student alone, and so on.")
    cpu_threads: int | None = _(
        None, "Threads of each process on CPU. Default: all cores, shared among processes; `accelerate launch` alone would leave one."
    )
    overwrite_output_dir: bool = _(False, "Start anew in an output_dir that holds another run.")


@dataclass
class TextDataArguments(RecipeArguments):
    """The data of a text classification recipe beside its models: see [`load_text_data`]."""

    task_name: str | None = _(None, "A GLUE task: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb or wnli.")
    dataset_name: str | None = _(None, "A data set on the Hub.")
    dataset_config_name: str | None = _(None, "Its configuration.")
    train_file: str | None = _(None, "Training data: csv, tsv, json, jsonl or parquet.")
    validation_file: str | None = _(None, "Held-out data, as train_file.")
    test_file: str | None = _(None, "Held-out data where there is no validation_file.")
    text_column_names: list[str] = _(list, "One or two text columns.")
    label_column_name: str | None = _(None, "Column of the labels.")
    labelled_rows: int | None = _(
        None, "Training rows whose label the student sees; the others are transfer text, on which it hears the teacher."
    )


@dataclass
class ImageDataArguments(RecipeArguments):
    """The data of an image classification recipe beside its models, see [`load_image_data`], and how images are prepared."""

    dataset_name: str | None = _(None, "A data set on the Hub.")
    dataset_config_name: str | None = _(None, "Its configuration.")
    train_dir: str | None = _(None, "Folder of training images, one folder a class (imagefolder).")
    validation_dir: str | None = _(None, "Folder of held-out images, as train_dir.")
    train_val_split: float | None = _(0.15, "Share of the training images that is held out where there is no validation split.")
    image_column_name: str | None = _(None, "Column of the images. Default: image or img.")
    label_column_name: str | None = _(None, "Column of the labels. Default: label or labels.")
    labelled_rows: int | None = _(
        None, "Training images whose label the student sees; the others are transfer images, on which it hears the teacher."
    )
    validation_share: float | None = _(
        None, "Measure on that share of the training images instead of the held-out split, for the choice of settings."
    )
    ignore_mismatched_sizes: bool = _(False, "Give a checkpoint for other labels a new head; it has to be trained (teacher_training).")
    image_processor_name: str | None = _(None, "Image processor, where it lies neither beside the student nor beside the teacher.")
    image_size: int = _(224, "Height and width for models that have no image processor yet.")
    image_mean: list[float] = _(lambda: [0.5, 0.5, 0.5], "Means of the channels, for models that have no image processor yet.")
    image_std: list[float] = _(lambda: [0.5, 0.5, 0.5], "Standard deviations of the channels, likewise.")
    augmentation: dict | None = _(
        None, "Random changes of the training images: random_resized_crop, pad_crop, horizontal_flip, shift, rotate, color_jitter, ..."
    )
    mixup_alpha: float = _(0.0, "Mixup of training images: alpha of the Beta distribution; 0 turns it off.")
    cutmix_alpha: float = _(0.0, "CutMix of training images, likewise; with both, each batch draws one of the two.")
