"""A run as a list of stages: what is carried, what is not, and what a kill leaves behind."""

import copy
import json

import families
import pytest
import torch
from training import arguments, pad, ragged, state
from transformers import TrainerCallback

from hfdistill import DistillationTrainer, Stage, train_stages
from hfdistill.stages import expand_progressive, resolve_stages, stage_arguments


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Spy(TrainerCallback):
    """Keeps weights, adapters and learning rates at the beginning of a stage."""

    def __init__(self, spies):
        self.trainer, self.spies = None, spies

    def on_train_begin(self, args, state_, control, **kwargs):
        self.spies.append(self)
        self.weights = state(self.trainer.model)
        self.adapters = {name: p.detach().clone() for name, p in self.trainer.objective.state_dict().items()}
        self.moments = len(self.trainer.optimizer.state_dict()["state"])


def maker(data, spies=None, stop=None):
    """A `trainer_for` that keeps a spy a stage and stops the stage called `stop[0]` after `stop[1]` steps."""

    def trainer_for(model, args, rows, teacher):
        spy = Spy([] if spies is None else spies)
        callbacks = [spy] + ([Stop(stop[1])] if stop and args.output_dir.endswith(stop[0]) else [])
        trainer = DistillationTrainer(
            model, args, train_dataset=rows, eval_dataset=data, data_collator=pad, teacher=teacher, callbacks=callbacks,
            compute_metrics=lambda output: {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())},
        )  # fmt: skip
        spy.trainer = trainer
        return trainer

    return trainer_for


def models():
    student = families.build("bert", 2, seed=1)
    return student, families.build("bert", 4, seed=2, hidden_size=48), families.build("bert", 4, seed=3, hidden_size=48)


TINYBERT = [
    {"name": "general", "data": "corpus", "teacher": "general", "hidden_weight": 1.0, "attention_weight": 1.0, "max_steps": 4},
    {"name": "intermediate", "hidden_weight": 1.0, "attention_weight": 1.0, "learning_rate": 5e-4, "frozen_parts": ["embeddings"]},
    {"name": "prediction", "kd_weight": 1.0, "max_steps": 2},
]
RUN = dict(
    max_steps=3,
    save_strategy="steps",
    save_steps=1,
    per_device_train_batch_size=4,
    lr_scheduler_type="linear",
    train_sampling_strategy="random",
)


def three_stages(folder, spies=None, stop=None):
    student, teacher, general = models()
    data = ragged("bert")
    trainer, records = train_stages(
        TINYBERT, student, arguments(folder, **RUN), datasets={"train": data, "corpus": ragged("bert", seed=5)},
        teachers={"teacher": teacher, "general": general}, trainer_for=maker(data, spies, stop), metric="accuracy",
    )  # fmt: skip
    return student, trainer, records


def test_weights_and_adapters_are_carried_and_everything_else_is_not(tmp_path):
    spies = []
    student, trainer, records = three_stages(tmp_path, spies)
    assert [record.steps for record in records] == [4, 3, 2]
    assert [spy.moments for spy in spies] == [0, 0, 0]  # fresh optimizers
    ends = [spy.trainer for spy in spies]
    folders = ["0_general", "1_intermediate", "2_prediction"]
    from safetensors.torch import load_file

    for before, spy in zip(folders, spies[1:]):
        saved = load_file(tmp_path / before / "model.safetensors")
        assert saved.keys() == spy.weights.keys()
        for name, tensor in saved.items():
            assert torch.equal(spy.weights[name], tensor), name
    first = load_file(tmp_path / "0_general/distillation_state.safetensors")
    assert first and records[1].carried_adapters == len(first) and records[2].carried_adapters == 0
    for name, tensor in first.items():
        assert torch.equal(spies[1].adapters[name], tensor) and not torch.equal(spies[0].adapters[name], tensor), name
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(spies[1].weights[embeddings], spies[2].weights[embeddings])  # frozen in the second stage
    assert not torch.equal(spies[2].weights[embeddings], student.state_dict()[embeddings])  # and free again in the third
    assert [t.args.learning_rate for t in ends] == [1e-3, 5e-4, 1e-3]
    assert len({t.args.seed for t in ends}) == 3
    assert records[0].metrics == {} and 0 <= records[2].metrics["accuracy"] <= 1  # the head is not trained by the first stage
    assert trainer.model is student


def test_a_stage_names_its_whole_objective():
    args = arguments("unused", task_weight=0.3, kd_weight=0.7, num_train_epochs=3, max_steps=50)
    own = stage_arguments(args, Stage("a", settings={"hidden_weight": 1.0}), 1, "x")
    assert (own.task_weight, own.kd_weight, own.hidden_weight) == (0.0, 0.0, 1.0)
    assert stage_arguments(args, Stage("a"), 0, "x").kd_weight == 0.7
    by_list = stage_arguments(args, Stage("a", settings={"objective": [{"loss": "cosine"}]}), 0, "x")
    assert by_list.objective == [{"loss": "cosine"}]
    assert stage_arguments(replace_objective(args), Stage("a", settings={"kd_weight": 1.0}), 0, "x").objective is None
    assert stage_arguments(args, Stage("a", settings={"num_train_epochs": 2}), 0, "x").max_steps == -1
    assert (args.task_weight, args.kd_weight, args.max_steps) == (0.3, 0.7, 50)


def replace_objective(args):
    from dataclasses import replace

    return replace(args, task_weight=0.5, kd_weight=0.5, objective=[{"loss": "task"}])


@pytest.mark.parametrize("stop", [("0_general", 3), ("1_intermediate", 2), ("2_prediction", 1)])
def test_a_killed_run_goes_on_inside_its_stage_to_the_same_weights(tmp_path, stop):
    whole, whole_trainer, _ = three_stages(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        three_stages(tmp_path / "killed", stop=stop)
    done = sorted(path.parent.name for path in (tmp_path / "killed").glob("*/stage.json"))
    assert done == ["0_general", "1_intermediate", "2_prediction"][: int(stop[0][0])]
    spies = []
    again, trainer, records = three_stages(tmp_path / "killed", spies)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert [record.steps for record in records] == [4, 3, 2]
    assert len(spies) == 3 - int(stop[0][0])  # finished stages are not trained again
    assert trainer.state.global_step == 2


def test_a_stage_killed_between_saving_and_marking_is_trained_from_its_checkpoint(tmp_path):
    whole, _, _ = three_stages(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        three_stages(tmp_path / "killed", stop=("2_prediction", 1))
    (tmp_path / "killed/1_intermediate/stage.json").unlink()
    again, _, _ = three_stages(tmp_path / "killed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_finished_stages_are_read_back_with_what_they_logged(tmp_path):
    _, whole, _ = three_stages(tmp_path)
    _, again, _ = three_stages(tmp_path)
    assert again.state.log_history == whole.state.log_history and whole.state.log_history
    assert again.state.global_step == whole.state.global_step == 2


def test_adapters_put_on_in_every_stage_are_refused(tmp_path):
    from hfdistill import PeftArguments, lora_config

    data, teacher = ragged("bert"), families.build("bert", 2, seed=2)
    adapters = lora_config(PeftArguments(use_peft=True), "sequence")

    def trainer_for(model, args, rows, teacher):
        return DistillationTrainer(model, args, train_dataset=rows, data_collator=pad, teacher=teacher, peft_config=adapters)

    with pytest.raises(ValueError, match="stage 'one' put PEFT adapters on the student"):
        train_stages(
            [Stage("one"), Stage("two")], families.build("bert", 1), arguments(tmp_path, max_steps=1), datasets={"train": data},
            teachers={"teacher": teacher}, trainer_for=trainer_for,
        )  # fmt: skip


# ---- Progressive layerwise transfer ----


def test_progressive_transfer_is_one_stage_a_block():
    args = arguments("unused")
    stage = Stage("transfer", progressive=0.1, settings={"hidden_weight": 1.0, "attention_weight": 2.0, "max_steps": 7})
    stages = expand_progressive(stage, args, 3, 6)
    assert [stage.name for stage in stages] == ["transfer_0", "transfer_1", "transfer_2"]
    assert [stage.settings["layer_map"] for stage in stages] == ["0:1", "1:3", "2:5"]
    assert [stage.settings["frozen_parts"] for stage in stages] == [["head", "blocks.1-2"], ["head", "blocks.2-2"], ["head"]]
    assert [stage.settings["learning_rate_scales"] for stage in stages] == [
        {}, {"embeddings": 0.1, "blocks.0-0": 0.1}, {"embeddings": 0.1, "blocks.0-1": 0.1},
    ]  # fmt: skip
    frozen = expand_progressive(Stage("t", progressive=0, settings={"hidden_weight": 1.0}), args, 2, 2)
    assert frozen[1].settings["frozen_parts"] == ["head", "embeddings", "blocks.0-0"]
    listed = Stage("t", progressive=0.5, settings={"objective": [{"loss": "hidden_mse"}, {"loss": "embedding_mse"}]})
    assert expand_progressive(listed, args, 2, 4)[1].settings["objective"] == [
        {"loss": "hidden_mse", "layer_map": "1:3"},
        {"loss": "embedding_mse"},
    ]
    with pytest.raises(ValueError, match="no term that compares layers"):
        expand_progressive(Stage("t", progressive=0.1, settings={"kd_weight": 1.0}), args, 2, 2)
    headless = expand_progressive(Stage("t", progressive=0.1, settings={"hidden_weight": 1.0}), args, 2, 2, head=False)
    assert headless[1].settings["frozen_parts"] == []
    with pytest.raises(ValueError, match="not one teacher block"):
        expand_progressive(Stage("t", progressive=0.1, settings={"hidden_weight": 1.0, "layer_map": "0:0"}), args, 2, 2)


def test_progressive_transfer_trains_block_after_block(tmp_path):
    student, teacher = families.build("bert", 3, seed=1), families.build("bert", 3, seed=2)
    spies, data = [], ragged("bert")
    stages = [{"name": "transfer", "progressive": 0.0, "hidden_weight": 1.0, "max_steps": 2}]
    args = arguments(tmp_path, per_device_train_batch_size=4)
    _, records = train_stages(
        stages, student, args, datasets={"train": data}, teachers={"teacher": teacher}, trainer_for=maker(data, spies)
    )
    assert [record.name for record in records] == ["transfer_0", "transfer_1", "transfer_2"]
    states = [spy.weights for spy in spies] + [state(student)]
    for k, (before, after) in enumerate(zip(states, states[1:])):
        for name in before:
            own = f".layer.{k}." in name or (k == 0 and "embeddings" in name)
            assert torch.equal(before[name], after[name]) != own or "position_ids" in name, (k, name)


# ---- Teacher assistants ----


def test_a_stage_with_its_own_student_teaches_later_ones(tmp_path):
    """Against the same two trainings done by hand, one after the other."""
    data, teacher = ragged("bert"), families.build("bert", 4, seed=2)
    base = dict(per_device_train_batch_size=4, max_steps=3, kd_weight=1.0, task_weight=0.0)

    def assistant(sizes):
        return families.build("bert", sizes["num_hidden_layers"], seed=7)

    student = families.build("bert", 1, seed=1)
    stages = [Stage("assistant", student={"num_hidden_layers": 2}), Stage("student", teacher="assistant")]
    trainer, records = train_stages(
        stages, student, arguments(tmp_path / "chain", **base), datasets={"train": data}, teachers={"teacher": teacher},
        trainer_for=maker(data), build=assistant,
    )  # fmt: skip
    assert [record.teacher for record in records] == ["teacher", "assistant"]
    between, last = assistant({"num_hidden_layers": 2}), families.build("bert", 1, seed=1)
    seed = arguments("unused").seed
    for k, (model, guide) in enumerate([(between, teacher), (last, between)]):
        args = arguments(tmp_path / f"hand{k}", **base, **({"seed": seed + 1000 * k}))
        DistillationTrainer(model, args, train_dataset=data, data_collator=pad, teacher=copy.deepcopy(guide)).train()
    for name, tensor in last.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name


# ---- Bad input ----


@pytest.mark.parametrize(
    "stages, words",
    [
        ([], "empty list"),
        ([{"hidden_weight": 1.0}], "needs at least a 'name'"),
        ([{"name": "a"}, {"name": "a"}], "Two stages are called 'a'"),
        ([{"name": "a", "learning_rat": 1.0}], "learning_rate"),
        ([{"name": "a", "output_dir": "x"}], "belongs to the whole run"),
        ([{"name": "a", "teacher_dtype": "bfloat16"}], "belongs to the whole run"),
        ([{"name": "a b/c"}], "cannot name a folder"),
        ([{"name": "teacher"}], "cannot be called 'teacher'"),
        ([{"name": "a", "progressive": 2}], "from 0 \\(frozen\\) to 1"),
        ([{"name": "a", "student": {"num_hidden_layers": 1}}], "without 'student'"),
    ],
)
def test_stages_that_cannot_be(stages, words):
    with pytest.raises(ValueError, match=words):
        resolve_stages(stages)


@pytest.mark.parametrize(
    "stages, words",
    [
        ([{"name": "a", "data": "trian"}], "trains on data 'trian'.*train"),
        ([{"name": "a", "teacher": "assistent"}], "has the teacher 'assistent'"),
        ([{"name": "a", "student": {}}, {"name": "b"}], "nothing says how to build"),
        ([{"name": "a", "progressive": 0.1, "objective": [{"loss": "hidden_mse", "layer_map": "0:1"}]}], "which would not be used"),
        ([{"name": "a", "teacher": "none", "progressive": 0.1, "hidden_weight": 1.0}], "needs a model as its teacher"),
    ],
)
def test_what_the_run_does_not_offer_fails_before_training(stages, words, tmp_path):
    student, teacher, _ = models()

    def never(*_):
        raise AssertionError("training was set up")

    with pytest.raises(ValueError, match=words):
        train_stages(stages, student, arguments(tmp_path), datasets={"train": None}, teachers={"teacher": teacher}, trainer_for=never)


def test_records_are_plain_json(tmp_path):
    _, _, records = three_stages(tmp_path)
    written = [json.loads((tmp_path / f"{i}_{record.name}/stage.json").read_text()) for i, record in enumerate(records)]
    assert [entry["first_loss"] for entry in written] == [record.first_loss for record in records]
    assert all(entry["seconds"] > 0 for entry in written)


def test_a_finished_stage_with_other_settings_is_refused(tmp_path):
    three_stages(tmp_path)
    changed = [TINYBERT[0], {**TINYBERT[1], "learning_rate": 1e-4}, TINYBERT[2]]
    student, teacher, general = models()
    options = dict(datasets={"train": ragged("bert"), "corpus": ragged("bert", seed=5)}, teachers={"teacher": teacher, "general": general})
    with pytest.raises(ValueError, match="1_intermediate.*other settings"):
        train_stages(changed, student, arguments(tmp_path, **RUN), trainer_for=maker(ragged("bert")), **options)


def test_what_does_not_fit_in_a_later_stage_fails_before_the_first_is_trained(tmp_path):
    student, teacher, _ = models()
    before, spies = state(student), []
    stages = [{"name": "hints", "hidden_weight": 1.0}, {"name": "last", "kd_weight": 1.0, "frozen_parts": ["blocks.9"]}]
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        train_stages(
            stages, student, arguments(tmp_path), datasets={"train": ragged("bert")}, teachers={"teacher": teacher},
            trainer_for=maker(ragged("bert"), spies),
        )  # fmt: skip
    assert not spies and all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_frozen_parts_of_the_run_hold_in_every_stage_that_names_none():
    args = arguments("unused", frozen_parts=["embeddings"])
    assert stage_arguments(args, Stage("a"), 0, "x").frozen_parts == ["embeddings"]
    assert stage_arguments(args, Stage("a", settings={"frozen_parts": ["head"]}), 0, "x").frozen_parts == ["head"]


def test_card_and_results_show_the_objective_of_every_stage(tmp_path):
    from dataclasses import asdict

    from hfdistill.hub import distillation_card
    from hfdistill.run_card import staged_card
    from hfdistill.stage_training import staged_objective, stages_rows

    _, _, records = three_stages(tmp_path)
    stages = [asdict(record) for record in records]
    terms = staged_objective(stages)
    expected = [
        ("general", "hidden"),
        ("general", "attention"),
        ("intermediate", "hidden"),
        ("intermediate", "attention"),
        ("prediction", "kd"),
    ]
    assert [(term["stage"], term["name"]) for term in terms] == expected
    assert [row["learning rate"] for row in stages_rows(records)] == ["0.001", "0.0005", "0.001"]
    card = str(distillation_card({"student_name": "tiny", "teacher_name": "big", **staged_card(stages)}))
    assert "It was trained in stages" in card and "jiao2020tinybert" in card  # TinyBERT's losses stand in earlier stages
    for stage, name in expected:
        assert any(line.startswith(f"| {stage} | {name} |") for line in card.splitlines()), (stage, name)


def test_memories_and_queues_are_not_carried_into_another_stage(tmp_path):
    """They belong to the data and the teacher of their stage; adapters and parameters of the same term are carried."""
    import vision_families as vision
    from training import Rows, arguments, run

    from hfdistill import Term
    from hfdistill.stage_training import _carry_adapters

    terms = [Term("info_nce", options={"queue_size": 16, "projection": 4}), Term("hint", layer_map="0:0")]
    trainers = [
        run(vision.build("vit", 1), vision.build("vit", 2), Rows(vision.batch(32)), arguments(tmp_path / str(i)), objective=terms)[0]
        for i in range(2)
    ]
    for tensor in trainers[0].objective.state_dict().values():
        tensor.add_(1)
    before = {key: tensor.clone() for key, tensor in trainers[1].objective.state_dict().items()}
    carried = _carry_adapters(*trainers)
    changed = {key for key, tensor in trainers[1].objective.state_dict().items() if not torch.equal(tensor, before[key])}
    projections = {key for key in before if "projection" in key}
    assert len(projections) == 4 and not any("queue" in key for key in changed)
    assert changed == {key for key in before if key.startswith("terms.hint.adapters")} | projections and carried == len(changed) == 6
