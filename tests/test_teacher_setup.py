"""What the trainer does about the teacher's precision, quantization and compilation before training."""

from __future__ import annotations

import copy
import functools
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import families
import pytest
import torch
from torch import nn
from training import Rows, arguments, flat, pad, ragged, run, state

from hfdistill import DistillationTrainer, Term, teacher_setup
from hfdistill.capture import CapturePlan
from hfdistill.teachers import CallableTeacher, FrozenTeacher, precision


def pair(family: str = "bert", **options):
    return families.build(family, 2, seed=1, **options), families.build(family, 4, seed=2, **options)


def trainer_for(tmp_path, teacher=None, data=None, **options) -> DistillationTrainer:
    student, own = pair()
    return DistillationTrainer(
        student,
        arguments(tmp_path, **options),
        teacher=own if teacher is None else teacher,
        train_dataset=ragged("bert") if data is None else data,
        data_collator=pad,
    )


@pytest.fixture
def clock(monkeypatch):
    """Passes take as many seconds as `clock` says for the precision of the weights; the processor excludes nothing."""
    times = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0}

    def faked(call, device):
        call()
        return times[fake.model.classifier.weight.dtype]

    fake = types.SimpleNamespace(times=times, model=None)
    original = teacher_setup.compare_speed

    def spied(model, *rest):
        fake.model = model
        return original(model, *rest)

    monkeypatch.setattr(teacher_setup, "compare_speed", spied)
    monkeypatch.setattr(precision, "seconds", faked)
    monkeypatch.setattr(teacher_setup, "half_precision_excluded", lambda device: None)
    return fake


@pytest.mark.parametrize(("half", "chosen"), [(0.5, torch.bfloat16), (0.95, torch.float32), (1.5, torch.float32)])
def test_auto_takes_bf16_where_it_is_clearly_faster(half, chosen, clock, tmp_path, capsys):
    clock.times[torch.bfloat16] = half
    student, teacher = pair()
    own, before = copy.deepcopy(teacher), state(student)
    trainer, gradients = run(student, teacher, ragged("bert"), arguments(tmp_path, teacher_dtype="auto"))
    printed = capsys.readouterr().out
    assert {p.dtype for p in teacher.parameters()} == {chosen} and {p.dtype for p in student.parameters()} == {torch.float32}
    assert printed.count("Teacher in ") == (2 if chosen == torch.bfloat16 else 1)
    assert f"{half:.3g} s in bfloat16" in printed and "1 s in float32" in printed
    if chosen == torch.float32:
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), own.parameters()))  # not by way of bf16
    _, plain = run(*pair(), ragged("bert"), arguments(tmp_path))
    close = dict(rtol=1e-6, atol=0) if chosen == torch.float32 else dict(rtol=0.02, atol=2e-4)
    torch.testing.assert_close(flat(gradients[0]), flat(plain[0]), **close)
    assert any(not torch.equal(before[name], tensor) for name, tensor in state(student).items())


def test_auto_asks_what_a_step_asks_on_a_batch_of_the_run(clock, tmp_path):
    seen = []

    class Recorded(FrozenTeacher):
        def __call__(self, batch, plan, *args, **options):
            seen.append((tuple(batch["input_ids"].shape), plan))
            return super().__call__(batch, plan, *args, **options)

    trainer_for(tmp_path, Recorded(pair()[1]), teacher_dtype="auto", per_device_train_batch_size=5, kd_weight=0.0, hidden_weight=1.0)
    assert seen == [((5, families.LENGTH), CapturePlan(logits=False, hidden_states=frozenset({1, 3})))] * (2 * precision.REPEATS + 2)


def test_this_machine_may_be_excluded_and_that_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(teacher_setup, "half_precision_excluded", lambda device: "this CPU (AVX2) has no bfloat16 arithmetic")
    monkeypatch.setattr(teacher_setup, "compare_speed", None)  # not called
    trainer = trainer_for(tmp_path, teacher_dtype="auto")
    assert capsys.readouterr().out == "Teacher in float32: this CPU (AVX2) has no bfloat16 arithmetic.\n"
    assert trainer.teacher.model.dtype == torch.float32


def test_auto_without_data_or_without_a_use_for_the_teacher_measures_nothing(clock, tmp_path, capsys):
    clock.times[torch.bfloat16] = 0.1
    student, teacher = pair()
    trainer = DistillationTrainer(student, arguments(tmp_path, teacher_dtype="auto"), teacher=teacher)
    assert "no training data" in capsys.readouterr().out and trainer.teacher.model.dtype == torch.float32
    trainer_for(tmp_path, teacher_dtype="auto", kd_weight=0.0)
    assert capsys.readouterr().out == "" and clock.model is None


def test_a_precision_in_which_the_model_does_not_run_is_not_taken(clock, tmp_path, capsys):
    class Picky(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.classifier = model, model.classifier

        def forward(self, input_ids, attention_mask):
            if self.classifier.weight.dtype != torch.float32:
                raise RuntimeError("\"op\" not implemented for 'BFloat16'\nsecond line")
            return self.model(input_ids, attention_mask).logits

    trainer = trainer_for(tmp_path, Picky(pair()[1]).eval(), teacher_dtype="auto")
    assert "Teacher in float32: it does not run in bfloat16 (\"op\" not implemented for 'BFloat16')." in capsys.readouterr().out
    assert {p.dtype for p in trainer.teacher.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_half_precision_of_its_own_is_kept_only_where_it_is_faster(fast, clock, tmp_path, capsys):
    clock.times[fast] = 0.5
    _, teacher = pair()
    trainer = trainer_for(tmp_path, teacher.bfloat16(), teacher_dtype="auto")
    assert trainer.teacher.model.dtype == fast
    assert "differ" not in capsys.readouterr().out  # there never were fp32 weights


def test_auto_is_decided_once_for_a_teacher(clock, tmp_path):
    """Seeds and stages have a trainer each; the second measurement would come out otherwise."""
    student, teacher = pair()
    clock.times[torch.bfloat16] = 0.95
    options = dict(teacher=teacher, teacher_dtype="auto")
    trainer_for(tmp_path, **options)
    assert own_dtypes(teacher) == {torch.float32}
    clock.times[torch.bfloat16] = 0.5
    trainer_for(tmp_path, **options)
    assert own_dtypes(teacher) == {torch.float32}


def own_dtypes(model) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


def test_drift_is_that_of_the_batch_and_printed_once(tmp_path, capsys):
    student, teacher = pair()
    own = copy.deepcopy(teacher)
    half = copy.deepcopy(teacher).bfloat16()
    trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, teacher_dtype="bfloat16", temperature=3.0, max_steps=3))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Teacher in")]
    assert len(printed) == 1 and printed[0].startswith("Teacher in bfloat16 against float32, on 8 examples: ")
    batch = {k: v for k, v in families.batch("bert", rows=8, seed=1).items() if k != "labels"}
    with torch.no_grad():
        p, q = own(**batch).logits.double(), half(**batch).logits.double()
    numbers = {name: float(re.search(pattern, printed[0])[1]) for name, pattern in {
        "mean": r"differ by (\S+) of their standard", "largest": r"and (\S+) at most", "equal": r"([\d.]+)% of the best",
        "kd": r"the term kd \(T = 3\) between the two is (\S+?)\.?$",
    }.items()}  # fmt: skip
    difference = (q - p).abs() / p.std(correction=0)
    assert numbers["mean"] == pytest.approx(float(difference.mean()), rel=0.06)
    assert numbers["largest"] == pytest.approx(float(difference.max()), rel=0.06)
    assert numbers["equal"] == pytest.approx(100 * float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.01)
    divergence = torch.nn.functional.kl_div((q / 3).log_softmax(-1), (p / 3).log_softmax(-1), log_target=True, reduction="batchmean")
    assert numbers["kd"] == pytest.approx(9 * float(divergence), rel=0.06)
    assert trainer.teacher.model.dtype == torch.bfloat16 and student.dtype == torch.float32


def test_a_second_trainer_with_the_same_teacher_has_nothing_to_say(tmp_path, capsys):
    _, teacher = pair()
    first = trainer_for(tmp_path, teacher, teacher_dtype="bfloat16")
    assert capsys.readouterr().out.count("Teacher in") == 1
    second = trainer_for(tmp_path, teacher, teacher_dtype="bfloat16")
    assert capsys.readouterr().out == "" and first.teacher.model is second.teacher.model
    second.train()
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


def test_hidden_states_alone_have_a_relative_error(tmp_path, capsys):
    trainer_for(tmp_path, teacher_dtype="bfloat16", kd_weight=0.0, hidden_weight=1.0)
    printed = capsys.readouterr().out
    assert re.search(r"examples: hidden_states differ by 0\.0\d+ of their norm\.$", printed.strip()) and "logits" not in printed


def test_terms_that_need_labels_are_replaced_by_soft_targets(tmp_path, capsys):
    student, teacher = pair()
    DistillationTrainer(
        student, arguments(tmp_path, teacher_dtype="bfloat16"), teacher=teacher, train_dataset=ragged("bert"),
        data_collator=pad, objective=[Term("decoupled")],
    )  # fmt: skip
    assert "the term soft_targets (T = 2) between the two is " in capsys.readouterr().out


def test_a_language_model_is_compared_on_few_tokens_at_the_rows_of_its_loss(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(teacher_setup, "_DRIFT_TOKENS", 3 * families.LENGTH)
    batch = families.batch("bert", rows=8, seed=1, labels=False)
    batch["labels"] = torch.where(torch.arange(families.LENGTH) % 2 == 0, batch["input_ids"], -100)
    rows = []
    original = teacher_setup.measure_drift
    monkeypatch.setattr(teacher_setup, "measure_drift", lambda first, *rest: rows.append(first.rows) or original(first, *rest))
    student, teacher = pair(head="MaskedLM")
    args = arguments(tmp_path, teacher_dtype="bfloat16", kd_positions="labelled")
    trainer, _ = run(student, teacher, Rows(batch), args)
    assert "on 3 examples: logits differ" in capsys.readouterr().out
    assert trainer._head == "chunked"
    # Padding is cut away by the loader; every second position of a row has a label.
    length = families.LENGTH
    expected = [row * length + i for row, real in enumerate((9, 6, 3)) for i in range(0, real, 2)]
    assert rows[0].tolist() == expected


def test_fp16_that_overflows_is_refused(tmp_path):
    _, teacher = pair()
    with torch.no_grad():
        teacher.classifier.weight.mul_(1e7)
    with pytest.raises(ValueError, match="not finite in torch.float16.*bfloat16"):
        trainer_for(tmp_path, teacher, teacher_dtype="float16")


class Other:
    """An accelerator of the second of two processes."""

    is_main_process, num_processes, device = False, 2, torch.device("cpu")


@pytest.mark.parametrize("decision", [True, False])
def test_other_processes_follow_the_first_and_say_nothing(decision, tmp_path, monkeypatch, capsys):
    trainer = trainer_for(tmp_path)
    trainer.args.teacher_dtype = "auto"
    told = iter([decision, True])  # whether half precision is faster, whether the signals are finite
    monkeypatch.setattr(teacher_setup, "broadcast", lambda flag: torch.tensor([int(next(told))]))
    monkeypatch.setattr(teacher_setup, "compare_speed", None)  # not called
    asked = []
    teacher_setup.TeacherSetup(trainer.teacher, trainer.args, Other(), trainer.objective, asked.append, lambda: {}).run()
    assert trainer.teacher.model.dtype == (torch.bfloat16 if decision else torch.float32)
    assert not asked and capsys.readouterr().out == "" and next(told, None) is None


def test_other_processes_stop_with_the_first(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    trainer.args.teacher_dtype = "float16"
    monkeypatch.setattr(teacher_setup, "broadcast", lambda flag: torch.tensor([0]))
    with pytest.raises(ValueError, match="not finite"):
        teacher_setup.TeacherSetup(trainer.teacher, trainer.args, Other(), trainer.objective, None, lambda: {}).run()


@pytest.mark.slow
def test_two_processes_decide_alike(tmp_path):
    """The second one would find bf16 slow; the first one's finding holds for both, and it alone prints."""
    worker = Path(__file__).with_name("two_processes_precision.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{worker.parent}{os.pathsep}{worker.parent.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(worker), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["2 torch.bfloat16"] * 2
    assert done.stdout.count("Teacher in bfloat16: ") == 1 and done.stdout.count("Teacher in bfloat16 against") == 1


@pytest.mark.parametrize("name", ["teacher_dtype", "teacher_quantization", "teacher_compile"])
def test_what_a_teacher_cannot_follow_is_refused(name, tmp_path):
    value = {"teacher_dtype": "auto", "teacher_quantization": "int8", "teacher_compile": True}[name]
    with pytest.raises(ValueError, match=f"{name}=.* would not be used.*a function"):
        trainer_for(tmp_path, lambda batch: torch.zeros(len(batch["labels"]), 3), **{name: value})
    with pytest.raises(ValueError, match=f"{name}=.* would not be used.*a function"):
        trainer_for(tmp_path, CallableTeacher(lambda batch: torch.zeros(len(batch["labels"]), 3)), **{name: value})
    _, placed = pair()
    placed.hf_device_map = {"": "cpu"}
    if name != "teacher_compile":
        for teacher in (placed, FrozenTeacher(placed)):
            with pytest.raises(ValueError, match=f"{name}=.* would not be used.*dispatched"):
                trainer_for(tmp_path, teacher, **{name: value})


def test_a_teacher_too_large_in_its_own_precision_is_cast_before_it_is_moved(tmp_path, monkeypatch, caplog, capsys):
    _, teacher = pair()
    original = type(teacher).to

    def small(self, *args, **options):
        if self is teacher and next(self.parameters()).dtype == torch.float32:
            raise torch.OutOfMemoryError("no room")
        return original(self, *args, **options)

    monkeypatch.setattr(type(teacher), "to", small)
    trainer = trainer_for(tmp_path, teacher, teacher_dtype="bfloat16")
    assert trainer.teacher.model.dtype == torch.bfloat16 and "drift" in caplog.text and capsys.readouterr().out == ""
    with pytest.raises(torch.OutOfMemoryError):
        trainer_for(tmp_path, teacher.float(), teacher_dtype="auto")


# ---- int8 ----


class _Int8:
    """What the tests need of torchao.quantization: weights are rounded to 127 steps of the largest in each row."""

    class Int8WeightOnlyConfig:
        pass

    @staticmethod
    def quantize_(model, config, filter_fn):
        for name, module in model.named_modules():
            if filter_fn(module, name):
                scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
                module.weight = nn.Parameter((module.weight.detach() / scale).round() * scale)
                module.weight.quantized = True


def test_int8_is_asked_of_torchao_for_all_linear_layers_but_the_vocabulary(tmp_path, monkeypatch, capsys):
    stub = types.ModuleType("torchao.quantization")
    stub.Int8WeightOnlyConfig, stub.quantize_ = _Int8.Int8WeightOnlyConfig, _Int8.quantize_
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", stub)
    student, teacher = pair(head="MaskedLM")
    batch = families.batch("bert", rows=8, seed=1, labels=False)
    batch["labels"] = batch["input_ids"].clone()
    trainer, _ = run(student, teacher, Rows(batch), arguments(tmp_path, teacher_quantization="int8"))
    done = {name for name, p in teacher.named_parameters() if getattr(p, "quantized", False)}
    linear = {f"{name}.weight" for name, module in teacher.named_modules() if isinstance(module, nn.Linear)}
    assert done == linear - {"cls.predictions.decoder.weight"} and len(done) == 4 * 6 + 1
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.cls.predictions.decoder.weight is teacher.bert.embeddings.word_embeddings.weight
    printed = capsys.readouterr().out
    assert printed.count("Teacher in int8 against float32") == 1 and "the term kd (T = 2) between the two is" in printed


def test_int8_without_torchao_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"pip install hfdistill\[torchao\]"):
        trainer_for(tmp_path, teacher_quantization="int8")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_int8_with_torchao(dtype, tmp_path, capsys):
    pytest.importorskip("torchao")
    student, teacher = pair()
    own = copy.deepcopy(teacher)
    options = dict(hidden_weight=0.5, attention_weight=0.5)
    trainer, gradients = run(
        student, teacher, ragged("bert"), arguments(tmp_path, teacher_quantization="int8", teacher_dtype=dtype, **options)
    )
    weight = teacher.bert.encoder.layer[0].output.dense.weight.dequantize()
    exact = own.bert.encoder.layer[0].output.dense.weight
    step = exact.detach().abs().amax(1, keepdim=True) / 127
    assert bool(((weight - exact).abs() <= step * (0.51 if dtype is None else 1.6)).all()) and not torch.equal(weight, exact)
    _, plain = run(*pair(), ragged("bert"), arguments(tmp_path, **options))
    torch.testing.assert_close(flat(gradients[0]), flat(plain[0]), rtol=0.05, atol=5e-3)
    what = "int8" if dtype is None else "bfloat16 and int8"
    assert capsys.readouterr().out.count(f"Teacher in {what} against float32") == 1
    trainer_for(tmp_path, teacher, teacher_quantization="int8")
    assert capsys.readouterr().out == ""  # it is int8 already


# ---- torch.compile ----


@pytest.fixture
def eager_backend(monkeypatch):
    """Traces as always, but compiles nothing, so that no C++ compiler runs."""
    calls = []
    compile = torch.compile

    def traced(model, **options):
        calls.append(options)
        return compile(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    yield calls
    torch._dynamo.reset()


def same_gradients(family, tmp_path, **options):
    options = dict(hidden_weight=0.5, embedding_weight=0.2, attention_weight=0.5, **options)
    models = [[families.build(family, depth, seed=depth) for depth in (1, 2)] for _ in range(2)]
    trainer, compiled = run(*models[0], ragged(family), arguments(tmp_path, teacher_compile=True, **options))
    assert trainer.teacher.compiled is not None
    _, plain = run(*models[1], ragged(family), arguments(tmp_path, **options))
    for ours, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(flat(ours), flat(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_teacher_gives_the_same_gradients(tmp_path, eager_backend):
    same_gradients("bert", tmp_path, per_device_train_batch_size=4, max_steps=2)
    assert eager_backend == [{}]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_compiled_teacher_follows_other_shapes(family, tmp_path, eager_backend):
    same_gradients(family, tmp_path, per_device_train_batch_size=3, max_steps=3)  # batches of 3, 3 and 2


def test_a_compiled_teacher_is_not_stopped_early(tmp_path):
    trainer = trainer_for(tmp_path, kd_weight=0.0, hidden_weight=1.0, layer_map="0:0,1:1")
    runs = []
    trainer.teacher.model.bert.encoder.layer[3].register_forward_hook(lambda *_: runs.append(1))
    for compiled, expected in ((None, 0), (trainer.teacher.model, 1)):
        trainer.teacher.stops_early, trainer.teacher.compiled = True, compiled
        trainer.teacher(families.batch("bert"), trainer._teacher_plan())
        assert len(runs) == expected


def test_a_compiled_model_that_gives_other_signals_is_refused(tmp_path, monkeypatch):
    class Stale(nn.Module):
        """Gives the outputs of its first batch for ever, as a graph with a hook of the past would."""

        def __init__(self, model):
            super().__init__()
            self.model, self.first = model, None

        def forward(self, **inputs):
            self.first = self.first or self.model(**inputs)
            return self.first

    monkeypatch.setattr(torch, "compile", Stale)
    with pytest.raises(ValueError, match="other signals.*teacher_compile"):
        trainer_for(tmp_path, teacher_compile=True)


def test_a_model_that_cannot_be_compiled_is_refused_before_training(tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler here\nmore")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="teacher_compile.*C\\+\\+"):
        trainer_for(tmp_path, teacher_compile=True)


@pytest.mark.slow
def test_a_teacher_compiled_for_this_machine_gives_the_same_gradients(tmp_path):
    torch._dynamo.reset()
    same_gradients("bert", tmp_path)
