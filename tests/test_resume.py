"""Saving and resuming: a resumed run is the uninterrupted one, and checkpoints hold the student alone."""

import json
import subprocess
import sys

import families
import numpy as np
import torch
from training import ALL_TERMS, arguments, ragged, run


# ---- Saving and resuming ----


OPTIONS = dict(
    max_steps=6,
    save_strategy="steps",
    save_steps=3,
    layer_map="random",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    train_sampling_strategy="random",
    max_grad_norm=1.0,
    lr_scheduler_type="linear",
    num_train_epochs=3,
    schedules={"kd_weight": {"type": "linear", "start": 1.0, "end": 0.1}, "temperature": {"type": "cosine", "start": 4.0, "end": 1.0}},
    **ALL_TERMS,
)


def test_resume_equals_uninterrupted_training(tmp_path):
    """Adapters, schedules, random layer maps, dropout and shuffling included; checkpoints hold the student alone."""

    def models():
        return families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)

    student, teacher = models()
    whole, _ = run(student, teacher, ragged("bert"), arguments(tmp_path / "whole", **OPTIONS))
    again, teacher = models()
    resumed, _ = run(again, teacher, ragged("bert"), arguments(tmp_path / "whole", **OPTIONS), resume=str(tmp_path / "whole/checkpoint-3"))
    assert resumed.state.global_step == 6
    for name, tensor in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for name, tensor in whole.objective.state_dict().items():
        assert torch.equal(resumed.objective.state_dict()[name], tensor), name
    drop = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
    histories = [[{k: v for k, v in log.items() if k not in drop} for log in t.state.log_history[:6]] for t in (whole, resumed)]
    assert histories[0] == histories[1]
    assert any(True for _ in whole.objective.parameters())
    files = {path.name for path in (tmp_path / "whole/checkpoint-3").iterdir()}
    assert "distillation_state.safetensors" in files and "training_args.bin" not in files
    fresh = families.build("bert", 2)
    from safetensors.torch import load_file

    assert load_file(tmp_path / "whole/checkpoint-3/model.safetensors").keys() <= fresh.state_dict().keys()


def test_random_layer_maps_change_from_step_to_step(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 6, seed=2)
    trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, layer_map="random", hidden_weight=1.0))
    maps = [tuple(trainer.objective.pairs_at(step)["hidden"]) for step in range(8)]
    assert len(set(maps)) > 1 and maps == [tuple(trainer.objective.pairs_at(step)["hidden"]) for step in range(8)]


def test_similar_layer_map_is_kept_on_resume(tmp_path, monkeypatch):
    """The map is chosen on the untrained student; another student, or a trained one, might choose another."""
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, layer_map="similar", hidden_weight=1.0, attention_weight=1.0)
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
    first, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, **options))
    chosen = first.objective.terms["hidden"].pairs
    another = [(0, 0), (1, 3)] if chosen != [(0, 0), (1, 3)] else [(0, 1), (1, 2)]
    monkeypatch.setattr("hfdistill.binding.similar_layer_map", lambda *_: another)
    other = families.build("bert", 2, seed=9)
    resume = str(tmp_path / "checkpoint-2")
    second, _ = run(other, families.build("bert", 4, seed=2), ragged("bert"), arguments(tmp_path, **options), resume=resume)
    assert second.objective.terms["hidden"].pairs == chosen != another
    for name, tensor in student.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_saved_student_loads_where_hfdistill_cannot_be_imported(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)
    trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, **ALL_TERMS))
    trainer.save_model(str(tmp_path / "final"))
    code = f"""
import sys
sys.modules["hfdistill"] = None
from transformers import AutoModelForSequenceClassification
model, report = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "final")!r}, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
import torch
print(model(torch.tensor([[5, 6, 7]])).logits.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = student.eval()(torch.tensor([[5, 6, 7]])).logits.tolist()
    assert np.allclose(json.loads(done.stdout.strip().splitlines()[-1]), expected, atol=1e-6)
