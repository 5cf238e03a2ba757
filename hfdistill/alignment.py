"""Do the two models mean the same by their outputs? Label order by name, vocabularies by tokenizer."""

from __future__ import annotations

import json
import re


def _names(config) -> list[str]:
    id2label = getattr(config, "id2label", None) or {}
    return [str(id2label[i]) for i in sorted(id2label, key=int)]


def _generic(names: list[str]) -> bool:
    return all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def resolve_label_order(student_config, teacher_config, order: str = "by_name") -> list[int] | None:
    """Teacher column of each student label, or `None` when the columns already agree.

    Args:
        student_config, teacher_config: configs with `id2label`.
        order: `by_name` compares names (case does not matter); `by_index` trusts the positions.

    Raises:
        ValueError: when the counts or the sets of names differ, or when only one side has names.
    """
    student, teacher = _names(student_config), _names(teacher_config)
    if len(student) != len(teacher):
        raise ValueError(
            f"The student has {len(student)} labels {student[:5]} and the teacher {len(teacher)} {teacher[:5]}: their logits cannot be "
            "compared. Build the student with the teacher's labels (build_student keeps them), or train it without kd_weight."
        )
    if order == "by_index":
        return None
    s, t = [name.casefold() for name in student], [name.casefold() for name in teacher]
    if s == t:
        return None
    if _generic(student) != _generic(teacher):
        named, generic = ("teacher", "student") if _generic(student) else ("student", "teacher")
        raise ValueError(
            f"The {named} names its labels {(teacher if named == 'teacher' else student)[:5]} and the {generic} only LABEL_0, LABEL_1, "
            "...: "
            "whether they are in the same order cannot be checked, and a wrong order trains a wrong student. Set "
            f"{generic}.config.id2label, "
            "or teacher_label_order='by_index' if the positions agree."
        )
    if sorted(s) != sorted(t):
        only_student, only_teacher = sorted(set(s) - set(t))[:5], sorted(set(t) - set(s))[:5]
        raise ValueError(
            f"The label sets differ: only the student has {only_student}, only the teacher {only_teacher}. Columns of the teacher's logits "
            "would be matched to other labels. Rename the labels in config.id2label, or set teacher_label_order='by_index' if they mean "
            "the same."
        )
    return [t.index(name) for name in s]


def resolve_vocabulary(student_size: int, teacher_size: int, student_tokenizer=None, teacher_tokenizer=None) -> int | None:
    """Shared vocabulary size when it differs only by padding rows, else `None` (the sizes agree).

    Both models read the same `input_ids`, so two tokenizers that disagree are refused whatever the task.

    Raises:
        ValueError: when the tokenizers disagree, or the sizes differ and it cannot be shown that they agree.
    """
    both = student_tokenizer is not None and teacher_tokenizer is not None
    if both:
        student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        shared = min(student_size, teacher_size)
        differ = [token for token in student.keys() | teacher.keys() if student.get(token) != teacher.get(token)]
        differ = [token for token in differ if min(student.get(token, shared), teacher.get(token, shared)) < shared]
        if differ:
            examples = [f"{token!r}: {student.get(token)} / {teacher.get(token)}" for token in sorted(differ)[:3]]
            raise ValueError(
                f"Student and teacher tokenizers differ in {len(differ)} tokens ({'; '.join(examples)}; student / teacher id). The "
                "teacher would "
                "read other words than the student. Use a student with the teacher's tokenizer (build_student keeps the vocabulary)."
            )
    if student_size == teacher_size:
        return None
    if not both:
        raise ValueError(
            f"The vocabularies differ: student {student_size}, teacher {teacher_size}. If only the padding differs, pass both tokenizers "
            "(processing_class and teacher_processing_class) so that it can be checked; otherwise use a student with the teacher's "
            "tokenizer."
        )
    return min(student_size, teacher_size)


def teacher_token_ids(student_tokenizer, teacher_tokenizer) -> list[int] | None:
    """Teacher id of each token of a student tokenizer that `prune_tokenizer` cut out of the teacher's, else `None`.

    With it the teacher reads `ids[input_ids]`, and its logits are compared at the columns `ids`: both softmaxes run over the kept
    tokens, so the teacher's probabilities are renormalised among them and what it gave to the others is lost.

    Args:
        student_tokenizer, teacher_tokenizer: of two models that read the same text; `None` where one is not known.

    Returns:
        `list[int]` with one teacher id for each student id; `None` unless the student has fewer tokens, all of them the
        teacher's and at least one under another id, and both cut text alike (normalizer, pre-tokenizer, algorithm, special tokens).
    """
    if not (getattr(student_tokenizer, "is_fast", False) and getattr(teacher_tokenizer, "is_fast", False)):
        return None
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if len(student) >= len(teacher) or not student.keys() <= teacher.keys() or sorted(student.values()) != list(range(len(student))):
        return None
    if all(teacher[token] == i for token, i in student.items()) or _way_of_cutting(student_tokenizer) != _way_of_cutting(teacher_tokenizer):
        return None
    return [teacher[token] for token in sorted(student, key=student.get)]


def _way_of_cutting(tokenizer) -> tuple:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tables = ("vocab", "merges", "unk_id")
    algorithm = {name: value for name, value in state["model"].items() if name not in tables}
    return state["normalizer"], state["pre_tokenizer"], algorithm, tokenizer.special_tokens_map
