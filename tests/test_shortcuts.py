"""What is not computed makes no difference: every fast path gives the loss and the gradients of the plain one."""

import copy

import families
import pytest
from test_denominators import assert_same, token_rows
from training import ALL_TERMS, arguments, flat, pad, ragged, run, without_dropout

from hfdistill import DistillationTrainer, Term


LANGUAGE_MODELS = [
    ("bert", "MaskedLM"),
    ("distilbert", "MaskedLM"),
    ("modernbert", "MaskedLM"),
    ("gpt2", "LMHeadModel"),
    ("llama", "CausalLM"),
]
PLAIN = dict(vocabulary_head="full", teacher_trimming=False)


def step(family, head, tmp_path, data=None, teacher=None, wide=None, **options):
    """The trainer after one step, its first log line, and its gradients."""
    more = {**without_dropout(family), "head": head}
    student = families.build(family, 2, seed=1, **more)
    teacher = families.build(family, 3, seed=2, **more) if teacher is None else copy.deepcopy(teacher)
    objective = options.pop("objective", None)
    given = {} if objective is None else {"objective": objective}
    trainer, gradients = run(student, teacher, data or token_rows(family), arguments(tmp_path, **options), **given)
    log = {k: v for k, v in trainer.state.log_history[0].items() if not k.startswith(("time_", "samples_", "tokens_", "peak_"))}
    return trainer, log, gradients[0]


def assert_alike(fast, plain):
    assert fast[1].keys() == plain[1].keys()
    for name, value in plain[1].items():
        assert fast[1][name] == pytest.approx(value, rel=1e-5, abs=5e-6), name  # a small KL is a difference of large numbers
    assert_same(fast[2], plain[2])


@pytest.mark.parametrize("positions", ["all", "labelled"])
@pytest.mark.parametrize("family,head", LANGUAGE_MODELS)
def test_vocabularies_at_the_rows_of_the_loss(family, head, positions, tmp_path):
    weights = dict(task_weight=2.0, kd_weight=5.0, cosine_weight=1.0, hidden_weight=0.3, kd_positions=positions)
    plain = step(family, head, tmp_path, **weights, **PLAIN)
    assert plain[0]._head == "full"
    chunked = step(family, head, tmp_path, **weights)
    assert chunked[0]._head == "chunked" and not chunked[0]._teacher_projects
    assert_alike(chunked, plain)
    rows = step(family, head, tmp_path, vocabulary_head="rows", **weights)
    assert rows[0]._head == "rows"
    assert_alike(rows, plain)


def test_chunks_of_any_size_and_accumulation(tmp_path):
    weights = dict(task_weight=2.0, kd_weight=5.0, kd_positions="all", label_smoothing_factor=0.1)
    plain = step("bert", "MaskedLM", tmp_path, **weights, **PLAIN)
    for rows, batch in ((1, 8), (3, 4), (7, 2)):
        cut = step(
            "bert", "MaskedLM", tmp_path, vocabulary_chunk_rows=rows, per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch, **weights,
        )  # fmt: skip
        assert cut[0].objective.fused.chunk_rows == rows
        assert_alike(cut, plain)


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd", "soft_targets"])
def test_every_fused_term(loss, tmp_path):
    terms = [Term("task", 0.5), Term(loss, 2.0, options={"temperature": 1.5}), Term("soft_targets", 1.0, name="second")]
    plain = step("llama", "CausalLM", tmp_path, objective=terms, kd_positions="all", **PLAIN)
    fast = step("llama", "CausalLM", tmp_path, objective=terms, kd_positions="all")
    assert fast[0]._head == "chunked"
    assert_alike(fast, plain)


def test_terms_that_are_not_built_in_take_all_rows_at_once(tmp_path, capsys):
    weights = {**ALL_TERMS, "kd_positions": "labelled"}  # logit_mse
    plain = step("bert", "MaskedLM", tmp_path, **weights, **PLAIN)
    fast = step("bert", "MaskedLM", tmp_path, **weights)
    assert fast[0]._head == "rows" and "'logit_mse'" in capsys.readouterr().out
    assert_alike(fast, plain)
    with pytest.raises(ValueError, match="vocabulary_head='chunked' is not possible.*'logit_mse'.*Use vocabulary_head='rows'"):
        step("bert", "MaskedLM", tmp_path, vocabulary_head="chunked", **weights)


@pytest.mark.parametrize("loss", ["decoupled", "hard_targets"])
def test_losses_that_need_labels_or_none_at_rows(loss, tmp_path):
    terms = [Term("task", 0.5), Term(loss, 2.0)]
    data = token_rows("llama")
    plain = step("llama", "CausalLM", tmp_path, data=data, objective=terms, **PLAIN)
    fast = step("llama", "CausalLM", tmp_path, data=data, objective=terms)
    assert_alike(fast, plain)


def test_no_head_without_a_term_on_logits(tmp_path):
    weights = dict(task_weight=0.0, kd_weight=0.0, hidden_weight=1.0, attention_weight=1.0)
    plain = step("bert", "MaskedLM", tmp_path, **weights, **PLAIN)
    fast = step("bert", "MaskedLM", tmp_path, **weights)
    assert fast[0].teacher.stops_early and not plain[0].teacher.stops_early
    assert {name for name in plain[2] if name not in fast[2]} == set()
    seen = []
    fast[0].teacher.model.cls.register_forward_hook(lambda *_: seen.append("teacher"))
    fast[0].student.inner.get_output_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out.numel()))
    fast[0].train()
    assert set(seen) == {0}  # the student's head sees no row, the teacher's is not reached
    assert_alike(fast, plain)


@pytest.mark.parametrize("schedule", [None, {"type": "step", "start": 1.0, "end": 0.0, "over": [0.0, 0.5]}])
def test_labels_and_a_layer_term_without_a_term_between_logits(schedule, tmp_path):
    """Also where the weight of soft targets falls to 0 on the way."""
    weights = dict(task_weight=1.0, kd_weight=0.0, hidden_weight=1.0, max_steps=4, kd_positions="all")
    if schedule:
        weights |= {"kd_weight": 1.0, "schedules": {"kd_weight": schedule}}
    plain, fast = step("bert", "MaskedLM", tmp_path, **weights, **PLAIN), step("bert", "MaskedLM", tmp_path, **weights)
    assert fast[0]._head == "chunked"
    for one, other in zip(fast[0].state.log_history[:-1], plain[0].state.log_history[:-1]):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_what_a_loss_outside_of_the_forward_pass_cannot_do(tmp_path):
    weights = dict(task_weight=1.0, kd_weight=1.0)
    assert step("bert", "MaskedLM", tmp_path, ddp_static_graph=True, **weights)[0]._head == "rows"
    with pytest.raises(ValueError, match="vocabulary_head='chunked' is not possible.*ddp_static_graph=True synchronises no gradient"):
        step("bert", "MaskedLM", tmp_path, ddp_static_graph=True, vocabulary_head="chunked", **weights)
    with pytest.raises(ValueError, match="vocabulary_chunk_rows=4 would not be used.*vocabulary_head='rows'"):
        step("bert", "MaskedLM", tmp_path, vocabulary_chunk_rows=4, vocabulary_head="rows", **weights)


def test_buffers_are_given_back(tmp_path):
    trainer = step("bert", "MaskedLM", tmp_path, task_weight=1.0, kd_weight=1.0)[0]
    assert not trainer.objective.fused.scratch._buffers


@pytest.mark.parametrize("target", [["query", "value"], ["query", "decoder"]])
def test_lora_students(target, tmp_path):
    """An adapter on the output embedding leaves rows, but no plain projection."""
    import peft

    gradients = []
    for options in (PLAIN, {}):
        student = families.build("bert", 2, seed=1, head="MaskedLM", tie_word_embeddings=False, **without_dropout("bert"))
        args = arguments(tmp_path, task_weight=1.0, kd_weight=1.0, kd_positions="all", **options)
        config = peft.LoraConfig(r=2, target_modules=target, lora_dropout=0.0, init_lora_weights=False)
        trainer, steps = run(student, families.build("bert", 3, head="MaskedLM"), token_rows("bert"), args, peft_config=config)
        gradients.append(steps[0])
    assert trainer._head == ("rows" if "decoder" in target else "chunked")
    assert_same(gradients[1], gradients[0])


def test_a_batch_without_a_label_teaches_nothing_and_breaks_nothing(tmp_path):
    data = token_rows("bert")
    data.batch["labels"][:] = -100
    weights = dict(task_weight=1.0, kd_weight=1.0, kd_positions="labelled")
    plain, fast = (
        step("bert", "MaskedLM", tmp_path, data=data, **weights, **PLAIN),
        step("bert", "MaskedLM", tmp_path, data=data, **weights),
    )
    assert fast[1]["loss"] == plain[1]["loss"] == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in fast[2].values())


def test_a_function_as_the_teacher_answers_for_all_positions(tmp_path):
    model = families.build("bert", 3, seed=2, head="MaskedLM")
    weights = dict(task_weight=1.0, kd_weight=1.0, kd_positions="all")

    def answer(batch):
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    data = token_rows("bert")
    plain = step("bert", "MaskedLM", tmp_path, data=data, teacher=answer, **weights, **PLAIN)
    fast = step("bert", "MaskedLM", tmp_path, data=data, teacher=answer, **weights)
    assert fast[0]._head == "chunked"
    assert_alike(fast, plain)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_teacher_that_takes_the_batch_in_pieces(rows, tmp_path):
    weights = dict(task_weight=1.0, kd_weight=1.0, cosine_weight=1.0, kd_positions="all")
    plain = step("bert", "MaskedLM", tmp_path, **weights, **PLAIN)
    for head in ("rows", "chunked"):
        assert_alike(step("bert", "MaskedLM", tmp_path, teacher_batch_size=rows, vocabulary_head=head, **weights), plain)


def test_a_head_that_mixes_positions_is_run_whole_and_that_is_said(tmp_path, capsys):
    from test_vocabulary_head import Mixing

    config = families.build("bert", 2, seed=1, head="MaskedLM", **without_dropout("bert")).config
    teacher = families.build("bert", 2, head="MaskedLM")
    trainer = DistillationTrainer(Mixing(config), arguments(tmp_path), teacher=teacher, train_dataset=token_rows("bert"), data_collator=pad)
    trainer.train()
    assert trainer._head == "full" and "projected at every position. Not at fewer" in capsys.readouterr().out
    with pytest.raises(ValueError, match="vocabulary_head='rows' is not possible with the student"):
        DistillationTrainer(
            Mixing(config),
            arguments(tmp_path, vocabulary_head="rows"),
            teacher=teacher,
            train_dataset=token_rows("bert"),
            data_collator=pad,
        )


def test_a_teacher_whose_head_mixes_positions_answers_whole(tmp_path, caplog):
    from test_vocabulary_head import Mixing

    teacher = Mixing(families.build("bert", 3, head="MaskedLM").config).eval()
    weights = dict(task_weight=1.0, kd_weight=1.0, kd_positions="labelled")
    plain = step("bert", "MaskedLM", tmp_path, teacher=teacher, **weights, **PLAIN)
    fast = step("bert", "MaskedLM", tmp_path, teacher=teacher, **weights)
    assert fast[0]._head == "chunked" and not fast[0]._teacher_rows
    assert_alike(fast, plain)


def test_classifiers_have_no_vocabulary(tmp_path):
    options = dict(teacher=families.build("bert", 3), train_dataset=ragged("bert"), data_collator=pad)
    assert DistillationTrainer(families.build("bert", 2), arguments(tmp_path), **options)._head == "full"
    with pytest.raises(ValueError, match="vocabulary_head='rows' is about language models"):
        DistillationTrainer(families.build("bert", 2), arguments(tmp_path, vocabulary_head="rows"), **options)


def test_evaluation_still_gives_all_logits(tmp_path):
    trainer, _, _ = step("bert", "MaskedLM", tmp_path, task_weight=1.0, kd_weight=1.0, eval_with_teacher=True)
    output = trainer.predict(token_rows("bert"))
    assert output.predictions.shape == (8, families.LENGTH, families.VOCAB)
    plain = step("bert", "MaskedLM", tmp_path, task_weight=1.0, kd_weight=1.0, eval_with_teacher=True, **PLAIN)[0]
    for name, value in plain.evaluate(token_rows("bert")).items():
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second")):
            assert trainer.evaluate(token_rows("bert"))[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_and_tied_embeddings(tied, tmp_path):
    gradients = []
    for options in (PLAIN, {}):
        student = families.build("bert", 2, seed=1, head="MaskedLM", tie_word_embeddings=tied, **without_dropout("bert"))
        args = arguments(tmp_path, task_weight=1.0, kd_weight=1.0, kd_positions="all", frozen_parts=None if tied else ["head"], **options)
        gradients.append(run(student, families.build("bert", 3, head="MaskedLM"), token_rows("bert"), args)[1][0])
    assert "bert.embeddings.word_embeddings.weight" in gradients[1] and len(gradients[1]) == len(gradients[0])
    assert_same(gradients[1], gradients[0])


def test_under_autocast_chunks_are_multiplied_in_its_dtype(tmp_path):
    weights = dict(task_weight=1.0, kd_weight=2.0, kd_positions="all", bf16=True)
    exact = step("bert", "MaskedLM", tmp_path, **{**weights, "bf16": False}, **PLAIN)[2]
    plain, fast = step("bert", "MaskedLM", tmp_path, **weights, **PLAIN)[2], step("bert", "MaskedLM", tmp_path, **weights)[2]
    errors = [float((flat(gradient) - flat(exact)).norm() / flat(exact).norm()) for gradient in (plain, fast)]
    assert 1e-5 < errors[1] < 0.05 and errors[1] < 2 * errors[0]  # rounded, and not worse than the plain path
