"""Casting, comparing speeds and measuring drift, against numbers that are computed here."""

from __future__ import annotations

import copy
import math

import families
import numpy as np
import pytest
import torch
from torch import nn

from hfdistill.capture import CapturePlan
from hfdistill.losses.logits import SoftTargetsLoss
from hfdistill.signals import Projection, Signals
from hfdistill.teachers import FrozenTeacher, precision
from hfdistill.teachers.precision import cast_weights, compare_speed, half_precision_excluded, measure_drift, own_dtype


CPU = torch.device("cpu")


def softmax(z: np.ndarray) -> np.ndarray:
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


@pytest.mark.parametrize("family", ["bert", "llama", "modernbert"])
def test_weights_are_cast_but_not_what_is_computed_anew(family):
    model = families.build(family, 2)
    saved = set(model.state_dict())
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name not in saved and buffer.is_floating_point()}
    parameters = dict(model.named_parameters())
    cast_weights(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and own_dtype(model) == torch.bfloat16
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], buffer) and after[name].dtype == buffer.dtype for name, buffer in before.items())
    assert bool(before) == (family != "bert")  # the rotary ones have such buffers


def test_a_cast_model_is_the_one_that_from_pretrained_gives(tmp_path):
    model = families.build("llama", 2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast_weights(model, torch.bfloat16)
    batch = families.batch("llama", labels=False)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_what_overflows_in_float16_stays_in_float32(monkeypatch):
    """T5 names such layers; in bfloat16, which has the range of float32, they are cast too."""
    for dtype, kept in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = families.build("bert", 2)
        monkeypatch.setattr(model, "_keep_in_fp32_modules", {"intermediate"})
        weights = precision.TwoPrecisions(model, dtype)
        weights.swap()
        assert model.bert.encoder.layer[1].intermediate.dense.weight.dtype == kept
        weights.restore()
        cast_weights(model, dtype)
        layer = model.bert.encoder.layer[1]
        assert layer.intermediate.dense.weight.dtype == kept and layer.output.dense.weight.dtype == dtype


def test_other_modules_are_cast_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("shift", torch.ones(4), persistent=False)
            self.register_buffer("count", torch.tensor(3))

        def forward(self, x):
            return self.linear(x + self.shift)

    teacher = FrozenTeacher(Net(), dtype=torch.bfloat16)
    assert teacher.model.shift.dtype == torch.bfloat16 and teacher.model.count.dtype == torch.int64
    assert teacher({"x": torch.ones(2, 4)}, CapturePlan()).logits.dtype == torch.bfloat16


def test_speeds_are_taken_in_turns_and_the_weights_come_back(monkeypatch):
    model = nn.Linear(3, 2)
    weights = model.weight.detach().clone()
    seen = []

    def faked(run, device):
        seen.append(model.weight.dtype)
        return {torch.float32: 2.0, torch.bfloat16: 1.0}[model.weight.dtype] * (100 if len(seen) <= 2 else len(seen))

    monkeypatch.setattr(precision, "seconds", faked)
    slow, fast = compare_speed(model, torch.bfloat16, lambda: None, CPU)
    assert seen == [torch.float32, torch.bfloat16] * (precision.REPEATS + 1)
    assert (slow, fast) == (2.0 * 5, 1.0 * 6)  # medians of the passes after the first pair
    assert torch.equal(model.weight, weights) and model.weight.dtype == torch.float32


def test_no_further_pass_is_started_when_these_took_long(monkeypatch):
    calls = []
    monkeypatch.setattr(precision, "seconds", lambda run, device: calls.append(1) or precision.BUDGET)
    compare_speed(nn.Linear(1, 1), torch.bfloat16, lambda: None, CPU)
    assert len(calls) == 4  # one of each to warm up, one of each that counts


def test_weights_come_back_after_an_operation_that_half_precision_lacks():
    model = nn.Linear(3, 2)
    weights = model.weight.detach().clone()

    def run():
        if model.weight.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")

    with pytest.raises(RuntimeError, match="BFloat16"):
        compare_speed(model, torch.bfloat16, run, CPU)
    assert torch.equal(model.weight, weights)


def test_cpus_without_bf16_arithmetic_are_not_measured(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "AVX2" in half_precision_excluded(CPU)
    assert half_precision_excluded(torch.device("cuda")) is None
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    assert half_precision_excluded(CPU) is None


def test_drift_of_class_logits():
    precise = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.6, 0.0], [1.0, -1.0, 3.0]])
    other = precise + torch.tensor([[0.1, 0.0, 0.0], [0.2, 0.0, 0.0], [0.0, 0.0, -0.4]])
    drift = measure_drift(Signals(logits=precise), Signals(logits=other), {"kd": SoftTargetsLoss(temperature=4.0)})
    p, q = (softmax(z.double().numpy() / 4) for z in (precise, other))
    assert drift.terms["kd"] == pytest.approx(16 * (p * np.log(p / q)).sum(-1).mean(), rel=1e-6)
    deviation = precise.double().numpy().std()
    assert drift.largest == pytest.approx(0.4 / deviation, rel=1e-6) and drift.mean == pytest.approx(0.7 / 9 / deviation, rel=1e-6)
    assert drift.equal_argmax == pytest.approx(2 / 3) and drift.finite and not drift.relative
    assert "66.67%" in str(drift) and "the term kd" in str(drift)


def test_drift_counts_real_tokens_alone_in_pieces(monkeypatch):
    g = torch.Generator().manual_seed(0)
    precise, noise = torch.randn(3, 5, 7, generator=g), 0.05 * torch.randn(3, 5, 7, generator=g)
    mask = torch.arange(5)[None] < torch.tensor([5, 3, 1])[:, None]
    other = torch.where(mask.unsqueeze(-1), precise + noise, 1e4)
    expected = [np.asarray(z[b, i].double()) for z in (precise, other) for b, i in mask.nonzero().tolist()]
    rows = np.stack(expected[:9]), np.stack(expected[9:])
    p, q = softmax(rows[0] / 2), softmax(rows[1] / 2)
    for size in (256, 2):
        monkeypatch.setattr(precision, "_ROWS", size)
        drift = measure_drift(
            Signals(logits=precise, attention_mask=mask), Signals(logits=other, attention_mask=mask), {"kd": SoftTargetsLoss(2.0)}
        )
        assert drift.terms["kd"] == pytest.approx(4 * (p * np.log(p / q)).sum(-1).mean(), rel=1e-6)
        assert drift.equal_argmax == pytest.approx((rows[0].argmax(-1) == rows[1].argmax(-1)).mean())
        assert drift.mean == pytest.approx(np.abs(rows[1] - rows[0]).mean() / rows[0].std(), rel=1e-6)


def test_drift_of_projections_is_that_of_their_logits():
    g = torch.Generator().manual_seed(0)
    features, weight, bias = torch.randn(6, 4, generator=g), torch.randn(9, 4, generator=g), torch.randn(9, generator=g)
    half = [tensor.bfloat16() for tensor in (features, weight, bias)]
    signals = [Signals(projection=Projection(*tensors)) for tensors in ((features, weight, bias), half)]
    drift = measure_drift(*signals, {})
    precise = features.double() @ weight.double().T + bias.double()
    rounded = (half[0].double() @ half[1].double().T + half[2].double()).bfloat16().double()
    assert drift.mean == pytest.approx(float((rounded - precise).abs().mean() / precise.std(correction=0)), rel=0.05)


def test_drift_of_spans_is_over_real_positions():
    precise = torch.tensor([[[1.0, 2.0, 9.0], [0.0, 3.0, 9.0]]])
    other = torch.tensor([[[1.5, 2.0, -9.0], [0.0, 3.0, 50.0]]])
    mask = torch.tensor([[True, True, False]])
    signals = [Signals(logits=z, attention_mask=mask) for z in (precise, other)]
    drift = measure_drift(*signals, {"kd": SoftTargetsLoss(1.0)}, spans=True)
    p, q = softmax(np.array([1.0, 2.0])), softmax(np.array([1.5, 2.0]))
    assert drift.terms["kd"] == pytest.approx((p * np.log(p / q)).sum() / 2, rel=1e-6)  # the other row, the end, is 0
    assert drift.largest == pytest.approx(0.5 / np.std([1.0, 2.0, 0.0, 3.0]), rel=1e-6) and drift.equal_argmax == 1.0


def test_drift_of_layers_is_relative_and_that_of_the_worst():
    states = torch.ones(2, 3, 4)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    other = {0: states * 1.01, 1: torch.where(mask.unsqueeze(-1), states * 1.1, 77.0)}
    drift = measure_drift(
        Signals(hidden_states={0: states, 1: states}, pooled=torch.tensor([[3.0, 4.0]]), attention_mask=mask),
        Signals(hidden_states=other, pooled=torch.tensor([[3.0, 4.5]]), attention_mask=mask),
        {},
    )
    assert drift.relative["hidden_states"] == pytest.approx(0.1, rel=1e-5) and drift.relative["pooled"] == pytest.approx(0.1, rel=1e-6)
    assert drift.mean is None and "hidden_states differ by 0.1 of their norm" in str(drift)


def test_what_is_no_longer_finite_is_seen():
    for other in (math.inf, math.nan):
        assert not measure_drift(Signals(logits=torch.ones(1, 2)), Signals(logits=torch.tensor([[1.0, other]])), {}).finite
        assert not measure_drift(Signals(pooled=torch.ones(1, 2)), Signals(pooled=torch.tensor([[1.0, other]])), {}).finite
    absent = Signals(logits=torch.tensor([[1.0, 2.0, -math.inf]]))
    drift = measure_drift(absent, copy.deepcopy(absent), {"kd": SoftTargetsLoss(2.0)})
    assert drift.finite and drift.mean == 0.0 and drift.terms["kd"] == 0.0


def test_drift_of_one_column_has_no_best_class():
    drift = measure_drift(Signals(logits=torch.tensor([[1.0], [3.0]])), Signals(logits=torch.tensor([[1.5], [3.0]])), {})
    assert drift.equal_argmax is None and drift.mean == pytest.approx(0.25) and drift.largest == pytest.approx(0.5)
