"""The model card of a distilled student: who taught it, by which losses, and what came of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .citations import citations_for
from .redaction import shareable
from .report import format_value, results_table
from .suggest import did_you_mean


if TYPE_CHECKING:
    from huggingface_hub import ModelCard


CARD_TAGS = ("knowledge-distillation", "distillation", "hfdistill", "generated_from_trainer")
DEFAULT_LIMITS = (
    "The student learnt to answer as its teacher does, so it shares the teacher's mistakes and biases and adds some of its own. It was "
    "measured on the data named above and on nothing else; measure it on yours before you rely on it."
)
QUESTION_ANSWERING = """\
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForQuestionAnswering.from_pretrained("{name}")
question, context = "What does it return?", "Reads a line. Returns the text of it."
inputs = tokenizer(question, context, truncation="only_second", return_tensors="pt")
output = model(**inputs)
# The best start and end that are both in the context, in this order; long contexts were measured in windows.
inside = torch.tensor([part == 1 for part in inputs.sequence_ids(0)])
scores = output.start_logits[0][:, None] + output.end_logits[0]
scores = scores.where(torch.outer(inside, inside).triu(), -torch.inf)
start, end = divmod(int(scores.argmax()), len(inside))
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))"""
# Hub ids, "user/name" or "name": what may stand in base_model, and in a pipeline() call that others can copy.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ABSOLUTE = re.compile(r"(/|~|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\)")


@dataclass
class CardContext:
    """What a model card says.

    Args:
        student_name (`str`): name of the student; a path is cut to its last component.
        teacher_name (`str`, *optional*): Hub id or name of the teacher.
        base_model (`str` or `list[str]`, *optional*): the checkpoint the student's *weights* start from; leave it out for a student
            that started from random numbers. A local folder is named in the text, but not in the metadata, which links to the Hub.
        weights_from (`str`, *optional*): what they start from in words, where that has no name: blocks of a teacher trained in the same
            run.
        objective (`list[dict]`): one entry a part of the loss, as `Objective.describe()` gives them: `name`, `loss`, `weight`,
            `layer_map`, `options` (such as `temperature`), ...
        layer_map_table (`str`, *optional*): Markdown.
        stages (`list[dict]`): rows of the table of stages, for a student trained in several.
        dataset (`str`, *optional*): what it was trained on, in words or as a Hub id.
        dataset_ids (`str` or `list[str]`, *optional*): Hub ids only; nothing for embedded or local data.
        hyperparameters (`dict`): name to value.
        results (`list[dict]`): rows for `results_table`; see `results_rows`.
        results_note (`str`, *optional*): a sentence below the table.
        metric_values (`dict`): the student's own results, metric to number; they go into the metadata (`model-index`).
        task_name (`str`, *optional*): what the results were measured on; default: `dataset`.
        pipeline_tag (`str`, *optional*): such as `text-classification`.
        license (`str`, *optional*): it should be compatible with the teacher's.
        language (`str` or `list[str]`, *optional*): ISO codes.
        tags (`list[str]`): further tags.
        versions (`dict`): library to version.
        limits (`str`, *optional*): what the model is not good for.
        summary (`str`, *optional*): the first sentence.
        repo_id (`str`, *optional*): under which the student is published, for the example.
        library_name (`str`): `transformers`, or `peft` where the adapters alone are published; they need their base model.
        usage (`str`, *optional*): Python code that loads the student; default: a `pipeline` (or the Auto class), where there is a
            `pipeline_tag`.
    """

    student_name: str
    teacher_name: str | None = None
    base_model: str | Sequence[str] | None = None
    weights_from: str | None = None
    objective: Sequence[Mapping[str, Any]] = ()
    layer_map_table: str | None = None
    stages: Sequence[Mapping[str, Any]] = ()
    dataset: str | None = None
    dataset_ids: str | Sequence[str] | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[Mapping[str, Any]] = ()
    results_note: str | None = None
    metric_values: Mapping[str, float] = field(default_factory=dict)
    task_name: str | None = None
    pipeline_tag: str | None = None
    license: str | None = None
    language: str | Sequence[str] | None = None
    tags: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    limits: str | None = None
    summary: str | None = None
    repo_id: str | None = None
    library_name: str = "transformers"
    usage: str | None = None


def distillation_card(context: CardContext | Mapping[str, Any]) -> ModelCard:
    """Render the model card of a distilled student, without a network.

    Absolute paths are cut to their last component and tokens hidden, wherever they occur in `context`.

    Args:
        context ([`CardContext`] or `dict` with its fields).

    Returns:
        `huggingface_hub.ModelCard`: `card.save(path)` writes it, `card.data` is its metadata.

    Raises:
        ValueError: for keys that [`CardContext`] does not have, or no student name.

    Example:
        >>> card = distillation_card({"student_name": "tiny", "teacher_name": "org/big", "objective": [{"loss": "cosine", "weight": 1.0}]})
        >>> card.data.teacher_model
        'org/big'
    """
    from huggingface_hub import ModelCard

    if isinstance(context, Mapping):
        known = [entry.name for entry in dataclasses.fields(CardContext)]
        for key in context:
            if key not in known:
                raise ValueError(f"A model card has no place for {key!r}.{did_you_mean(key, known) or f' Known: {known}.'}")
        context = CardContext(**context)
    if not context.student_name:
        raise ValueError("A model card needs the name of the student: student_name is empty.")
    values = {entry.name: getattr(context, entry.name) for entry in dataclasses.fields(context)}
    local_base = [base for base in _listed(values["base_model"]) if not _is_hub_id(base)]
    card = CardContext(**shareable(values))
    card.summary = card.summary or _summary(card)
    parts = [
        {
            **({"stage": part["stage"]} if "stage" in part else {}),
            "name": part.get("name") or part.get("loss"),
            **{k: v for k, v in part.items() if k != "options"},
            **part.get("options", {}),
        }
        for part in card.objective
    ]
    base = ", ".join(_listed(card.base_model))
    return ModelCard.from_template(
        _metadata(card, hub_bases=[base for base in _listed(values["base_model"]) if base not in local_base]),
        template_path=str(template_path()),
        c=dataclasses.replace(card, base_model=base or None),
        objective_table=results_table([{key: _cell(value) for key, value in part.items()} for part in parts]) if parts else "",
        stages_table=results_table([{key: _cell(value) for key, value in stage.items()} for stage in card.stages]) if card.stages else "",
        hyperparameter_table=results_table(
            [{"name": f"`{key}`", "value": str(_cell(value))} for key, value in card.hyperparameters.items()]
        ) if card.hyperparameters else "",
        results_table=results_table(card.results) if card.results else "",
        versions_line=", ".join(f"{name} {version}" for name, version in card.versions.items()),
        citations=citations_for([str(part.get("loss")) for part in card.objective]),
        usage=_usage(card),
        default_limits=DEFAULT_LIMITS,
    )  # fmt: skip


def template_path() -> Path:
    """The Jinja template of the card: beside the package in a checkout, inside it when installed from a wheel.

    Raises:
        FileNotFoundError: when neither is there, which means a broken installation.
    """
    package = Path(__file__).resolve().parent
    for path in (package / "model_card_template.md", package.parent / "model_cards" / "template.md"):
        if path.is_file():
            return path
    raise FileNotFoundError("The template of the model card is missing from this installation of hfdistill. Install it again.")


def _metadata(card: CardContext, hub_bases: list[str]):
    from huggingface_hub import EvalResult, ModelCardData

    datasets = _listed(card.dataset_ids)
    results = [
        EvalResult(
            task_type=card.pipeline_tag or "other",
            dataset_type=datasets[0] if datasets else "other",
            dataset_name=card.task_name or card.dataset or "other",
            metric_type=metric,
            metric_value=float(value),
        )
        for metric, value in card.metric_values.items()
        if value is not None
    ]
    fields = {
        "base_model": hub_bases[0] if len(hub_bases) == 1 else hub_bases or None,
        # There is no relation "distilled"; without one the Hub would guess.
        "base_model_relation": ("adapter" if card.library_name == "peft" else "finetune") if hub_bases else None,
        "library_name": card.library_name,
        "pipeline_tag": card.pipeline_tag,
        "tags": list(dict.fromkeys([*CARD_TAGS, *card.tags])),
        "datasets": datasets or None,
        "metrics": list(card.metric_values) or None,
        "license": card.license,
        "language": card.language,
        "teacher_model": card.teacher_name,
        "model_name": card.student_name if results else None,
        "eval_results": results or None,
    }
    return ModelCardData(**{key: value for key, value in fields.items() if value is not None})


def _summary(card: CardContext) -> str:
    task = f" for {card.pipeline_tag.replace('-', ' ')}" if card.pipeline_tag else ""
    teacher = f", distilled from {card.teacher_name}" if card.teacher_name else ""
    kind = "PEFT adapters" if card.library_name == "peft" else "A small model"
    return f"{kind}{task}{teacher} with hfdistill."


def _usage(card: CardContext) -> str:
    if card.usage or not card.pipeline_tag or card.library_name == "peft":
        return card.usage or ""
    name = card.repo_id or card.student_name
    if card.pipeline_tag == "question-answering":  # Transformers 5 has no pipeline for it
        return QUESTION_ANSWERING.format(name=name)
    return f'from transformers import pipeline\n\nmodel = pipeline("{card.pipeline_tag}", model="{name}")'


def _cell(value: Any) -> Any:
    """Schedules, layer maps and lists as text; numbers in full (a learning rate of 3e-5 is not 0.000)."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_cell(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):  # a layer map
            return ", ".join(f"{student}:{teacher}" for student, teacher in value)
        return ", ".join(str(_cell(entry)) for entry in value)
    return value if value is None or isinstance(value, str) else format_value(value)


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [] if not value else [value] if isinstance(value, str) else list(value)


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not _ABSOLUTE.match(name) and not Path(name).is_dir()
