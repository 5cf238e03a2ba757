"""Questions and contexts as windows of tokens: what `prepare_train_features` and `prepare_validation_features` of `run_qa.py` do."""

from __future__ import annotations

from typing import Any


HIDDEN = -100


def encode_spans(
    split,
    tokenizer,
    max_seq_length: int = 384,
    doc_stride: int = 128,
    pad_to_max_length: bool = False,
    for_evaluation: bool = False,
    return_token_type_ids: bool | None = None,
    num_proc: int | None = None,
):
    """Tokenised windows with `start_positions` and `end_positions`; a long context gives several, which overlap.

    The question stands first and is never cut (last, for tokenizers that pad on the left). The positions are those of the
    first answer; where it is not wholly in the window, or there is none, both point at the classification token (the
    first token, for tokenizers without one); where it is hidden (`answers` is `None`), both are -100.

    Args:
        split: rows with `id`, `question`, `context` and `answers`.
        tokenizer: a fast tokenizer.
        max_seq_length (`int`, defaults to 384): tokens of a window, question and special tokens included.
        doc_stride (`int`, defaults to 128): tokens of the context that two neighbouring windows share.
        pad_to_max_length (`bool`, defaults to `False`): pad here, instead of to the longest row of a batch.
        for_evaluation (`bool`, defaults to `False`): add `example_id`, `null_position` (of the token that means no answer) and
            `offset_mapping` (start and end in the context for each token, -1 for tokens outside it), for [`answer_texts`].
        return_token_type_ids (`bool`, *optional*): also give `token_type_ids`, for a teacher that reads them under a student that
            does not (BERT and DistilBERT). Default: what the tokenizer does.
        num_proc (`int`, *optional*): processes.

    Raises:
        ValueError: for tokenizers without offsets, windows without room for the context, and padding on the left that would
            move the positions.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where in the text its tokens stand, so answers could not be found. Use a fast "
            "tokenizer (use_fast=True)."
        )
    right = tokenizer.padding_side == "right"
    if not right and not pad_to_max_length:
        raise ValueError(
            f"{type(tokenizer).__name__} pads on the left, so positions would move with the longest row of a batch. Pass "
            "pad_to_max_length=True, or set tokenizer.padding_side = 'right'."
        )
    limit = min(max_seq_length, tokenizer.model_max_length)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        questions = [question.lstrip() for question in rows["question"]]  # a few of SQuAD begin with much white space
        longest = max(len(tokenizer(question, add_special_tokens=False)["input_ids"]) for question in questions)
        room = limit - longest - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= doc_stride:
            raise ValueError(
                f"max_seq_length={limit} leaves room for {room} tokens of the context beside the longest question ({longest} tokens), and "
                f"doc_stride={doc_stride} of them would be repeated in the next window: the windows would not move on. Use a larger "
                "max_seq_length or a smaller doc_stride."
            )
        pairs = (questions, rows["context"]) if right else (rows["context"], questions)
        encoded = tokenizer(
            *pairs,
            truncation="only_second" if right else "only_first",
            max_length=limit,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=return_token_type_ids,
            padding="max_length" if pad_to_max_length else False,
        )
        samples, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        found: dict[str, list] = {"start_positions": [], "end_positions": [], "example_id": [], "null_position": [], "offset_mapping": []}
        for window, sample in enumerate(samples):
            inside = [number == (1 if right else 0) for number in encoded.sequence_ids(window)]
            own = [list(offset) if context else [-1, -1] for offset, context in zip(offsets[window], inside)]
            null = _null_position(encoded["input_ids"][window], tokenizer)
            start, end = _positions(own, rows["answers"][sample], null)
            for name, value in zip(found, (start, end, rows["id"][sample], null, own)):
                found[name].append(value)
        if not for_evaluation:
            found = {name: found[name] for name in ("start_positions", "end_positions")}
        return {**encoded, **found}

    return split.map(encode, batched=True, num_proc=num_proc, remove_columns=split.column_names, desc="Tokenizing")


def _null_position(ids: list[int], tokenizer) -> int:
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token is not None and token in ids:
            return ids.index(token)
    return 0


def _positions(offsets: list[list[int]], answers: dict[str, Any] | None, null: int) -> tuple[int, int]:
    """First and last token of the first answer, if the window holds all of it."""
    if answers is None:
        return HIDDEN, HIDDEN
    if not answers["text"]:
        return null, null
    start, end = answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])
    context = [position for position, (first, _) in enumerate(offsets) if first >= 0]
    if not context or offsets[context[0]][0] > start or offsets[context[-1]][1] < end:
        return null, null
    first = max(position for position in context if offsets[position][0] <= start)
    last = min(position for position in context if offsets[position][1] >= end)
    return first, last
