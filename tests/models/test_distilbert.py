"""A BERT written as a DistilBERT computes the same."""

from __future__ import annotations

import families
import pytest
import torch
from transformers import AutoModelForMaskedLM

from hfdistill import build_student, to_distilbert


def outputs(model, batch):
    result = model(**batch)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return [result[name] for name in names if name in result]


def bert(head: str):
    options = {"num_labels": 2} if head == "QuestionAnswering" else {}
    model = families.build("bert", 3, head="MaskedLM" if head == "Model" else head, **options)
    model = model.bert if head == "Model" else model
    for name, parameter in model.named_parameters():  # biases and norms of a fresh model would hide a swap
        torch.nn.init.normal_(parameter, std=0.2, mean=1.0 if "LayerNorm.weight" in name else 0.0)
    return model


@pytest.mark.parametrize("head", ["MaskedLM", "TokenClassification", "QuestionAnswering", "Model"])
def test_outputs_are_equal(head):
    model, batch = bert(head), families.batch("bert", labels=False)
    before = [output.clone() for output in outputs(model, batch)]
    converted = to_distilbert(model)
    assert type(converted).__name__ == type(model).__name__.replace("Bert", "DistilBert") and not converted.training
    for ours, theirs in zip(outputs(converted, batch), before, strict=True):
        rows = batch["attention_mask"].bool()
        torch.testing.assert_close(ours[rows], theirs[rows], atol=2e-5, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, batch), before, strict=True))


def test_it_is_a_copy_without_segments_and_pooler():
    model = bert("MaskedLM")
    converted = to_distilbert(model)
    segments = model.bert.embeddings.token_type_embeddings.weight.numel()
    assert sum(p.numel() for p in converted.parameters()) == sum(p.numel() for p in model.parameters()) - segments
    assert not {p.data_ptr() for p in converted.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert converted.get_output_embeddings().weight is converted.get_input_embeddings().weight


def test_a_student_becomes_a_distilbert_that_loads_anywhere(tmp_path):
    teacher = families.build("bert", 12, head="MaskedLM")
    student = build_student(teacher, 6, layer_map="spread")
    converted = to_distilbert(student)
    assert converted.config.distilled_from["layers"] == [0, 2, 4, 7, 9, 11]  # DistilBERT's own choice
    assert converted.copy_report is student.copy_report
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    batch = families.batch("bert", labels=False)
    assert type(loaded).__name__ == "DistilBertForMaskedLM"
    torch.testing.assert_close(loaded(**batch).logits, student(**batch).logits, atol=2e-5, rtol=1e-4)


def test_random_state_dtype_and_labels_stay():
    model = bert("TokenClassification").double()
    model.config.id2label = {0: "O", 1: "A", 2: "B"}
    state = torch.random.get_rng_state()
    converted = to_distilbert(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert converted.dtype == torch.float64 and converted.config.id2label == {0: "O", 1: "A", 2: "B"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: families.build("bert", 2), "BertForSequenceClassification cannot be written"),
        (lambda: families.build("roberta", 2, head="MaskedLM"), "RobertaForMaskedLM cannot be written"),
        (lambda: families.build("bert", 2, head="MaskedLM", layer_norm_eps=1e-5), "this BERT has 1e-05"),
    ],
)
def test_what_is_not_the_same_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        to_distilbert(model())
