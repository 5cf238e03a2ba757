"""Channels-last images and weights, pages kept while training, and a teacher on another device."""

from __future__ import annotations

import contextlib
import logging
import types

import families
import pytest
import torch
import vision_families
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from training import arguments, flat, ragged, run, state

from hfdistill import trainer_hardware
from hfdistill.signals import Projection, Signals
from hfdistill.teachers.frozen import concatenate


class Images(Dataset):
    def __init__(self, rows: int = 8):
        self.batch = vision_families.batch(64, rows)

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, i):
        return {"pixel_values": self.batch["pixel_values"][i], "labels": self.batch["labels"][i]}


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def resnets():
    return vision_families.build("resnet", 1, seed=1), vision_families.build("resnet", 2, seed=2)


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def train(tmp_path, **options):
    student, teacher = resnets()
    objective = [{"loss": "task", "weight": 0.5}, {"loss": "soft_targets"}, {"loss": "attention_transfer", "layer_map": "1:1,2:2"}]
    args = arguments(tmp_path, objective=objective, max_steps=2, save_strategy="steps", save_steps=1, **options)
    return run(student, teacher, Images(), args, data_collator=collate)


def test_images_and_convolutions_are_channels_last_and_nothing_else_changes(tmp_path):
    formats = {"student": [], "teacher": []}

    def watch(model, role):
        first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
        first.register_forward_pre_hook(lambda _module, args: formats[role].append((is_channels_last(args[0]), module_format(first))))

    def module_format(module):
        return is_channels_last(module.weight)

    student, teacher = resnets()
    watch(student, "student"), watch(teacher, "teacher")
    _, gradients = run(student, teacher, Images(), arguments(tmp_path, channels_last=True), data_collator=collate)
    assert {*formats["student"]} == {*formats["teacher"]} == {(True, True)}
    _, plain = run(*resnets(), Images(), arguments(tmp_path), data_collator=collate)
    torch.testing.assert_close(flat(gradients[0]), flat(plain[0]), rtol=1e-3, atol=1e-5)


def test_checkpoints_of_channels_last_models_are_plain(tmp_path):
    trainer, _ = train(tmp_path, channels_last=True)
    assert any(p.dim() == 4 and is_channels_last(p) for p in trainer.model.parameters())
    trainer.save_model(tmp_path / "final")
    for folder in (tmp_path / "final", tmp_path / "checkpoint-2"):
        assert all(tensor.is_contiguous() for tensor in load_file(folder / "model.safetensors").values())
        loaded = type(trainer.model).from_pretrained(folder)
        assert all(torch.equal(tensor, state(trainer.model)[name]) for name, tensor in loaded.state_dict().items())
    images = vision_families.batch(64)["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images).logits, trainer.model.eval()(images).logits, rtol=1e-4, atol=1e-5)


def test_training_in_channels_last_is_resumed_where_it_stopped(tmp_path):
    trainer, gradients = train(tmp_path, channels_last=True)
    student, teacher = resnets()
    objective = trainer.args.objective
    args = arguments(tmp_path, objective=objective, max_steps=2, channels_last=True)
    resumed, again = run(student, teacher, Images(), args, data_collator=collate, resume=str(tmp_path / "checkpoint-1"))
    assert any(p.dim() == 4 and is_channels_last(p) for p in resumed.model.parameters())
    torch.testing.assert_close(flat(again[-1]), flat(gradients[-1]), rtol=1e-4, atol=1e-6)


def test_text_models_have_nothing_to_lay_out_and_that_is_said(tmp_path, caplog):
    models = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
    with caplog.at_level(logging.WARNING, logger="hfdistill"):
        run(*models, ragged("bert"), arguments(tmp_path, channels_last=True))
    said = [record.getMessage() for record in caplog.records if "channels_last" in record.getMessage()]
    assert len(said) == 2 and "student (BertForSequenceClassification)" in " ".join(said) and "teacher" in " ".join(said)


@pytest.mark.parametrize("asked", [True, False])
def test_pages_are_kept_while_training_and_also_let_go_after_an_error(asked, tmp_path, monkeypatch):
    events = []

    @contextlib.contextmanager
    def keep():
        events.append("kept")
        try:
            yield True
        finally:
            events.append("let go")

    monkeypatch.setattr(trainer_hardware, "keep_memory_pages", keep)
    models = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
    trainer, _ = run(*models, ragged("bert"), arguments(tmp_path, keep_memory_pages=asked))
    assert events == (["kept", "let go"] if asked else [])
    monkeypatch.setattr(type(trainer), "training_step", lambda *_: events.append("step") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert events[-3:] == (["kept", "step", "let go"] if asked else ["step"])


def test_pages_are_not_kept_for_a_gpu_and_that_is_said(monkeypatch, caplog):
    monkeypatch.setattr(trainer_hardware, "keep_memory_pages", lambda: pytest.fail("kept"))
    monkeypatch.setattr(trainer_hardware.Trainer, "train", lambda self: "trained")
    trainer = object.__new__(trainer_hardware.TrainerHardware)
    trainer.args = types.SimpleNamespace(keep_memory_pages=True, device=torch.device("cuda", 0))
    assert trainer.train() == "trained" and "keep_memory_pages has no effect on cuda:0" in caplog.text


def test_a_teacher_on_a_device_of_its_own_answers_on_that_of_the_batch(tmp_path):
    options = dict(hidden_weight=0.5, attention_weight=0.5, teacher_batch_size=3)
    gradients = []
    for device in (None, "cpu:0"):
        models = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
        trainer, seen = run(*models, ragged("bert"), arguments(tmp_path, teacher_device=device, **options))
        gradients.append(flat(seen[0]))
    assert torch.equal(*gradients)


def test_every_signal_comes_back(monkeypatch):
    """`meta` stands for the device of the batch: whatever stayed behind is still on the CPU."""
    waits = []
    original = Tensor.to

    def spied(self, *args, **options):
        waits.append(options.get("non_blocking", False))
        return original(self, *args, **options)

    def tensor(*shape):
        return torch.ones(shape)

    def piece():
        return Signals(
            logits=tensor(2, 3), hidden_states={1: tensor(2, 4, 5)}, features={0: tensor(2, 3, 4, 4), "stem": tensor(2, 3, 8, 8)},
            embeddings=tensor(2, 4, 5), attention_scores={0: tensor(2, 2, 4, 4)}, queries={0: tensor(2, 4, 5)}, keys={0: tensor(2, 4, 5)},
            values={0: tensor(2, 4, 5)}, attention_allowed={0: tensor(2, 1, 4, 4).bool()}, pooled=tensor(2, 5), cls_logits=tensor(2, 3),
            distillation_logits=tensor(2, 3), attention_mask=tensor(2, 4).bool(), target_mask=tensor(2, 4).bool(),
            projection=Projection(tensor(2, 5), tensor(7, 5)),
        )  # fmt: skip

    monkeypatch.setattr(Tensor, "to", spied)
    for home, waiting in (("meta", True), ("cpu", False)):
        waits.clear()
        joined = concatenate([piece(), piece()], torch.device(home))
        found = [value for entry in vars(joined).values() for value in (entry.values() if isinstance(entry, dict) else [entry])]
        tensors = [value for value in found if isinstance(value, Tensor)] + [joined.projection.features]
        assert len(tensors) == 16 and {value.device.type for value in tensors} == {home} and {value.size(0) for value in tensors} == {4}
        assert {*waits} == {waiting}  # a copy to the CPU that is not waited for may be read before it is there
