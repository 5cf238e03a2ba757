"""What a user reads when something does not fit: the value seen, the consequence, the cure."""

from __future__ import annotations

import re

import pytest
import torch

from hfdistill.losses import (
    AttentionKLLoss,
    AttentionMSELoss,
    AttentionScoreMSELoss,
    BinarySoftTargetsLoss,
    CosineLoss,
    EmbeddingMSELoss,
    HiddenMSELoss,
    LogitMSELoss,
    RegressionMSELoss,
    SoftTargetsLoss,
    TaskBinaryCrossEntropyLoss,
    TaskCrossEntropyLoss,
    TaskSquaredErrorLoss,
)


def raises(message):
    return pytest.raises(ValueError, match="^" + re.escape(message) + "$")


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize("loss", [SoftTargetsLoss, BinarySoftTargetsLoss])
@pytest.mark.parametrize("temperature", [0, -1.5, float("nan"), float("inf"), "2"])
def test_temperature(loss, temperature):
    message = (
        f"temperature must be a finite number > 0, got {temperature!r}: dividing logits by it gives inf or NaN. "
        "Use 1 (plain KL) to 8; 2 is usual."
    )
    with raises(message):
        loss(temperature=temperature)
    with raises(message):
        loss()(zeros(2, 3), zeros(2, 3), temperature=temperature)


def test_only_scheduled_values_can_be_given_for_a_step():
    with pytest.raises(TypeError, match="LogitMSELoss has no scheduled value"):
        LogitMSELoss()(zeros(2, 3), zeros(2, 3), temperature=2.0)


@pytest.mark.parametrize("loss", [SoftTargetsLoss(), BinarySoftTargetsLoss(), LogitMSELoss()], ids=lambda loss: type(loss).__name__)
def test_logits_of_different_classes(loss):
    with raises(
        "student has shape (2, 3) and teacher (2, 1): they cannot be compared entry by entry. "
        "Compare the label sets (or vocabularies) of the two models and pass the logits of the shared ones in the same order."
    ):
        loss(zeros(2, 3), zeros(2, 1))


def test_softmax_over_one_class():
    with raises(
        "student and teacher have 1 class (shape (4, 1)): a softmax over one class is always 1, so this loss would always be 0. "
        "Use regression_mse for a regression or binary_soft_targets for one yes-or-no label."
    ):
        SoftTargetsLoss()(zeros(4, 1), zeros(4, 1))


def test_regression_of_different_targets():
    with raises(
        "student has shape (4, 2) and teacher (4, 1): they cannot be compared entry by entry. "
        "Build both models with the same number of targets (num_labels)."
    ):
        RegressionMSELoss()(zeros(4, 2), zeros(4))


@pytest.mark.parametrize("loss", [HiddenMSELoss(), EmbeddingMSELoss(), CosineLoss()], ids=lambda loss: type(loss).__name__)
def test_widths_need_an_adapter(loss):
    with raises(
        "student has shape (2, 5, 8) and teacher (2, 5, 12): they cannot be compared entry by entry. "
        "Give the term an adapter that brings the student to the teacher's width, and feed both models the same tokens."
    ):
        loss(zeros(2, 5, 8), zeros(2, 5, 12))


@pytest.mark.parametrize("loss", [AttentionScoreMSELoss(), AttentionKLLoss(), AttentionMSELoss()], ids=lambda loss: type(loss).__name__)
def test_attention_shapes(loss):
    with raises(
        "student has 2 attention heads and teacher 12: head i of one has no partner in the other. "
        'Use heads="mean" to compare the averages over heads.'
    ):
        loss(zeros(1, 2, 4, 4), zeros(1, 12, 4, 4))
    with raises(
        "student has shape (1, 2, 4, 4) and teacher (1, 2, 5, 5): their queries and keys are not the same tokens. "
        "Feed both models the same token ids."
    ):
        loss(zeros(1, 2, 4, 4), zeros(1, 2, 5, 5))
    with raises(
        "teacher has shape (2, 4, 4): attention scores have four dimensions (batch, heads, queries, keys). Pass the scores of one block."
    ):
        loss(zeros(1, 2, 4, 4), zeros(2, 4, 4))
    with raises(
        "mask has shape (1, 4) but the rows of this loss have shape (1, 1, 4, 4): rows would be chosen wrongly. Pass one bool for each row."
    ):
        loss(zeros(1, 2, 4, 4), zeros(1, 2, 4, 4), torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("loss", [AttentionScoreMSELoss, AttentionKLLoss, AttentionMSELoss])
def test_heads(loss):
    with raises(
        "heads must be 'equal' or 'mean', got 'sum': it says how the heads of the two models are matched. "
        "Use 'equal' (head i with head i) or 'mean' (averages over heads, for models with different numbers of heads)."
    ):
        loss(heads="sum")


def test_attention_reduction():
    with raises(
        "reduction must be 'pairs' or 'keys', got 'mean': it says what the sum is divided by. "
        "Use 'pairs' (mean over query-key pairs) or 'keys' (sum over keys, mean over queries)."
    ):
        AttentionMSELoss(reduction="mean")


@pytest.mark.parametrize(
    "loss",
    [SoftTargetsLoss(), BinarySoftTargetsLoss(), RegressionMSELoss(), LogitMSELoss(), HiddenMSELoss(), CosineLoss()],
    ids=lambda loss: type(loss).__name__,
)
def test_masks(loss):
    with raises("mask must be a bool tensor (True = counts), got torch.int64: it selects, it does not weigh. Pass mask.bool()."):
        loss(zeros(4, 3), zeros(4, 3), torch.ones(4, dtype=torch.long))
    with raises(
        "mask has shape (4, 1) but the rows of this loss have shape (4,): rows would be chosen wrongly. Pass one bool for each row."
    ):
        loss(zeros(4, 3), zeros(4, 3), torch.ones(4, 1, dtype=torch.bool))


@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
def test_label_out_of_range(label, shape):
    labels = torch.tensor([0, -100, label, 2]).reshape(shape)
    with raises(
        f"label {label} is no class of the model, which has 3 classes (0 to 2): its probability does not exist. "
        "Set num_labels (or fix label2id), and mark rows without a label with -100."
    ):
        TaskCrossEntropyLoss()(zeros(*shape, 3), labels)


def test_labels_that_are_no_class_ids():
    with raises(
        "labels have dtype torch.float32 and shape (4, 3), but cross entropy takes class ids. "
        "Pass integer labels, or set problem_type to 'multi_label_classification' or 'regression'."
    ):
        TaskCrossEntropyLoss()(zeros(4, 3), zeros(4, 3))
    with raises(
        "logits have shape (4, 3) and labels (4, 1): there must be one class id for each row of logits, shape (4,). "
        "Check the data collator and the task of the model."
    ):
        TaskCrossEntropyLoss()(zeros(4, 3), zeros(4, 1).long())
    with raises(
        "logits have 1 class (shape (4, 1)): a softmax over one class is always 1, so this loss would always be 0. "
        "Set num_labels, or problem_type to 'regression'."
    ):
        TaskCrossEntropyLoss()(zeros(4, 1), zeros(4).long())


def test_multi_label():
    with raises(
        "logits have shape (4, 3) and labels (4,): a multi-label model needs a 0 or 1 for each label. "
        "Pass multi-hot rows, or set problem_type to 'single_label_classification' for class ids."
    ):
        TaskBinaryCrossEntropyLoss()(zeros(4, 3), zeros(4))
    for label, dtype in ((2, torch.long), (-1.0, torch.float), (float("nan"), torch.float)):
        with raises(
            f"label {label} is not between 0 and 1: binary cross entropy would have no minimum. "
            "Pass multi-hot rows, and mark missing entries with -100."
        ):
            TaskBinaryCrossEntropyLoss()(zeros(1, 3), torch.tensor([[0, -100, label]], dtype=dtype))


def test_regression_targets():
    with raises(
        "logits have shape (4, 2) and labels (4, 1): a regression needs one number for each target. "
        "Set num_labels to the number of targets."
    ):
        TaskSquaredErrorLoss()(zeros(4, 2), zeros(4))


@pytest.mark.parametrize("loss", [TaskCrossEntropyLoss, TaskBinaryCrossEntropyLoss])
@pytest.mark.parametrize("smoothing", [1, -0.1, float("nan")])
def test_label_smoothing(loss, smoothing):
    with raises(
        f"label_smoothing must be at least 0 and below 1, got {smoothing!r}: at 1 the labels would not matter. "
        "Use 0 (off) to 0.2; 0.1 is usual."
    ):
        loss(label_smoothing=smoothing)
