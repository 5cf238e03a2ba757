"""The files of sentence-transformers: a student loads there with the same vectors, and a teacher's are read or refused."""

import json

import families
import numpy as np
import pytest
import torch
from test_base_models import base
from training import arguments, pad
from transformers import AutoTokenizer

from hfdistill import (
    DistillationTrainer,
    SentenceEncoder,
    Term,
    encode_sentences,
    read_sentence_encoder,
    save_sentence_encoder,
    train_wordpiece,
)


TEXTS = ["to be or not to be", "that is the question", "whether it is nobler in the mind to suffer", "be"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(TEXTS, vocab_size=families.VOCAB, max_length=32)


def save(folder, tokenizer, model=None, **options):
    model = base("bert", 2, seed=1) if model is None else model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_sentence_encoder(folder, **{"pooling": "mean", "width": 32, **options})
    return folder


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_what_is_written_is_read(pooling, normalize, tokenizer, tmp_path):
    save(tmp_path, tokenizer, pooling=pooling, normalize=normalize, max_seq_length=24)
    assert read_sentence_encoder(tmp_path) == SentenceEncoder(pooling, normalize, 24)


@pytest.mark.parametrize(
    "family,pooling,side", [("bert", "mean", "right"), ("bert", "cls", "left"), ("distilbert", "last", "right"), ("gpt2", "last", "left")]
)
def test_sentence_transformers_gives_our_vectors(family, pooling, side, tokenizer, tmp_path):
    """The reference is sentence-transformers itself; 5 tokens, so that texts are cut there too. One batch for both: with padding
    on the left, these models count positions from the longest text."""
    library = pytest.importorskip("sentence_transformers")
    model = base(family, 2, seed=1)
    save(tmp_path, tokenizer, model, pooling=pooling, max_seq_length=5, normalize=pooling == "mean")
    change(tmp_path, "tokenizer_config.json", padding_side=side)
    own = AutoTokenizer.from_pretrained(tmp_path)
    theirs = library.SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, batch_size=len(TEXTS))
    trainer = DistillationTrainer(
        model=model,
        teacher=base(family, 2, seed=2),
        objective=[Term("cosine", signal="pooled")],
        args=arguments(tmp_path / "run", pooling=pooling),
        data_collator=lambda rows: own.pad(rows, return_tensors="pt"),
        eval_dataset=encode_sentences(TEXTS, own, 5),
    )
    ours = trainer.predict(trainer.eval_dataset).predictions
    if pooling == "mean":
        ours = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode,pooling", [("mean", "mean"), ("cls", "cls"), ("lasttoken", "last")])
def test_folders_that_sentence_transformers_wrote(mode, pooling, tokenizer, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    save(tmp_path / "plain", tokenizer)
    parts = [Transformer(str(tmp_path / "plain"), max_seq_length=20), Pooling(32, mode), Normalize()]
    library.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "theirs"))
    assert read_sentence_encoder(tmp_path / "theirs") == SentenceEncoder(pooling, True, None)


def test_a_plain_model_is_no_sentence_encoder(tokenizer, tmp_path):
    base("bert", 2, seed=1).save_pretrained(tmp_path)
    assert read_sentence_encoder(tmp_path) is None


def change(folder, file, **entries):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def dense(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))


def moved(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    "spoil,what",
    [
        (dense, "consists of Transformer -> Pooling -> Dense"),
        (moved, "keeps its transformer in the folder '0_Transformer'"),
        (lambda f: change(f, "1_Pooling/config.json", pooling_mode_max_tokens=True), "pools by mean and max_tokens"),
        (lambda f: change(f, "1_Pooling/config.json", pooling_mode="weightedmean"), "pools by weightedmean"),
        (
            lambda f: change(f, "config_sentence_transformers.json", prompts={"q": "query: "}, default_prompt_name="q"),
            "puts the prompt 'query: '",
        ),
        (lambda f: change(f, "sentence_bert_config.json", do_lower_case=True), "lower-cases every text"),
        (lambda f: change(f, "sentence_bert_config.json", transformer_task="fill-mask"), "runs its transformer for fill-mask"),
    ],
    ids=["dense", "subfolder", "two poolings", "weighted", "prompt", "lower case", "task"],
)
def test_encoders_that_are_more_than_that_are_refused(spoil, what, tokenizer, tmp_path):
    save(tmp_path, tokenizer)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"{what}.*hfdistill does not imitate"):
        read_sentence_encoder(tmp_path)


def test_a_pooler_cannot_be_written(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="pooling='auto' cannot be written.*one of mean, cls, last"):
        save(tmp_path, tokenizer, pooling="auto")


@pytest.mark.parametrize(
    "own,pooling,student,teacher", [("mean", "auto", "mean", "mean"), ("last", "auto", "last", "last"), ("last", "cls", "cls", "last")]
)
def test_a_teacher_by_name_keeps_its_pooling(own, pooling, student, teacher, tokenizer, tmp_path):
    model = base("bert", 2, seed=3)
    save(tmp_path / "teacher", tokenizer, model, pooling=own)
    rows = encode_sentences(TEXTS, tokenizer)
    trainer = DistillationTrainer(
        model=base("bert", 1, seed=1),
        teacher=str(tmp_path / "teacher"),
        objective=[Term("hidden_mse", signal="pooled")],
        args=arguments(tmp_path / "run", pooling=pooling),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=lambda batch: tokenizer.pad(batch, return_tensors="pt"),
        processing_class=tokenizer,
    )
    assert trainer.student.pooling == student and trainer.teacher.capture.pooling == teacher
    assert trainer.objective.describe()[0]["pooling"] == (student if student == teacher else f"student {student}, teacher {teacher}")
    place = {"mean": lambda states: states.mean(0), "cls": lambda states: states[0], "last": lambda states: states[-1]}
    with torch.no_grad():
        expected = [
            (place[student](trainer.model(torch.tensor([row["input_ids"]])).last_hidden_state[0])
             - place[teacher](model(torch.tensor([row["input_ids"]])).last_hidden_state[0])).square().mean()
            for row in rows
        ]  # fmt: skip
    trainer.args.eval_with_teacher = True
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_other_students_do_not_look_for_a_sentence_encoder(tmp_path):
    """A classifier's teacher is a classifier: modules.json beside it says nothing about its logits."""
    teacher = families.build("bert", 2, seed=3)
    teacher.save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text("[]")
    student = families.build("bert", 1, seed=1)
    trainer = DistillationTrainer(model=student, teacher=str(tmp_path), args=arguments(tmp_path / "run"), data_collator=pad)
    assert trainer.teacher.capture.pooling == "auto"
