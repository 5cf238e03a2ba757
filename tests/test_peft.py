"""LoRA students: adapters alone are trained and saved, the base may be the teacher, the merged student is a plain model."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import families
import numpy as np
import peft
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from training import ALL_TERMS, arguments, flat, pad, ragged, run, state, without_dropout

from hfdistill import AdaptersOffTeacher, DistillationTrainer, PeftArguments, lora_config, merged_student, parse
from hfdistill.models.peft_student import LORA_TARGETS, adapter_settings, adapters_off, wrap_student
from hfdistill.preparation import wrap_teacher


COMPARE = {**ALL_TERMS, "task_weight": 0.0}  # only terms that compare with a teacher
TEACHERS = ("base", "wide")


def config(**options) -> peft.LoraConfig:
    """Adapters that differ from 0 from the start (B is random), unless `init_lora_weights` says otherwise."""
    return peft.LoraConfig(**{"task_type": "SEQ_CLS", "r": 4, "init_lora_weights": False, **options})


def trainer_of(model, args, **options) -> DistillationTrainer:
    return DistillationTrainer(model, args, **{"data_collator": pad, "train_dataset": ragged("bert"), "teacher": "base", **options})


def moved_head(model):
    """Changes the trained copy of the head, so that it is not the base's own any more."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".modules_to_save." in name:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    return model


def kind_of(name: str) -> str:
    return "lora" if ".lora_" in name else "head" if ".modules_to_save." in name else "adapter" if name.startswith("adapter.") else "base"


# ---- Training, saving, resuming ----


def test_only_adapters_head_and_projections_are_trained(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)
    before = state(student)
    args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3, **ALL_TERMS)
    trainer, gradients = run(student, teacher, ragged("bert"), args, peft_config=config())
    assert {kind_of(name) for name in gradients[0]} == {"lora", "head", "adapter"}
    assert all(gradients[0][name].abs().max() > 0 for name in gradients[0])
    expected = {name for name, _ in trainer.model.named_parameters() if kind_of(name) != "base"}
    assert {name for name in gradients[0] if not name.startswith("adapter.")} == expected
    after = {name.replace(".base_layer", "").replace(".original_module", ""): p for name, p in state(student).items()}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    checkpoint = tmp_path / "checkpoint-3"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "distillation_state.safetensors"} <= files
    assert not files & {"model.safetensors", "config.json", "training_args.bin"}
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert all(".lora_" in name or ".classifier." in name for name in saved) and len(saved) == len(expected)


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
    **ALL_TERMS,
)


@pytest.mark.parametrize("kind", TEACHERS)
def test_resume_from_adapters_equals_uninterrupted_training(kind, tmp_path):
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        base = families.build("bert", 2, seed=1)
        teacher = "base" if kind == "base" else families.build("bert", 4, seed=2, hidden_size=48)
        # Another seed of the adapters: a resume that does not load them would show.
        student = wrap_student(base, config(lora_dropout=0.1), seed=0 if resume is None else 7)
        trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, **OPTIONS), resume=resume)
        ends.append((state(trainer.model), state(trainer.objective), trainer.state.log_history[:6]))
    for whole, resumed in zip(ends[0][:2], ends[1][:2]):
        assert whole.keys() == resumed.keys()
        for name, tensor in whole.items():
            assert torch.equal(resumed[name], tensor), name
    drop = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
    logs = [[{k: v for k, v in log.items() if k not in drop} for log in end[2]] for end in ends]
    assert logs[0] == logs[1]
    assert (len(ends[0][1]) > 0) == (kind == "wide")


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    args = arguments(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="rank", greater_is_better=True, hidden_weight=1.0,
    )  # fmt: skip
    falling = iter([2.0, 1.0])
    teacher = families.build("bert", 4, seed=2, hidden_size=48)
    options = dict(eval_dataset=ragged("bert", seed=4), compute_metrics=lambda _: {"rank": next(falling)}, peft_config=config())
    trainer, _ = run(families.build("bert", 2, seed=1), teacher, ragged("bert"), args, **options)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    other = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    now = peft.get_peft_model_state_dict(trainer.model)
    for name, tensor in load_file(best / "adapter_model.safetensors").items():
        assert torch.equal(now[name], tensor) and not torch.equal(other[name], tensor), name
    for name, tensor in load_file(best / "distillation_state.safetensors").items():
        assert torch.equal(trainer.objective.state_dict()[name], tensor), name


def test_peft_config_is_not_changed_and_the_seed_decides_the_adapters(tmp_path):
    given = config()
    before = given.to_dict()
    weights = []
    for state_before, seed in enumerate((0, 0, 1)):
        torch.manual_seed(state_before)
        args = arguments(tmp_path, seed=seed)
        trainer = trainer_of(families.build("bert", 2), args, peft_config=given)
        weights.append(flat({n: p.detach() for n, p in trainer.model.named_parameters() if ".lora_" in n}))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert given.to_dict() == before


def test_peft_config_with_model_init(tmp_path):
    base = families.build("bert", 2, seed=1)
    before = state(base)
    trainer, gradients = run(
        None, "base", ragged("bert"), arguments(tmp_path, **ALL_TERMS), peft_config=config(), model_init=lambda: copy.deepcopy(base)
    )
    assert isinstance(trainer.model, peft.PeftModel) and trainer.teacher.model is trainer.model.get_base_model()
    assert trainer.state.log_history[0]["kd"] > 0
    for name, tensor in before.items():
        assert torch.equal(base.state_dict()[name], tensor)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_default_targets_are_in_every_family(family):
    base = families.build(family, 2)
    task = "image" if family in families.IMAGE_FAMILIES else "sequence"
    model = wrap_student(base, lora_config(PeftArguments(use_peft=True), task))
    targets = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    depth = 1 if family == "albert" else 2
    assert len(targets) in (depth, 2 * depth)  # queries and values, or one matrix for both, in each block
    heads = [name for name, p in model.named_parameters() if ".modules_to_save." in name and p.requires_grad]
    assert heads and (family not in LORA_TARGETS or len(targets) == (2 if family == "modernbert" else 2 * depth))
    assert adapter_settings(model)["modules_to_save"] in (["classifier"], ["score"], ["classifier", "pre_classifier"])


# ---- The base as the teacher ----


ZERO = [("bert", {}), ("llama", {}), ("deberta_v2", {}), ("albert", {}), ("vit", {"task_type": None, "modules_to_save": ["classifier"]})]


@pytest.mark.parametrize(("family", "options"), ZERO, ids=[family for family, _ in ZERO])
def test_a_fresh_student_is_its_base_so_every_comparison_is_exactly_zero(family, options, tmp_path):
    head = {"classifier_dropout_prob": 0.0} if family == "albert" else {}
    base = families.build(family, 2, seed=1, **without_dropout("bert" if family != "llama" else family), **head)
    trainer, gradients = run(
        base, "base", ragged(family), arguments(tmp_path, **COMPARE), peft_config=config(init_lora_weights=True, **options)
    )
    logs = trainer.state.log_history[0]
    for name in ("kd", "logit_mse", "hidden", "embedding", "attention", "loss"):
        assert logs[name] == 0.0, name
    assert abs(logs["cosine"]) < 1e-6
    assert trainer.teacher.model is trainer.model.get_base_model()


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("bert", False), ("llama", False), ("deberta_v2", False), ("albert", False), ("bert", True), ("deberta_v2", True)],
)
def test_the_base_teaches_as_a_copy_of_it_would(family, checkpointing, tmp_path):
    """The copy is a module of its own, frozen and in eval mode, so this covers the head, dropout, taps and gradients at once."""
    results = []
    layer_map = "0:0" if family == "albert" else "0:1"  # other blocks of the teacher than of the student
    for teacher in ("base", "copy"):
        base = families.build(family, 2, seed=1)  # with dropout
        own = copy.deepcopy(base)
        student = moved_head(wrap_student(base, config(lora_dropout=0.2), seed=3))
        options = {"layer_map": layer_map, "activation_checkpointing": checkpointing, **ALL_TERMS}
        args = arguments(tmp_path, max_steps=2, learning_rate=0.05, **options)
        trainer, gradients = run(student, "base" if teacher == "base" else own, ragged(family), args)
        results.append((trainer.state.log_history[:2], gradients, state(student)))
    for key, value in results[0][0][0].items():
        assert value == results[1][0][0][key], key
    assert results[0][0][0]["kd"] > 0 and results[0][0][0]["attention"] > 0
    for ours, theirs in zip(results[0][1], results[1][1]):
        assert ours.keys() == theirs.keys() and {kind_of(name) for name in ours} == {"lora", "head"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(gradient.abs().max() > 0 for gradient in results[0][1][0].values())
    assert all(torch.equal(tensor, results[1][2][name]) for name, tensor in results[0][2].items())


def test_the_teacher_pass_leaves_every_flag_as_it_was(tmp_path):
    student = wrap_student(families.build("bert", 2, seed=1), config(lora_dropout=0.1))
    trainer = trainer_of(student, arguments(tmp_path, **ALL_TERMS))
    student.train()
    student.get_base_model().bert.embeddings.eval()
    frozen = next(p for name, p in student.named_parameters() if ".lora_A." in name).requires_grad_(False)
    training = {name: module.training for name, module in student.named_modules()}
    trainable = {name: p.requires_grad for name, p in student.named_parameters()}
    random = torch.get_rng_state()
    plans = trainer.objective.plans(trainer.objective.pairs_at(0), 0.0)
    signals = trainer.teacher(families.batch("bert"), plans[1])
    assert not signals.logits.requires_grad and torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in student.named_modules()} == training
    assert {name: p.requires_grad for name, p in student.named_parameters()} == trainable and not frozen.requires_grad
    with pytest.raises(RuntimeError, match="broken"), adapters_off(student):
        raise RuntimeError("broken")
    assert {name: module.training for name, module in student.named_modules()} == training
    with torch.no_grad():
        assert not torch.equal(student.eval()(**families.batch("bert", labels=False)).logits, signals.logits), "the adapters are on again"


def test_teacher_batch_size_cuts_the_batch_of_the_base_too(tmp_path):
    values = []
    for options in ({}, {"teacher_batch_size": 3}):
        args = arguments(tmp_path, **options, **ALL_TERMS)
        trainer, _ = run(families.build("bert", 2, seed=1), "base", ragged("bert"), args, peft_config=config())
        values.append(trainer.state.log_history[0])
    assert trainer.teacher.batch_size == 3
    for name in ("kd", "hidden", "attention"):
        assert values[0][name] == pytest.approx(values[1][name], rel=1e-4)


def test_the_base_survives_a_new_objective_and_evaluates(tmp_path):
    """A rebind takes the taps off and puts new ones on; teacher and student must share those too."""
    student = wrap_student(families.build("bert", 2, seed=1), config())
    args = arguments(tmp_path, eval_with_teacher=True, **ALL_TERMS)
    trainer = trainer_of(student, args, eval_dataset=ragged("bert", seed=2))
    metrics = trainer.evaluate()
    trainer._bind()
    assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"] and metrics["eval_kd"] > 0


def test_zero_under_autocast(tmp_path):
    base = families.build("bert", 2, seed=1, **without_dropout("bert"))
    args = arguments(tmp_path, bf16=True, **COMPARE)
    trainer, _ = run(base, "base", ragged("bert"), args, peft_config=config(init_lora_weights=True))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.0, abs=1e-6)


# ---- However the batch is cut ----


def first_gradient(kind, tmp_path, batch, steps):
    base = families.build("bert", 2, seed=1, **without_dropout("bert"))
    teacher = "base" if kind == "base" else families.build("bert", 4, seed=2, hidden_size=48)
    args = arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=2, **ALL_TERMS)
    trainer, gradients = run(moved_head(wrap_student(base, config(), seed=3)), teacher, ragged("bert"), args)
    return trainer, {f"{i}.{name}": g for i, step in enumerate(gradients) for name, g in step.items()}


def assert_same(gradient, reference):
    assert gradient.keys() == reference.keys()
    a, b = flat(gradient), flat(reference)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("kind", TEACHERS)
def test_accumulation_does_not_change_the_gradient(kind, tmp_path):
    _, whole = first_gradient(kind, tmp_path, 8, 1)
    for batch, steps in ((4, 2), (1, 8)):
        _, cut = first_gradient(kind, tmp_path, batch, steps)
        assert_same(cut, whole)


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path):
    worker = Path(__file__).with_name("two_processes_peft.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{worker.parent}{os.pathsep}{worker.parent.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(worker), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in TEACHERS:
        _, alone = first_gradient(kind, tmp_path / "alone", 8, 1)
        for rank in (0, 1):
            result = torch.load(tmp_path / f"{kind}_{rank}.pt", weights_only=True)
            assert result["world"] == 2
            assert_same(result["gradient"], alone)


# ---- What is refused ----


def refused(tmp_path, match, model=None, teacher="base", settings=None, **options):
    with pytest.raises(ValueError, match=match):
        args = arguments(tmp_path, **(settings or {}))
        trainer_of(families.build("bert", 2) if model is None else model, args, teacher=teacher, **options)


def test_what_cannot_work_is_refused_with_its_cure(tmp_path):
    refused(tmp_path, "BertForSequenceClassification has none.*peft_config=.*'./base'")
    refused(tmp_path, "BertForSequenceClassification has none", teacher=AdaptersOffTeacher())
    for name, value in (("teacher_dtype", "bfloat16"), ("teacher_device", "cpu"), ("teacher_model_init_kwargs", {"revision": "main"})):
        refused(tmp_path, f"{name}=.*would not be used.*Remove {name}", settings={name: value}, peft_config=config())
    refused(tmp_path, "neither a folder", teacher="./base", peft_config=config())
    wrapped = wrap_student(families.build("bert", 2), config())
    refused(tmp_path, "carries PEFT adapters already.*merge_and_unload", wrapped, peft_config=config())
    refused(tmp_path, "share.*teacher='base'", wrapped, teacher=wrapped.get_base_model())
    refused(tmp_path, "peft_config is a dict.*LoraConfig", peft_config={"r": 4})
    refused(tmp_path, "target_modules .*query key value", peft_config=config(target_modules=["q_proj"]))
    plain = families.build("bert", 2)
    plain.add_adapter(peft.LoraConfig(target_modules=["query"]))
    refused(tmp_path, "not in a peft.PeftModel", plain)


def test_a_moving_batch_norm_is_refused_because_the_base_would_move(tmp_path):
    base = families.build("bert", 2)
    base.bert.embeddings.dropout = torch.nn.Sequential()
    base.bert.pooler.activation = torch.nn.BatchNorm1d(32)
    refused(tmp_path, "BatchNorm .*pooler.activation.*deepcopy", base, peft_config=config())


def test_a_base_that_is_trained_too_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="bias configured"):
        refused(tmp_path, r"weights that the base needs too are trained.*bias='none'", peft_config=config(bias="all"))
    student = wrap_student(families.build("bert", 2), config())
    student.get_base_model().bert.embeddings.LayerNorm.requires_grad_(True)
    refused(tmp_path, "2 weights that the base needs too are trained .*LayerNorm", student)


def test_sharded_students_are_refused_because_the_teacher_goes_past_the_wrapper(tmp_path):
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match="past its FSDP wrapper.*copy of the base"):
        wrap_teacher(AdaptersOffTeacher(), arguments(tmp_path), accelerator)


def test_without_peft_it_says_what_to_install(monkeypatch, tmp_path):
    given = config()
    monkeypatch.setitem(sys.modules, "peft", None)
    for make in (lambda: wrap_student(families.build("bert", 2), given), lambda: lora_config(PeftArguments(use_peft=True), "sequence")):
        with pytest.raises(ValueError, match=r"pip install 'hfdistill\[peft\]'"):
            make()


# ---- The merged student ----


def test_merged_student_loads_where_peft_and_hfdistill_cannot_be_imported(tmp_path):
    base = families.build("bert", 2, seed=1)
    base.config.distilled_from = {"name_or_path": "org/big", "layers": [1, 3], "width": "same"}
    base.config._name_or_path = "/home/ana/models/small"
    args = arguments(tmp_path / "run", max_steps=3, learning_rate=0.05, **ALL_TERMS)
    trainer, _ = run(base, "base", ragged("bert"), args, peft_config=config())
    trainer.model.train()
    before, flags = state(trainer.model), [module.training for module in trainer.model.modules()]
    merged = merged_student(trainer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert flags == [module.training for module in trainer.model.modules()] and isinstance(trainer.model, peft.PeftModel)
    assert trainer.model.get_base_model().config._attn_implementation == "hfdistill_sdpa" != merged.config._attn_implementation
    assert type(merged) is type(base) and not merged.training and all(p.requires_grad for p in merged.parameters())
    assert merged.state_dict().keys() == families.build("bert", 2).state_dict().keys()
    merged.save_pretrained(tmp_path / "merged")
    code = f"""
import sys
sys.modules["hfdistill"] = sys.modules["peft"] = None
import json, torch
from transformers import AutoModelForSequenceClassification
model, report = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "merged")!r}, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
rows = torch.tensor([[5, 6, 7], [9, 8, 3]])
print(json.dumps([model(rows).logits.tolist(), model.config.distilled_from, model.config.merged_adapters]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    logits, origin, settings = json.loads(done.stdout.strip().splitlines()[-1])
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=torch.tensor([[5, 6, 7], [9, 8, 3]])).logits.tolist()
        without = base.eval()(torch.tensor([[5, 6, 7], [9, 8, 3]])).logits.tolist()
    assert np.allclose(logits, expected, atol=1e-5) and np.allclose(without, expected, atol=0)
    with torch.no_grad(), adapters_off(trainer.model):
        assert not np.allclose(logits, base(torch.tensor([[5, 6, 7], [9, 8, 3]])).logits.tolist(), atol=1e-4)
    assert origin == {"name_or_path": "org/big", "layers": [1, 3], "width": "same"}
    assert settings["base"] == "small" and settings["lora_r"] == 4 and settings["lora_target_modules"] == ["query", "value"]
    assert "/home" not in (tmp_path / "merged" / "config.json").read_text()


def test_a_merged_student_goes_on_with_its_trainer(tmp_path):
    options = dict(eval_dataset=ragged("bert", seed=2), peft_config=config())
    trainer, _ = run(families.build("bert", 2, seed=1), "base", ragged("bert"), arguments(tmp_path, **ALL_TERMS), **options)
    loss = trainer.evaluate()["eval_loss"]
    trainer.model = merged_student(trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    trainer.save_model()
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors"} <= files and "adapter_model.safetensors" not in files


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(ValueError, match="BertForSequenceClassification has no PEFT adapters"):
        merged_student(families.build("bert", 2))
    prompts = wrap_student(families.build("bert", 2), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING cannot be merged"):
        merged_student(prompts)
    tied = families.build("llama", 2, head="CausalLM", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie"):
        tied = wrap_student(tied, config(task_type="CAUSAL_LM", target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="tied.*target_modules"):
        merged_student(tied)


# ---- The card, the arguments ----


def card_of(trainer, folder) -> str:
    trainer.args.output_dir = str(folder)
    trainer.create_model_card()
    return (folder / "README.md").read_text()


def test_the_card_says_which_adapters_and_which_base(tmp_path):
    base = families.build("bert", 2, seed=1)
    base.config._name_or_path = "org/base"
    trainer, _ = run(base, "base", ragged("bert"), arguments(tmp_path / "student"), peft_config=config())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    text = card_of(trainer, tmp_path / "student")
    for line in ("base_model: org/base", "base_model_relation: adapter", "library_name: peft", "teacher_model: org/base"):
        assert line in text
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| `")}
    assert (rows["`lora_r`"], rows["`lora_alpha`"], rows["`lora_target_modules`"]) == ("4", "8", "query, value")
    assert rows["`trainable_parameters`"] == f"{trained} of {total} ({trained / total:.2%})"
    assert 'PeftModel.from_pretrained(base, "student")' in text and "num_labels=3" in text and "pipeline(" not in text
    trainer.model = merged_student(trainer)
    text = card_of(trainer, tmp_path / "student")
    assert "library_name: transformers" in text and "base_model_relation: finetune" in text
    assert "`lora_r`" in text and "PeftModel" not in text and "pipeline(" in text


def test_the_cards_code_loads_the_adapters(tmp_path, monkeypatch):
    base = families.build("bert", 2, seed=1)
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = "base"
    args = arguments(tmp_path / "student", max_steps=2, learning_rate=0.05)
    trainer, _ = run(base, "base", ragged("bert"), args, peft_config=config())
    trainer.save_model()
    code = card_of(trainer, tmp_path / "student").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # read by PEFT itself
        exec(code, scope)
    rows = families.batch("bert", labels=False)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(**rows).logits, trainer.model.eval()(**rows).logits)


def test_lora_config_has_trls_names_and_defaults():
    made = lora_config(PeftArguments(use_peft=True), "sequence")
    assert (made.r, made.lora_alpha, made.lora_dropout, made.task_type, made.target_modules) == (16, 32, 0.05, "SEQ_CLS", None)
    assert lora_config(PeftArguments(use_peft=True, lora_target_modules=["all-linear"]), "causal_lm").target_modules == "all-linear"
    assert lora_config(PeftArguments(use_peft=True, lora_modules_to_save=["pooler"]), "image").modules_to_save == ["pooler", "classifier"]
    assert [lora_config(PeftArguments(use_peft=True), t).task_type for t in ("token", "question_answering", "masked_lm", "features")] == [
        "TOKEN_CLS", "QUESTION_ANS", None, None,
    ]  # fmt: skip
    assert lora_config(PeftArguments(), "sequence") is None


@pytest.mark.parametrize(
    ("options", "task", "match"),
    [
        ({"lora_r": 4}, "sequence", "lora_r=4 would not be used.*--use_peft true"),
        ({"use_peft": True, "lora_r": 0}, "sequence", "lora_r must be at least 1, got 0"),
        ({"use_peft": True, "lora_alpha": -1}, "sequence", "lora_alpha must be at least 1, got -1"),
        ({"use_peft": True, "lora_dropout": 1.0}, "sequence", r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"use_peft": True}, "sequnce", "Unknown task 'sequnce'. Did you mean 'sequence'?"),
    ],
)
def test_settings_that_do_nothing_are_refused(options, task, match):
    with pytest.raises(ValueError, match=match):
        lora_config(PeftArguments(**options), task)


def test_the_arguments_parse_and_are_light():
    (given,) = parse(PeftArguments, ["--use_peft", "true", "--lora_r", "8", "--lora_target_modules", "query", "value"])
    assert (given.use_peft, given.lora_r, given.lora_target_modules) == (True, 8, ["query", "value"])
    code = "import sys, hfdistill; hfdistill.PeftArguments; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]", done.stderr
