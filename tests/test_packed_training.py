"""Packed rows train what padded ones do: the same loss, parts and gradients, for every family whose attention takes a mask of blocks."""

from __future__ import annotations

import families
import pytest
import torch
import transformers as tf
from training import ALL_TERMS, Rows, arguments, flat, pad, run, without_dropout

from hfdistill import LOSSES, DistillationTrainer, PackingCollator, Signals, Term
from hfdistill.packed import PackedInputs


CAUSAL = ("gpt2", "llama", "qwen2", "qwen3")
TOKENS = ("bert", "roberta", "distilbert", "modernbert", "electra", "xlm_roberta", "albert")
SLOW = ("qwen2", "qwen3", "electra", "xlm_roberta", "albert")  # as others that are tried by default


def data(head: str, rows: int = 8, seed: int = 0) -> Rows:
    """Texts of 9, 6 and 3 tokens with labels for some of their tokens."""
    g = torch.Generator().manual_seed(seed)
    batch = families.batch("bert", rows, seed, labels=False)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    chosen = real & (torch.rand(real.shape, generator=g) < 0.6)
    if head == "MaskedLM":
        labels = torch.where(chosen, ids, -100)
    elif head == "TokenClassification":
        labels = torch.where(chosen, torch.randint(0, families.LABELS, ids.shape, generator=g), -100)
    else:
        labels = torch.where(real, ids, -100)
    return Rows({**batch, "labels": labels})


def head_of(family: str) -> str:
    return {"gpt2": "LMHeadModel"}.get(family, "CausalLM") if family in CAUSAL else "MaskedLM"


def models(family: str, head: str, **options):
    quiet = {**without_dropout(family), **({"classifier_dropout_prob": 0.0} if family == "albert" else {})}
    return [families.build(family, n, seed=n, head=head, **quiet, **options) for n in (2, 4)]


def train(tmp_path, family, head, collator, batch=8, options=None, pair=None, **settings):
    settings = {**ALL_TERMS, "kd_positions": "labelled", **settings}
    args = arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, **settings)
    student, teacher = models(family, head, **(options or {})) if pair is None else pair
    trainer, gradients = run(student, teacher, data(head), args, data_collator=collator)
    return flat(gradients[0]), trainer.state.log_history[0], trainer


def same(one, other):
    torch.testing.assert_close(other[0], one[0], rtol=1e-5, atol=2e-6 * float(one[0].abs().max()))
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert other[1][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def slow(*values, of=None):
    """A case that is run with the slow tests; with `of` only where that is a family that others stand for."""
    return pytest.param(*values, marks=pytest.mark.slow) if of is None or of in SLOW else pytest.param(*values)


CASES = [slow(family, head_of(family), {}, of=family) for family in (*TOKENS, *CAUSAL)]
CASES += [("distilbert", "TokenClassification", {}), slow("bert", "TokenClassification", {}), slow("modernbert", "TokenClassification", {})]
CASES += [("qwen2", "CausalLM", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1})]
CASES += [(family, head_of(family), {"attn_implementation": "eager"}) for family in ("bert", "gpt2")]


@pytest.mark.parametrize(("family", "head", "options"), CASES, ids=lambda value: "+".join(value) if isinstance(value, dict) else value)
def test_loss_and_gradient_are_those_of_the_padded_batch(family, head, options, tmp_path):
    # Without an attention term the models stay on the implementation they were loaded with.
    terms = {"attention_weight": 0.0} if "attn_implementation" in options else {}
    padded = train(tmp_path, family, head, pad, options=options, **terms)
    packed = train(tmp_path, family, head, PackingCollator(pad, causal=family in CAUSAL), options=options, **terms)
    same(padded, packed)
    assert padded[1]["kd"] > 0 and (terms or padded[1]["attention"] > 0)


@pytest.mark.parametrize("positions", ["all", "marked"])
def test_every_choice_of_positions(positions, tmp_path, monkeypatch):
    original = data
    if positions == "marked":
        def marked(head):
            rows = original(head)
            rows.batch["target_mask"] = (rows.batch["input_ids"] % 3 > 0).long()
            return rows

        monkeypatch.setitem(globals(), "data", marked)
    results = [train(tmp_path, "bert", "MaskedLM", collator, kd_positions=positions) for collator in (pad, PackingCollator(pad))]
    same(*results)


@pytest.mark.parametrize("family", ["bert", slow("gpt2")])
def test_micro_batches_and_longer_rows_change_nothing(family, tmp_path):
    """Denominators are those of the window, however its rows are cut, packed and passed to the teacher."""
    head = head_of(family)
    padded = train(tmp_path, family, head, pad)
    for batch, max_length, piece in ((4, None, None), (2, 100, None), (8, 18, 2)):
        collator = PackingCollator(pad, max_length, causal=family in CAUSAL)
        same(padded, train(tmp_path, family, head, collator, batch, teacher_batch_size=piece))


@pytest.mark.parametrize("head", ["rows", slow("full"), "chunked"])
def test_the_vocabulary_is_projected_at_the_same_rows(head, tmp_path):
    weights = {name: 0.0 for name in ALL_TERMS if name not in ("task_weight", "kd_weight")}
    settings = {"vocabulary_head": head, "kd_positions": "all", **weights}
    results = [train(tmp_path, "bert", "MaskedLM", collator, **settings) for collator in (pad, PackingCollator(pad))]
    same(*results)


def test_a_student_teaches_itself_in_packed_rows(tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig

    results = []
    for collator in (pad, PackingCollator(pad)):
        student = families.build("bert", 2, seed=1, head="MaskedLM", **without_dropout("bert"))
        args = arguments(tmp_path, task_weight=0.5, kd_weight=0.5, hidden_weight=0.5, layer_map="0:1")
        lora = LoraConfig(target_modules=["query", "value"], r=2, lora_alpha=4)
        trainer, gradients = run(student, "base", data("MaskedLM"), args, data_collator=collator, peft_config=lora)
        results.append((flat(gradients[0]), trainer.state.log_history[0]))
    same(*results)


def test_throughput_counts_texts_not_rows(tmp_path):
    log = train(tmp_path, "bert", "MaskedLM", PackingCollator(pad), log_step_profile=True)[1]
    assert log["samples_per_second"] * log["time_step_ms"] / 1000 == pytest.approx(8, rel=1e-3)
    assert log["tokens_per_second"] / log["samples_per_second"] == pytest.approx(51 / 8, rel=1e-3)  # 9, 6, 3, 9, 6, 3, 9, 6 tokens


def test_evaluation_stays_one_example_a_row(tmp_path):
    student, teacher = models("bert", "TokenClassification")
    rows = data("TokenClassification", rows=6, seed=3)
    args = arguments(tmp_path, per_device_eval_batch_size=3)
    collator = PackingCollator(pad)
    trainer, _ = run(student, teacher, data("TokenClassification"), args, data_collator=collator, eval_dataset=rows)
    assert trainer.predict(rows).predictions.shape[0] == 6
    assert trainer.data_collator is collator


def test_teachers_in_half_precision_are_tried_with_their_own_accuracy(tmp_path):
    student, teacher = models("bert", "MaskedLM")
    pair = (student, teacher.to(torch.bfloat16))
    trainer = train(tmp_path, "bert", "MaskedLM", PackingCollator(pad), pair=pair, attention_weight=0.0)[2]
    assert next(trainer.teacher.model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("loss", ["attention_kl", slow("attention_mse")])
def test_attention_maps_hold_the_pairs_of_each_sequence(loss, tmp_path):
    same(*(train(tmp_path, "bert", "MaskedLM", collator, attention_loss=loss) for collator in (pad, PackingCollator(pad))))


# ---- What cannot be packed ----


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.layout == "rows" and loss.unit != "sequences"])
def test_losses_that_are_let_through_look_at_single_tokens(name):
    """What is not refused by its unit, layout or signals must not mind which tokens share a row."""
    loss = LOSSES[name]()
    if loss.signal == "attention_scores" or "keys" in (loss.signals or (loss.signal,)):
        pytest.skip("of pairs of tokens, which are tested in training or refused")
    g = torch.Generator().manual_seed(0)
    student, teacher, mask = torch.randn(4, 6, 8, generator=g), torch.randn(4, 6, 8, generator=g), torch.rand(4, 6, generator=g) < 0.7
    inputs = {"labels": torch.randint(0, 8, (4, 6), generator=g)} if "labels" in loss.needs else {}
    apart = loss(student, teacher, mask, **inputs)
    inputs = {key: value.view(2, 12) for key, value in inputs.items()}
    together = loss(student.view(2, 12, 8), teacher.view(2, 12, 8), mask.view(2, 12), **inputs)
    torch.testing.assert_close(together.total, apart.total)
    assert together.count == apart.count > 0


def refused(tmp_path, message, family="bert", head="MaskedLM", collator=None, pair=None, rows=None, **settings):
    student, teacher = models(family, head) if pair is None else pair
    terms = settings.pop("terms", None)
    settings = {**({} if terms else {"task_weight": 0.5, "kd_weight": 0.5}), **settings}
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(
            model=student,
            teacher=teacher,
            args=arguments(tmp_path, **settings),
            train_dataset=data(head) if rows is None else rows,
            data_collator=collator or PackingCollator(pad),
            objective=terms,
        )


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (Term("similarity_preserving", signal="hidden_states"), "'similarity_preserving' .* is about whole sequences"),
        (Term("patient"), "'patient' .* is about whole sequences"),
        (Term("hidden_mse", signal="pooled"), "'hidden_mse' .* is about whole sequences"),
        (Term("relation_kl", options={"heads": 4}), "'relation_kl' .* compares the tokens of a row with each other"),
        (Term("relation_kl", signal="hidden_states", options={"heads": 4}), "'relation_kl' .* compares the tokens of a row"),
    ],
)
def test_terms_about_sequences_are_refused(term, message, tmp_path):
    refused(tmp_path, message, terms=[Term("task"), term])


def test_models_of_sequences_are_refused(tmp_path):
    batch = families.batch("bert", 8)
    message = "Rows are packed, but the student answers for whole sequences \\(its task: sequence\\)"
    refused(tmp_path, message, head="SequenceClassification", rows=Rows(batch))


def test_causal_labels_must_be_known_as_such(tmp_path):
    refused(tmp_path, "causal=False, but the student's task is causal_lm.*Pass causal=True", "gpt2", "LMHeadModel")
    refused(tmp_path, "causal=True, but the student's task is masked_lm.*Pass causal=False", collator=PackingCollator(pad, causal=True))
    message, collator = "'kd' would compare what the last token.*kd_positions='labelled'", PackingCollator(pad, causal=True)
    refused(tmp_path, message, "gpt2", "LMHeadModel", collator, kd_positions="all")


def test_teachers_that_answer_for_examples_are_refused(tmp_path):
    student, _ = models("bert", "MaskedLM")
    refused(tmp_path, "a teacher that is a CallableTeacher answers for single examples", pair=(student, lambda batch: Signals()))


def test_models_that_do_not_read_packed_rows_are_refused(tmp_path):
    refused(tmp_path, "The student \\(DebertaV2ForMaskedLM\\) cannot read packed rows: it takes no mask of blocks", "deberta_v2")
    student, teacher = models("bert", "MaskedLM")
    # As a model whose attention ignores the mask would: no position sees the others' block as forbidden.
    forward = type(teacher).forward
    teacher.forward = lambda input_ids, attention_mask=None, position_ids=None, **more: forward(
        teacher, input_ids, None, position_ids=position_ids, **more
    )
    message = "In a packed row the teacher \\(BertForMaskedLM\\) does not read each sequence as if it were alone: .* differ by 0.[1-9]%"
    refused(tmp_path, message, pair=(student, teacher))
    weights = {"attention_weight": 0.5}
    refused(tmp_path, "'attention' reads an attention that does not show its mask of blocks", "mpnet", **weights)


def test_models_without_positions_or_masks_of_blocks_are_refused():
    with pytest.raises(ValueError, match="Linear takes no position_ids.*group_by_length"):
        PackedInputs(torch.nn.Linear(2, 2), False)
    no_positions = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM takes no position_ids"):
        PackedInputs(no_positions, True)
    model = families.build("bert", 1, head="MaskedLM")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="BertForMaskedLM runs 'flash_attention_2'. Load it with attn_implementation='sdpa'"):
        PackedInputs(model, False)(torch.ones(1, 3, dtype=torch.long))


def test_mpnet_is_packed_without_attention_terms(tmp_path):
    results = [train(tmp_path, "mpnet", "MaskedLM", collator, attention_weight=0.0) for collator in (pad, PackingCollator(pad))]
    same(*results)
