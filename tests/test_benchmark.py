"""Sizes are exact; times are only checked for their kind, order of calls and side effects, never for their value."""

from __future__ import annotations

import pytest
import torch
from families import batch, build
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from hfdistill import benchmark
from hfdistill.benchmark import count_parameters, interleaved_latency, measure_model, size_on_disk


class Recorder(nn.Module):
    """Writes down who was called, and under which circumstances."""

    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls = name, calls
        self.linear = nn.Linear(2, 2)
        self.frozen = nn.Dropout()
        self.frozen.eval()

    def forward(self, x):
        self.calls.append((self.name, self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        return self.linear(x)


ROW = {"x": torch.zeros(1, 2)}


def test_parameters_and_bytes(tmp_path):
    config = dict(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=12
    )
    model = BertForMaskedLM(BertConfig(**config))
    embeddings = (50 + 12 + 2) * 8 + 16
    block = 4 * (8 * 8 + 8) + 16 + (8 * 16 + 16) + (16 * 8 + 8) + 16
    head = (8 * 8 + 8) + 16 + 50  # the decoder's weight is the word embedding
    assert count_parameters(model) == embeddings + block + head
    payload = 4 * (embeddings + block + head)
    assert payload < size_on_disk(model) * 1e6 < payload + 8_000  # the header of safetensors
    model.save_pretrained(tmp_path)
    assert size_on_disk(model) == (tmp_path / "model.safetensors").stat().st_size / 1_000_000
    half = size_on_disk(model.bfloat16()) * 1e6
    assert payload / 2 < half < payload / 2 + 8_000


def test_plain_module_and_buffers():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert count_parameters(model) == 8 + 4
    assert 0 < size_on_disk(model) < 0.001


def test_measure_model():
    model = build("bert", 2)
    inputs = {name: value[:1] for name, value in batch("bert", labels=False).items()}
    result = measure_model(model, inputs, min_run_time=0.01)
    assert set(result) == {"parameters", "size_mb", "latency_ms", "latency_iqr_ms", "batch_size", "threads"}
    assert result["parameters"] == count_parameters(model) and result["size_mb"] == size_on_disk(model)
    assert result["latency_ms"] > 0 and result["latency_iqr_ms"] >= 0
    assert (result["batch_size"], result["threads"]) == (1, 1)
    assert all(type(value) in (int, float) for value in result.values())


@pytest.mark.parametrize("threads", [1, 2])
def test_circumstances_and_what_is_left_behind(threads):
    calls = []
    model = Recorder("a", calls)  # in training mode, but for one submodule
    before = torch.get_num_threads()
    measure_model(model, ROW, threads=threads, min_run_time=0.001)
    interleaved_latency({"a": (model, ROW)}, rounds=2, threads=threads, block_seconds=0)
    assert set(calls) == {("a", False, True, threads)}
    assert model.training and model.linear.training and not model.frozen.training
    assert torch.get_num_threads() == before and not torch.is_inference_mode_enabled()


def test_modes_come_back_after_an_error():
    model = Recorder("a", [])
    with pytest.raises(TypeError):
        measure_model(model, {"wrong": torch.zeros(1)})
    assert model.training and not model.frozen.training


def test_models_take_turns(monkeypatch):
    """Every other round runs backwards; speed-ups are medians of quotients within a round."""

    class FakeTimer:
        clock = {"a": iter([1.0, 1.0, 4.0, 10.0, 2.0]), "b": iter([1.0, 1.0, 1.0, 5.0, 4.0])}
        order = []

        def __init__(self, name):
            self.name = name

        def timeit(self, number):
            self.order.append((self.name, number))
            return type("Measurement", (), {"median": next(self.clock[self.name])})

    monkeypatch.setattr(benchmark, "_timer", lambda model, inputs, threads: FakeTimer(model.name))
    result = interleaved_latency({"a": (Recorder("a", []), ROW), "b": (Recorder("b", []), ROW)}, rounds=3, block_seconds=7.2)
    assert FakeTimer.order == [("a", 2), ("a", 2), ("b", 2), ("b", 2), *[(name, 7) for name in "abbaab"]]
    assert result["a"] == {"latency_ms": 4000.0, "latency_iqr_ms": 4000.0, "speedup": 1.0}
    # quotients 4/1, 10/5, 2/4: their median is 2, the quotient of the medians 1
    assert result["b"] == {"latency_ms": 4000.0, "latency_iqr_ms": 2000.0, "speedup": 2.0}


def test_a_slow_model_is_measured_three_times(monkeypatch):
    class SlowTimer:
        def timeit(self, number):
            return type("Measurement", (), {"median": 3.0})

        def blocked_autorange(self, min_run_time):
            return type("Measurement", (), {"times": [1.0]})

    monkeypatch.setattr(benchmark, "_timer", lambda *_: SlowTimer())
    result = measure_model(nn.Linear(2, 2), ROW)
    assert result["latency_ms"] == 3000.0 and result["latency_iqr_ms"] == 1000.0  # times 1, 3, 3


def test_bad_input():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="holds no tensor"):
        measure_model(model, {})
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        measure_model(model, ROW, threads=0)
    with pytest.raises(ValueError, match="got 0 models and rounds=15"):
        interleaved_latency({})
    with pytest.raises(ValueError, match="rounds=0"):
        interleaved_latency({"a": (model, ROW)}, rounds=0)
