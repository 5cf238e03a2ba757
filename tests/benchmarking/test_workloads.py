"""Every workload, with every candidate of our own: a step runs, and all minimise the same."""

from __future__ import annotations

import pytest
import torch

from hfdistill import StoredTeacher
from hfdistill.benchmarking import formulas
from hfdistill.benchmarking.candidates import OWN, Setting, candidates_of
from hfdistill.benchmarking.measuring import SAME_GRADIENT, SAME_LOSS, measure_times
from hfdistill.benchmarking.workloads import MASKED_SHARE, WORKLOADS, build_workload


@pytest.mark.parametrize("name", WORKLOADS)
def test_all_candidates_minimise_the_same(name, tmp_path):
    """The formulas are plain PyTorch on whole outputs; the losses of hfdistill are another implementation."""
    chosen = candidates_of(name, None, OWN)
    measured = measure_times(build_workload(name, "tiny"), chosen, Setting(folder=tmp_path), rounds=1)
    assert measured["failed"] == {}
    assert measured["checks"].keys() == chosen.keys() == measured["times"].keys()
    for key, check in measured["checks"].items():
        approximate = "bf16" in key or "stored" in key  # stored answers are in half precision
        assert check["loss_difference"] <= (1e-2 if approximate else SAME_LOSS), key
        assert check["gradient_difference"] <= (3e-2 if approximate else SAME_GRADIENT), key
    assert all(len(own["wall"]) == 1 and own["wall"][0] > 0 for own in measured["times"].values())


def test_the_modes_of_hfdistill_are_what_their_names_say(tmp_path):
    workload, setting = build_workload("W1", "tiny"), Setting(folder=tmp_path)
    trainers = {name: OWN[name].build(workload, setting, OWN[name].objective).steps.trainer for name in ("off", "fast", "masked", "stored")}
    assert isinstance(trainers["stored"].teacher, StoredTeacher)
    assert not isinstance(trainers["fast"].teacher, StoredTeacher)
    assert trainers["off"].args.vocabulary_head == "full" and trainers["fast"].args.vocabulary_head == "auto"
    assert [trainers[name].objective.positions for name in ("off", "masked")] == ["all", "labelled"]


def test_the_same_call_makes_the_same_workload():
    one, other = (build_workload("W1", "tiny") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.student.state_dict().values(), other.student.state_dict().values()))
    assert torch.equal(one.batch()["input_ids"], other.batch()["input_ids"])
    assert one.new_student() is not one.student and one.new_student().training and not one.new_teacher().training
    assert "example_id" not in one.batch() and one.rows["example_id"][:].tolist() == list(range(4))


def test_sizes_are_those_of_the_description():
    workload = build_workload("W1", "full", batch=2)
    batch = workload.batch()
    assert batch["input_ids"].shape == (2, 128) and workload.student.config.vocab_size == 30_522
    assert (workload.teacher.config.num_hidden_layers, workload.student.config.num_hidden_layers) == (6, 3)
    labelled = batch["labels"] != -100
    assert 0.5 * MASKED_SHARE < labelled.float().mean() < 2 * MASKED_SHARE
    assert (batch["input_ids"][labelled] == 3).all() and (batch["labels"][labelled] != 3).all()
    assert build_workload("W2", "full", batch=1).objectives["distil"].settings["layer_map"] == "0:1,1:3,2:5"
    causal = build_workload("W5", "tiny", vocabulary=128, length=7)
    assert causal.student.config.vocab_size == 128 and causal.batch()["labels"].shape == (2, 7)
    assert (causal.batch()["labels"][:, 0] == -100).all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("W9",), {}, "no workload 'W9'"),
        (("W1", "huge"), {}, "size must be one of full, tiny, got 'huge'"),
        (("W3", "tiny"), {"vocabulary": 3}, "no size 'vocabulary'"),
    ],
)
def test_unknown_names_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        build_workload(*arguments, **options)
    with pytest.raises(ValueError, match="no candidate 'fats'. Did you mean 'fast'"):
        candidates_of("W1", ["fats"], OWN)


def test_formulas_against_their_definitions():
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    assert torch.allclose(formulas.soft_targets(student, teacher, 2.0), 4 * (p * (p / q).log()).sum(-1).mean())
    cosines = (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    assert torch.allclose(formulas.cosine(student, teacher), (1 - cosines).mean())
    maps = torch.tensor([[[[3.0, 4.0]]]])
    assert torch.allclose(formulas.attention_transfer(maps, maps.flip(-1)), torch.tensor(2 * (16 - 9) ** 2 / (81 + 256) / 2))
