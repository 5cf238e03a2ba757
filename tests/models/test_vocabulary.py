"""Students with a part of the teacher's vocabulary: the same hidden states, the same logits at the tokens that were kept."""

import json

import families
import numpy as np
import pytest
import torch
import transformers as tf
from transformers import AutoModelForMaskedLM, GenerationConfig

from hfdistill import build_student


TEXT_FAMILIES = [name for name in families.FAMILIES if name not in families.IMAGE_FAMILIES]
# Ids 0 to 3 are the special tokens of the tiny models. Unsorted on purpose: the order of the list is that of the new ids.
KEPT = [0, 1, 2, 3, 9, 5, 11, 63, 30, 31, 32, 33, 40, 21]


def head_of(family):
    if family in families.CAUSAL_FAMILIES:
        return "LMHeadModel" if family == "gpt2" else "CausalLM"
    return "MaskedLM"


def text_of_kept_tokens(rows=4):
    """New ids and the same tokens under the teacher's ids, ragged, padded with 0."""
    generator = torch.Generator().manual_seed(5)
    new = torch.randint(3, len(KEPT), (rows, 9), generator=generator)
    mask = (torch.arange(9)[None] < torch.tensor([9, 6, 3, 8])[:rows, None]).long()
    return {"input_ids": new * mask, "attention_mask": mask}, {"input_ids": torch.tensor(KEPT)[new] * mask, "attention_mask": mask}


@torch.no_grad()
def outputs(model, batch):
    out = model(**batch, output_hidden_states=True)
    return out.logits, out.hidden_states


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_full_student_is_exact_on_kept_tokens(family, tied):
    teacher = families.build(family, 2, head=head_of(family), tie_word_embeddings=tied)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)  # zero as initialised, so a lost bias would not show
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    student = build_student(teacher, vocabulary=KEPT)
    new, old = text_of_kept_tokens()
    logits, states = outputs(student, new)
    expected, teacher_states = outputs(teacher, old)
    real = new["attention_mask"].bool()
    assert student.config.vocab_size == logits.size(-1) == len(KEPT)
    torch.testing.assert_close(logits[real], expected[real][:, KEPT], atol=1e-5, rtol=1e-5)
    assert len(states) == 3
    for s, t in zip(states, teacher_states):
        torch.testing.assert_close(s[real], t[real], atol=1e-5, rtol=1e-5)
    assert student.copy_report.random == 0 and student.copy_report.sliced > 0 and student.copy_report.unused == []
    assert all(torch.equal(p, teacher.state_dict()[name]) for name, p in before.items())
    tie = [m.get_input_embeddings().weight.data_ptr() == m.get_output_embeddings().weight.data_ptr() for m in (student, teacher)]
    assert tie[0] == tie[1]


@pytest.mark.parametrize("family", ["bert", "albert", "distilbert", "roberta", "modernbert", "gpt2", "llama"])
def test_classifiers_keep_their_logits(family):
    teacher = families.build(family, 2)
    student = build_student(teacher, vocabulary=KEPT)
    new, old = text_of_kept_tokens()
    torch.testing.assert_close(outputs(student, new)[0], outputs(teacher, old)[0], atol=1e-5, rtol=1e-5)


def test_narrower_and_shallower_students_read_the_same_rows():
    teacher = families.build("albert", 3, head="MaskedLM")
    student = build_student(teacher, 1, hidden_size=16, num_attention_heads=2, embedding_size=8, vocabulary=KEPT)
    rows = teacher.get_input_embeddings().weight[KEPT][:, :8]
    assert torch.equal(student.get_input_embeddings().weight, rows)
    # The dims of largest norm are those over the tokens that stay: dims 0 to 7 are large in dropped rows only.
    teacher = families.build("bert", 2)
    with torch.no_grad():
        dropped = [i for i in range(families.VOCAB) if i not in KEPT]
        teacher.get_input_embeddings().weight[dropped, :8] = 1e4
        teacher.get_input_embeddings().weight[KEPT, 8:16] = 1e3
    student = build_student(teacher, hidden_size=8, num_attention_heads=1, width="norm", vocabulary=KEPT)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight[KEPT, 8:16])


def test_random_students_have_the_small_vocabulary_too():
    teacher = families.build("bert", 4, head="MaskedLM")
    student = build_student(teacher, 2, vocabulary=KEPT, copy_weights=False)
    assert student.get_input_embeddings().weight.shape == (len(KEPT), 32) and student.cls.predictions.bias.shape == (len(KEPT),)
    assert student.config.distilled_from["vocabulary"] == {"kept": len(KEPT), "of": families.VOCAB}
    assert "vocabulary" not in build_student(teacher, 2).config.distilled_from
    again = build_student(student, 1)
    assert again.config.distilled_from["vocabulary"] == {"kept": len(KEPT), "of": families.VOCAB}
    assert build_student(student, vocabulary=range(7)).config.distilled_from["vocabulary"] == {"kept": 7, "of": families.VOCAB}


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_ids_in_any_container(make):
    student = build_student(families.build("bert", 1), vocabulary=make(KEPT))
    assert student.config.vocab_size == len(KEPT)


def test_a_permutation_is_no_cut_but_moves_the_rows():
    teacher, order = families.build("bert", 1, head="MaskedLM", pad_token_id=0), [0, *reversed(range(1, families.VOCAB))]
    student = build_student(teacher, vocabulary=order)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight[order])
    assert torch.equal(student.cls.predictions.bias, teacher.cls.predictions.bias[order])


def test_equal_sizes_do_not_confuse_the_axes():
    """Vocabulary, width and positions of one size, all cut to one size."""
    options = {"vocab_size": 32, "hidden_size": 32, "max_position_embeddings": 32, "num_labels": 32}
    teacher = families.build("bert", 2, **options)
    kept = list(range(0, 32, 2))
    student = build_student(teacher, hidden_size=16, num_attention_heads=4, vocabulary=kept)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight[kept, :16])
    assert torch.equal(student.bert.embeddings.position_embeddings.weight, teacher.bert.embeddings.position_embeddings.weight[:, :16])
    assert torch.equal(student.bert.pooler.dense.weight, teacher.bert.pooler.dense.weight[:16, :16])
    assert student.classifier.weight.shape == (32, 16)


def test_special_tokens_get_their_new_ids(tmp_path):
    teacher = families.build("llama", 1, head="CausalLM", pad_token_id=40, bos_token_id=30, eos_token_id=[31, 63])
    teacher.generation_config = GenerationConfig(
        pad_token_id=40, bos_token_id=30, eos_token_id=[31, 63], suppress_tokens=[9, 8], bad_words_ids=[[5, 11], [5, 6]]
    )
    student = build_student(teacher, vocabulary=KEPT)
    config, generation = student.config, student.generation_config
    for entry in (config, generation):
        assert KEPT[entry.pad_token_id] == 40 and KEPT[entry.bos_token_id] == 30 and [KEPT[i] for i in entry.eos_token_id] == [31, 63]
    assert [KEPT[i] for i in generation.suppress_tokens] == [9]
    assert [[KEPT[i] for i in word] for word in generation.bad_words_ids] == [[5, 11]]
    assert teacher.config.pad_token_id == 40 and teacher.generation_config.suppress_tokens == [9, 8]
    assert student.get_input_embeddings().padding_idx == config.pad_token_id
    ids = torch.tensor([[KEPT.index(i) for i in (30, 9, 21)]])
    new = student.generate(ids, max_new_tokens=4, do_sample=False)
    assert new.max() < len(KEPT)
    # Ids of the class that lie outside the vocabulary mean nothing before and after.
    outside = families.build("gpt2", 1, head="LMHeadModel", bos_token_id=50256, eos_token_id=50256)
    assert build_student(outside, vocabulary=KEPT).config.eos_token_id == 50256


def test_saved_and_loaded(tmp_path):
    teacher = families.build("roberta", 2, head="MaskedLM")
    student = build_student(teacher, 1, vocabulary=KEPT)
    student.save_pretrained(tmp_path)
    again, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch, _ = text_of_kept_tokens()
    torch.testing.assert_close(outputs(again.eval(), batch)[0], outputs(student, batch)[0])
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["distilled_from"]["vocabulary"] == {"kept": 14, "of": 64} and saved["vocab_size"] == 14


@pytest.mark.parametrize(
    "vocabulary,message",
    [
        ([0, 1, 1, 5], r"names ids twice \(\[1\]\)"),
        ([0, 64, 70], r"names ids \[64, 70\], but BertForSequenceClassification has rows 0 to 63"),
        ([0, -1], r"names ids \[-1\]"),
        ([], "vocabulary is empty"),
        (["[PAD]", "a"], r"must hold token ids of the teacher, got \['\[PAD\]', 'a'\]"),
        ([0, True], r"got \[True\]"),
        ([3, 4], r"BertConfig.pad_token_id is 0, but vocabulary does not keep \[0\].*Add it to vocabulary"),
    ],
)
def test_bad_ids(vocabulary, message):
    with pytest.raises(ValueError, match=message):
        build_student(families.build("bert", 1), vocabulary=vocabulary)


def test_bad_company():
    teacher = families.build("bert", 1)
    with pytest.raises(ValueError, match="vocabulary names the rows to keep and vocab_size=8 their number: give one of them"):
        build_student(teacher, vocabulary=KEPT, vocab_size=8)
    with pytest.raises(ValueError, match="ViTForImageClassification has no vocabulary"):
        build_student(families.build("vit", 1), vocabulary=KEPT)
    # RoBERTa's positions start behind the padding id: another id would shift every position.
    roberta = families.build("roberta", 1, pad_token_id=1)
    with pytest.raises(ValueError, match="counts positions from token id 1.*vocabulary gives it 0.*Keep the ids 0 to 1"):
        build_student(roberta, vocabulary=[1, 0, 2, 5])
    with pytest.raises(ValueError, match="vocabulary gives it none"):
        build_student(roberta, vocabulary=[0, 2, 5])
    assert tf.MPNetConfig().pad_token_id == 1
    with pytest.raises(ValueError, match="counts positions from token id 1"):
        build_student(families.build("mpnet", 1), vocabulary=[0, 2, 5])
