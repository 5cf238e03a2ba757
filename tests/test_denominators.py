"""The gradient does not depend on how a batch is cut: accumulation steps and ranks, ragged rows, every term, adapters."""

import os
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from training import ALL_TERMS, arguments, flat, ragged, run, without_dropout

from hfdistill import Term


FAMILIES = ("bert", "distilbert", "vit")


def wide(family: str) -> dict:
    """Config of a teacher that is wider than the student, so that adapters are needed."""
    if family == "distilbert":
        return {"dim": 48, "hidden_dim": 64}
    return {"hidden_size": 48, "intermediate_size": 64}


def first_gradient(family, tmp_path, batch, steps, adapters, head=None, data=None, **weights):
    options = {"head": head} if head else {}
    student = families.build(family, 2, seed=1, **without_dropout(family), **options)
    teacher = families.build(family, 4, seed=2, **(wide(family) if adapters else {}), **options)
    args = arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, **(weights or ALL_TERMS))
    trainer, gradients = run(student, teacher, data or ragged(family), args)
    return trainer, gradients[0]


def assert_same(gradient, reference):
    assert gradient.keys() == reference.keys()
    a, b = flat(gradient), flat(reference)
    assert abs(float(a.norm() / b.norm()) - 1) < 1e-5
    assert 1 - float(torch.dot(a, b) / (a.norm() * b.norm())) < 1e-9
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("adapters", [False, True], ids=["equal_width", "adapters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_does_not_change_the_gradient(family, adapters, tmp_path):
    trainer, whole = first_gradient(family, tmp_path, 8, 1, adapters)
    assert any(name.startswith("adapter.") for name in whole) == adapters
    for batch, steps in ((4, 2), (1, 8)):
        other, cut = first_gradient(family, tmp_path, batch, steps, adapters)
        assert_same(cut, whole)
        for key, value in trainer.state.log_history[0].items():
            if key != "grad_norm":
                assert other.state.log_history[0][key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


def token_rows(family, seed=1):
    """Ragged rows with uneven numbers of labels, some rows without any."""
    data = ragged(family, seed=seed)
    g = torch.Generator().manual_seed(seed)
    ids = data.batch["input_ids"]
    labels = torch.where(torch.rand(ids.shape, generator=g) < 0.3, ids % families.LABELS, -100)
    labels[2] = -100
    data.batch["labels"] = labels.masked_fill(data.batch["attention_mask"] == 0, -100)
    return data


@pytest.mark.parametrize(
    "family,head", [("bert", "MaskedLM"), ("bert", "TokenClassification"), ("gpt2", "LMHeadModel"), ("llama", "CausalLM")]
)
@pytest.mark.parametrize("positions", ["all", "labelled"])
def test_token_and_language_models_too(family, head, positions, tmp_path):
    options = dict(kd_positions=positions, **ALL_TERMS)
    _, whole = first_gradient(family, tmp_path, 8, 1, False, head=head, data=token_rows(family), **options)
    for batch, steps in ((4, 2), (1, 8)):
        _, cut = first_gradient(family, tmp_path, batch, steps, False, head=head, data=token_rows(family), **options)
        assert_same(cut, whole)


# name -> family, head, weights; weights tied to the embeddings and not, and a student whose head no term needs
LANGUAGE_MODELS = {
    "tied": ("bert", "MaskedLM", dict(task_weight=1.0, kd_weight=2.0, cosine_weight=1.0, kd_positions="labelled")),
    "untied": ("llama", "CausalLM", dict(task_weight=1.0, kd_weight=2.0, kd_positions="all")),
    "headless": ("bert", "MaskedLM", dict(task_weight=0.0, kd_weight=0.0, hidden_weight=1.0)),
}


def language_model_gradient(name, tmp_path, batch, steps):
    family, head, weights = LANGUAGE_MODELS[name]
    return first_gradient(family, tmp_path, batch, steps, False, head=head, data=token_rows(family), **weights)


def test_a_sliding_window_is_counted(tmp_path):
    gradients = []
    for batch, steps in ((8, 1), (1, 8)):
        _, gradient = first_gradient("modernbert", tmp_path, batch, steps, False, attention_weight=1.0, layer_map="0:0,1:1")
        gradients.append(gradient)
    assert_same(gradients[1], gradients[0])


def test_unlabelled_rows_count_for_the_teacher_but_not_for_the_task(tmp_path):
    def scarce(seed):
        data = ragged("bert", seed=seed)
        data.batch["labels"][[0, 3, 4, 5, 7]] = -100
        return data

    _, whole = first_gradient("bert", tmp_path, 8, 1, False, data=scarce(1))
    _, cut = first_gradient("bert", tmp_path, 1, 8, False, data=scarce(1))
    assert_same(cut, whole)


def test_gradient_equals_one_written_by_hand(tmp_path):
    """Plain PyTorch on the whole batch, from eager outputs, without any of our losses, capture or counting."""
    _, ours = first_gradient(
        "bert", tmp_path, 2, 4, False, task_weight=0.5, kd_weight=0.7, temperature=3.0, hidden_weight=0.3, attention_weight=0.6
    )
    student = families.build("bert", 2, seed=1, **without_dropout("bert"))
    teacher = families.build("bert", 4, seed=2)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    rows = families.batch("bert", rows=8, seed=1)
    labels, mask = rows.pop("labels"), rows["attention_mask"].bool()
    s = student(**rows, output_hidden_states=True)
    with torch.no_grad():
        t = teacher(**rows, output_hidden_states=True)
    task = sum(-s.logits[i].softmax(-1)[labels[i]].log() for i in range(8)) / 8
    p, q = (t.logits / 3).softmax(-1), (s.logits / 3).softmax(-1)
    kd = 9 * (p * (p / q).log()).sum() / 8
    hidden = attention = 0
    for a, b in ((0, 1), (1, 3)):
        difference = s.hidden_states[a + 1] - t.hidden_states[b + 1]
        hidden = hidden + sum(difference[i, j].square().mean() for i in range(8) for j in range(9) if mask[i, j]) / mask.sum() / 2
        maps = [scores(model, out, block) for model, out, block in ((student, s, a), (teacher, t, b))]
        pairs = sum((maps[0][i, :, :n, :n] - maps[1][i, :, :n, :n].detach()).square().mean(0).sum() for i, n in enumerate(mask.sum(1)))
        attention = attention + pairs / mask.sum(1).square().sum() / 2
    (0.5 * task + 0.7 * kd + 0.3 * hidden + 0.6 * attention).backward()
    reference = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def scores(model, out, block):
    """q k^T / sqrt(d) from the projections of a BERT block, by hand."""
    layer, states = model.bert.encoder.layer[block].attention.self, out.hidden_states[block]
    q, k = (p(states).view(*states.shape[:2], 4, 8).transpose(1, 2) for p in (layer.query, layer.key))
    return q @ k.transpose(2, 3) / 8**0.5


def test_two_processes_give_the_gradient_of_one(tmp_path):
    worker = Path(__file__).with_name("two_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{worker.parent}{os.pathsep}{worker.parent.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(worker), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    for family in FAMILIES:
        for adapters in (False, True):
            both = [torch.load(tmp_path / f"{family}_{adapters}_{rank}.pt", weights_only=True) for rank in (0, 1)]
            assert both[0]["world"] == 2
            trainer, alone = first_gradient(family, tmp_path / "alone", 8, 1, adapters)
            for rank in both:
                assert_same(rank["gradient"], alone)
            for key, value in both[0]["logs"].items():
                if key not in ("grad_norm", "epoch", "step"):
                    assert value == pytest.approx(trainer.state.log_history[0][key], rel=1e-5, abs=1e-7), key
    for name in LANGUAGE_MODELS:  # logits made chunk by chunk, outside of what DistributedDataParallel sees
        _, alone = language_model_gradient(name, tmp_path / "alone", 8, 1)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True)
            assert found["head"] == "chunked"
            assert_same(found["gradient"], alone)


def test_one_denominator_for_all_terms_would_be_noticed(tmp_path, monkeypatch):
    """The test above can fail: dividing each micro-batch by its own count changes the gradient of ragged rows."""
    from hfdistill.counting import Denominators

    _, whole = first_gradient("bert", tmp_path, 8, 1, False)
    monkeypatch.setattr(Denominators, "of", lambda self, unit, count, samples: count.clamp(min=1) * 8)
    _, cut = first_gradient("bert", tmp_path, 1, 8, False)
    with pytest.raises(AssertionError):
        assert_same(cut, whole)


def test_sum_over_layers_is_the_mean_times_their_number(tmp_path):
    terms = [dict(loss="hidden_mse", layer_reduction=how) for how in ("mean", "sum")]
    gradients = []
    for term in terms:
        student, teacher = families.build("bert", 2, seed=1, **without_dropout("bert")), families.build("bert", 4, seed=2)
        _, steps = run(student, teacher, ragged("bert"), arguments(tmp_path), objective=[Term.from_dict(term)])
        gradients.append(flat(steps[0]))
    torch.testing.assert_close(gradients[1], 2 * gradients[0])
