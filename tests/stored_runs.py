"""Runs that can be trained from a stored teacher, one for each kind of answer, small enough to be trained twice in a test."""

from __future__ import annotations

import families
import torch
import vision_families as vision
from datasets import Dataset
from torch import Tensor
from training import Rows, arguments, pad, run, without_dropout

import hfdistill
from hfdistill import ImageCollator, MaskingCollator, Term, encode_corpus, train_wordpiece


WORDS = "the cat sat on a mat near one red door while old dogs ran over green hills and many small birds sang".split()
TOP = "top_k"


def texts(rows: int = 12) -> list[str]:
    return [" ".join(WORDS[(3 * i + j * j) % len(WORDS)] for j in range(4 + i % 5)) for i in range(rows)]


_MADE: dict = {}


def tokenizer():
    if "tokenizer" not in _MADE:
        _MADE["tokenizer"] = train_wordpiece(texts(), vocab_size=60)
    return _MADE["tokenizer"]


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """Rows of a `datasets.Dataset`, padded."""
    return pad([{key: torch.as_tensor(value) for key, value in row.items()} for row in rows])


def text_rows(count: int = 12, seed: int = 1) -> Dataset:
    """Ragged rows without a number."""
    rows = Rows(families.batch("bert", rows=count, seed=seed))
    return Dataset.from_list([{key: value.tolist() for key, value in rows[i].items()} for i in range(count)])


def token_rows(count: int = 12) -> Dataset:
    """With a label at every second token."""
    rows = text_rows(count).to_list()
    return Dataset.from_list([{**row, "labels": [i % 3 if i % 2 else -100 for i in range(len(row["input_ids"]))]} for row in rows])


def span_rows(count: int = 12) -> Dataset:
    rows = text_rows(count).to_list()
    return Dataset.from_list(
        [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "start_positions": 1, "end_positions": 2} for row in rows]
    )


def corpus_rows(count: int = 12):
    return encode_corpus(texts(count), tokenizer(), 32, packing=False, min_row_tokens=1)


def images(count: int = 12, augmentation=None, side: int = 24):
    """Pictures and a collator that augments them, where it is told to."""
    from PIL import Image
    from transformers import ViTImageProcessorPil

    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8).numpy()
    columns = {"image": map(Image.fromarray, pixels), "label": (i % 3 for i in range(count)), "example_id": range(0, 7 * count, 7)}
    rows = Dataset.from_dict({name: list(values) for name, values in columns.items()})
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return rows, ImageCollator(processor, augmentation=augmentation, seed=4)


def _bert(layers: int, seed: int, head: str = "SequenceClassification", **options):
    return families.build("bert", layers, seed=seed, head=head, **{**without_dropout("bert"), **options})


def _lm(family: str, layers: int, seed: int, **options):
    head = {"bert": "MaskedLM", "gpt2": "LMHeadModel"}.get(family, "CausalLM")
    return families.build(family, layers, seed=seed, head=head, vocab_size=len(tokenizer()), **{**without_dropout(family), **options})


def classification():
    options = dict(kd_weight=0.5, hidden_weight=0.3, cosine_weight=0.2, embedding_weight=0.1)
    return _bert(2, 1), _bert(4, 2, hidden_size=48), text_rows(), options, {"data_collator": collate}


def random_maps():
    student, teacher, rows, options, more = classification()
    return student, teacher, rows, {**options, "layer_map": "random"}, more


def tokens():
    student, teacher = (_bert(*sizes, head="TokenClassification") for sizes in ((1, 1), (2, 2)))
    return student, teacher, token_rows(), dict(kd_weight=0.5), {"data_collator": collate}


def spans():
    student, teacher = (_bert(*sizes, head="QuestionAnswering", num_labels=2) for sizes in ((1, 1), (2, 2)))
    return student, teacher, span_rows(), dict(kd_weight=0.5), {"data_collator": collate}


def pooled():
    terms = [Term("task"), Term("hidden_mse", signal="pooled")]
    return _bert(1, 1), _bert(2, 2), text_rows(), {}, {"data_collator": collate, "objective": terms}


def masked_lm(**options):
    student, teacher = _lm("bert", 1, 1), _lm("bert", 2, 2, hidden_size=48)
    collator = MaskingCollator(tokenizer(), 0.3, seed=3)
    return student, teacher, corpus_rows(), {"kd_weight": 0.5, "hidden_weight": 0.2, **options}, {"data_collator": collator}


def labelled_masked_lm():
    return masked_lm(kd_positions="labelled")


def causal_lm(**options):
    from hfdistill import CausalCollator

    more = {"data_collator": CausalCollator(tokenizer())}
    return _lm("gpt2", 1, 1), _lm("gpt2", 2, 2), corpus_rows(), {"kd_weight": 0.5, "hidden_weight": 0.2, **options}, more


def top_k_masked_lm():
    return masked_lm(teacher_store_logits="top_k", teacher_store_top_k=10_000, hidden_weight=0.0)


def top_k_causal_lm():
    return causal_lm(teacher_store_logits="top_k", teacher_store_top_k=10_000, kd_positions="all")


def full_masked_lm():
    return masked_lm(teacher_store_logits="full")


def maps():
    rows, collator = images()
    terms = [Term("task"), Term("soft_targets"), Term("hint", layer_map="1:2"), Term("attention_transfer", layer_map="2:2")]
    return vision.build("resnet", 1, seed=1), vision.build("resnet", 2, seed=2), rows, {}, {"data_collator": collator, "objective": terms}


def augmented_maps():
    student, teacher, rows, options, more = maps()
    return student, teacher, rows, options, {**more, "data_collator": images(augmentation={"horizontal_flip": 0.5})[1]}


RUNS = {
    make.__name__: make
    for make in (
        classification, random_maps, tokens, spans, pooled, masked_lm, labelled_masked_lm, causal_lm, top_k_masked_lm, top_k_causal_lm,
        full_masked_lm, maps, augmented_maps,
    )
}  # fmt: skip


def numbered_rows(count: int = 20) -> Dataset:
    return text_rows(count).add_column("example_id", [11 * i - 30 for i in range(count)])


def pad_without_number(rows):
    return collate([{name: value for name, value in row.items() if name != "example_id"} for row in rows])


def bert(**options):
    return families.build("bert", 2, seed=2, **options)


def write(folder, count: int = 20, plan=None, model=None, **options) -> hfdistill.TeacherStore:
    options = {"dtype": "float32", "progress": False, "batch_size": 3, **options}
    return hfdistill.store_teacher(folder, model or bert(), numbered_rows(count), pad_without_number, plan, **options)


def train(name: str, folder, store=None, teacher=True, resume=None, collator_seed=None, **changes):
    """Trains the run `name` for 5 shuffled steps of two micro-batches, which are two epochs."""
    student, live, rows, options, more = RUNS[name]()
    settings = dict(
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="random",
        num_train_epochs=4,
        optim="sgd",
        learning_rate=0.05,  # Adam would make rounding errors of tiny gradients as large as any step
    )
    if store is not None:
        settings |= dict(teacher_store=str(store), teacher_store_dtype="float32")
    else:
        options = {key: value for key, value in options.items() if not key.startswith("teacher_store")}
    args = arguments(folder, **{**settings, **options, **changes})
    if collator_seed is not None:
        more["data_collator"].seed = collator_seed
    more = {**more, "resume": resume}
    trainer, _ = run(student, live if teacher is True else teacher, rows, args, **more)
    return trainer
