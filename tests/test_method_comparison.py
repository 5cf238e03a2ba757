"""Methods beside each other: the shipped file of methods, the comparison, and what is measured of their costs."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field, replace

import pytest
import torch
import transformers as tf
import vision_families
import yaml
from recipes_under_test import ROOT, load_recipe
from training import Rows, arguments

import hfdistill
from hfdistill import (
    LOSSES,
    DistillationLoss,
    DistillationTrainer,
    LossValue,
    Method,
    Term,
    compare_methods,
    load_methods,
    memory_in_a_process,
    method_comparison,
    parse,
    peak_memory,
    step_costs,
)
from hfdistill import load_recipe as load_program
from hfdistill.method_comparison import ALONE, CONFIG, comparison_rows, cost_trainers, refusals, soft_targets_of, trains_its_teacher
from hfdistill.method_plots import plot_methods


SHIPPED = ROOT / "recipes/methods/image_classification.yaml"
METHODS = load_methods(SHIPPED)
# Of tokens, of spans and of rows of candidates; soft targets of other problem types than one class an image; divergences that are
# published for language models.
NOT_FOR_IMAGES = {
    "hidden_mse", "normalized_hidden_mse", "hidden_moments", "cosine", "embedding_mse", "patient", "attention_score_mse", "attention_kl",
    "attention_mse", "relation_kl", "margin_mse", "binary_soft_targets", "regression_mse",
    "reverse_kl", "jsd",
}  # fmt: skip


# ---- The shipped methods ----


def test_every_loss_for_images_is_in_a_method():
    assert NOT_FOR_IMAGES <= LOSSES.keys()
    used = {term["loss"] for method in METHODS.values() for term in method.objective}
    assert used - {"task"} == LOSSES.keys() - NOT_FOR_IMAGES


def test_shipped_methods_are_one_loss_each_unless_their_name_says_kd():
    for name, method in METHODS.items():
        assert method.objective[0]["loss"] == "task" and method.title != name
        assert any(term["loss"] == "soft_targets" for term in method.objective) == (name.split("_")[0] == "kd"), name


def test_every_number_of_a_shipped_weight_has_one_beside_it():
    lines = SHIPPED.read_text().splitlines()
    for number, line in enumerate(lines):
        if "- {loss:" in line and "weight:" in line:
            assert "#" in line or lines[number - 1].strip().startswith("#"), f"no figure beside line {number + 1}: {line}"


def resnet(scale: int, seed: int):
    torch.manual_seed(seed)
    sizes = [8 * scale, 16 * scale, 24 * scale]
    config = tf.ResNetConfig(embedding_size=8, layer_type="basic", hidden_sizes=sizes, depths=[1, 1, 1], num_labels=vision_families.LABELS)
    return tf.ResNetForImageClassification(config)


PAIRS = {
    "resnet": lambda: (resnet(1, seed=1), resnet(1, seed=2)),
    "wider resnet": lambda: (resnet(1, seed=1), resnet(2, seed=2)),
    "vit": lambda: (vision_families.build("vit", 1, seed=1), vision_families.build("vit", 2, seed=2)),
}


def stack(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trainer_of(tmp_path, student, teacher, rows=6, **options):
    data = Rows(vision_families.batch(32, rows=rows))
    return DistillationTrainer(student, arguments(tmp_path, **options), stack, data, teacher=teacher)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", METHODS)
def test_every_shipped_method_binds(name, pair, tmp_path):
    student, teacher = PAIRS[pair]()
    if name == "fsp" and pair != "resnet":
        with pytest.raises(ValueError, match="flows are matrices of different sizes"):
            trainer_of(tmp_path, student, teacher, **METHODS[name].changes())
        return
    trainer = trainer_of(tmp_path, student, teacher, **METHODS[name].changes())
    assert [term.loss_name for term in trainer.objective.terms.values()] == [term["loss"] for term in METHODS[name].objective]


def test_layers_of_the_shipped_methods(tmp_path):
    student, teacher = PAIRS["wider resnet"]()
    maps = {}
    for name in ("fitnet", "at", "sp", "review"):
        trainer = trainer_of(tmp_path, student, teacher, **METHODS[name].changes())
        (maps[name],) = [term.pairs for term in trainer.objective.terms.values() if term.layered]
    everywhere = [(0, 0), (1, 1), (2, 2)]
    assert maps == {"fitnet": [(1, 1)], "at": everywhere, "sp": [(2, 2)], "review": everywhere}


# ---- Methods as a file has them ----


def write(tmp_path, methods):
    path = tmp_path / "methods.yaml"
    path.write_text(yaml.safe_dump(methods, sort_keys=False))
    return path


AT = {"title": "attention", "objective": [{"loss": "task"}, {"loss": "attention_transfer", "weight": 10.0}]}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"title": "nothing"}, "neither an objective nor stages"),
        ({**AT, "learning_rat": 0.1}, "unknown key 'learning_rat'. Did you mean 'learning_rate'"),
        ({**AT, "max_steps": 5}, "sets max_steps, which has to be the same"),
        ({**AT, "kd_weight": 0.5}, "sets kd_weight beside its objective"),
        ({"objective": [{"loss": "atention_transfer"}]}, "The method 'x': Unknown loss .* Did you mean 'attention_transfer'"),
        ({"objective": [{"loss": "crd", "negative": 5}]}, "no setting 'negative'"),
    ],
)
def test_methods_that_could_not_be_compared(tmp_path, entry, words):
    with pytest.raises(ValueError, match=words):
        load_methods(write(tmp_path, {"x": entry}))


def test_names_of_methods(tmp_path):
    path = write(tmp_path, {"at": AT, "b": AT, "c": AT})
    assert list(load_methods(path)) == ["at", "b", "c"] and list(load_methods(path, ["c", "at", "c"])) == ["c", "at"]
    with pytest.raises(ValueError, match="no method 'att'. Did you mean 'at'"):
        load_methods(path, ["att"])


def test_a_method_replaces_the_weights_of_the_config(tmp_path):
    args = arguments(tmp_path, task_weight=0.3, kd_weight=0.7, temperature=3.0, schedules={"kd_weight": {"type": "linear", "end": 0.0}})
    changed = replace(args, **Method("at", **AT).changes())
    assert changed.objective == AT["objective"] and changed.kd_weight == 0.5 and changed.schedules is None and changed.temperature == 3.0


def test_soft_targets_of_the_config_beside_a_method(tmp_path):
    plain = arguments(tmp_path, task_weight=0.3, kd_weight=0.7, temperature=3.0)
    (term,) = soft_targets_of(plain)
    both = Method("at", **AT).with_terms([term])
    assert both.name == "at + kd" and both.objective[:2] == AT["objective"]
    bound = Term.from_dict(both.objective[2])
    assert bound.loss == "soft_targets" and bound.weight(0.5) == 0.7 and replace(plain, **both.changes())
    own = Method("kd_at", objective=[*AT["objective"], {"loss": "soft_targets"}])
    assert own.with_terms([term]) is own
    listed = arguments(tmp_path, objective=[{"loss": "task"}, {"loss": "soft_targets", "weight": 2.0, "temperature": 5.0}])
    assert soft_targets_of(listed) == [{"loss": "soft_targets", "weight": 2.0, "temperature": 5.0}]
    with pytest.raises(ValueError, match="the config has none"):
        soft_targets_of(arguments(tmp_path, kd_weight=0.0))


# ---- The comparison, on a recipe that trains nothing ----


@dataclass
class Toy:
    teacher_model_name_or_path: str | None = None
    teacher_training: dict | None = field(default_factory=lambda: {"max_steps": 3})
    baselines: bool = True
    allow_weak_teacher: bool = False
    overwrite_output_dir: bool = False
    stages: list | None = None
    seeds: tuple = (0, 1)


SCORES = {"kd": [0.7, 0.6], "at": [0.6, 0.6], "crd": [0.9, 0.8], CONFIG: [0.5, 0.7]}


def score(values):
    return {"mean": sum(values) / len(values), "std": 0.1, "values": values}


@pytest.fixture
def toy(monkeypatch):
    """A `main`, what it was called with, and the costs that were asked for; models that cannot do `fsp`."""
    calls, costs = [], []

    def refuse(name, plans, run, *parts):
        if name == "fsp":
            raise ValueError("student has 8 channels and teacher 16. Map other layers.")

    class Run:
        say = staticmethod(print)

    def main(recipe, args, instead=None):
        if instead is not None:
            assert not recipe.overwrite_output_dir
            return instead(Run(), recipe, None, None, None, None, "accuracy")
        calls.append((recipe, args))
        name = os.path.basename(args.output_dir)
        alone = {"accuracy": score([0.3, 0.4]), "steps": 5} if recipe.baselines else None
        return {
            "task": "toy", "metric": "accuracy", "seeds": [0, 1], "teacher": {"accuracy": 0.95}, "student_alone": alone,
            "student_distilled": {"accuracy": score(SCORES[name.split("___")[0]]), "steps": 5}, "agreement": 0.8,
            "agreements": {"alone": 0.4, "control": 0.6}, "baselines": {"control": {"accuracy": score([0.8, 0.8])}},
            "objective": [{"loss": "task", "weight": 0.25}, {"loss": "crd", "weight": {"start": 0.0, "end": 2.0}}],
            "seconds": {"distilled": 3.0}, "versions": {"torch": "1"}, "num_processes": 1,
        }  # fmt: skip

    def measured(trainers):
        costs.append(list(trainers))
        return {name: [1.0 + k] for k, name in enumerate(trainers)}

    monkeypatch.setattr(method_comparison, "cost_trainer", refuse)
    monkeypatch.setattr(method_comparison, "step_times", measured)
    return main, calls, costs


def methods_for(*names):
    return {name: Method(name, f"title of {name}", AT["objective"]) for name in names}


def test_all_methods_run_under_the_teacher_of_the_first_run(tmp_path, toy):
    main, calls, costs = toy
    args = arguments(tmp_path / "root", push_to_hub=True)
    memory = []
    outcome = compare_methods(
        main, Toy(overwrite_output_dir=True), args, methods_for("kd", "fsp", "crd"), "the command",
        measure_memory=lambda name: memory.append(name) or 10.0 * len(memory),
    )  # fmt: skip
    root = tmp_path / "root"
    assert [args.output_dir for _, args in calls] == [str(root / name) for name in (CONFIG, "kd", "crd")]
    assert not any(args.push_to_hub for _, args in calls)
    assert calls[0][0].baselines and calls[0][1].objective is None and calls[0][0].teacher_training
    for recipe, args in calls[1:]:
        assert recipe.teacher_model_name_or_path == str(root / CONFIG / "_arms/teacher") and recipe.teacher_training is None
        assert not recipe.baselines and recipe.allow_weak_teacher and args.objective == AT["objective"]
    assert costs == [[ALONE, CONFIG, "kd", "crd"]] and memory == [ALONE, CONFIG, "kd", "crd"]
    assert outcome["reference"] == "kd" and outcome["not_possible"] == {"fsp": "student has 8 channels and teacher 16."}
    crd = outcome["methods"]["crd"]
    assert crd["to_alone"]["values"] == pytest.approx([0.6, 0.4]) and crd["to_reference"]["values"] == pytest.approx([0.2, 0.2])
    assert (crd["step_time"], crd["step_seconds"], crd["memory_mb"]) == (4.0, 4.0, 40.0) and outcome["alone"]["memory_mb"] == 10.0
    assert outcome["methods"]["kd"]["to_reference"] is None
    assert outcome["methods"][CONFIG]["to_reference"]["values"] == pytest.approx([-0.2, 0.1])
    assert json.loads((root / "comparison.json").read_text()) == outcome
    lines = (root / "comparison.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["teacher", "student alone", "control", "crd", "kd", CONFIG, "fsp"]
    assert "0.25 task + (0 to 2) crd" in lines[5] and "not possible: student has 8 channels" in lines[-1]
    assert (root / "comparison.png").stat().st_size > 10_000


def test_without_the_method_kd_the_config_is_the_reference_and_known_memory_is_kept(tmp_path, toy):
    main, _, _ = toy
    args = arguments(tmp_path)
    own = json.dumps([{}, hfdistill.__version__])
    known = {ALONE: {"memory_mb": 1.0, "settings": own}, CONFIG: {"memory_mb": 2.0, "settings": own}}
    known["at"] = {"memory_mb": 3.0, "settings": "those of another objective"}
    (tmp_path / "memory.json").write_text(json.dumps(known))
    asked = []
    outcome = compare_methods(main, Toy(), args, methods_for("at"), "c", measure_memory=lambda name: asked.append(name))
    assert outcome["reference"] == CONFIG and outcome["methods"]["at"]["to_reference"]["values"] == pytest.approx([0.1, -0.1])
    assert asked == ["at"] and outcome["methods"][CONFIG]["memory_mb"] == 2.0 and outcome["methods"]["at"]["memory_mb"] is None


def test_a_method_that_fails_with_its_first_batch_does_not_end_the_comparison(tmp_path, toy):
    main, _, _ = toy

    def failing(recipe, args, instead=None):
        if instead is None and args.objective and "dkd" in args.output_dir:
            raise ValueError("The term 'decoupled' needs one class for each row, but mixup mixes them. Turn mixing off.")
        return main(recipe, args, instead)

    outcome = compare_methods(failing, Toy(), arguments(tmp_path), methods_for("at", "dkd"), "c")
    assert "at" in outcome["methods"] and outcome["not_possible"] == {
        "dkd": "The term 'decoupled' needs one class for each row, but mixup mixes them."
    }


def test_a_recipe_without_the_hook_has_no_costs(tmp_path, toy):
    main, calls, costs = toy
    outcome = compare_methods(lambda recipe, args: main(recipe, args), Toy(), arguments(tmp_path), methods_for("at"), "c")
    assert len(calls) == 2 and not costs and "step time" not in (tmp_path / "comparison.md").read_text()
    assert outcome["methods"]["at"]["step_time"] is None


def test_with_kd_has_folders_of_its_own(tmp_path, toy):
    main, calls, _ = toy
    outcome = compare_methods(main, Toy(), arguments(tmp_path, temperature=3.0), methods_for("at"), "c", with_kd=True)
    assert list(outcome["methods"]) == [CONFIG, "at + kd"] and os.path.basename(calls[1][1].output_dir) == "at___kd"
    assert calls[1][1].objective[-1]["loss"] == "soft_targets"


@pytest.mark.parametrize(
    ("recipe", "names", "words"),
    [
        (Toy(stages=[{"name": "a"}]), ["at"], "This config is in stages"),
        (Toy(), ["a b", "a_b"], "share a folder"),
        (Toy(), [CONFIG], "is called 'config'"),
    ],
)
def test_what_could_not_be_compared_fails_before_the_first_run(tmp_path, toy, recipe, names, words):
    main, calls, _ = toy
    with pytest.raises(ValueError, match=words):
        compare_methods(main, recipe, arguments(tmp_path), methods_for(*names), "c")
    assert not calls


def test_a_given_teacher_is_shared_as_it_is(tmp_path, toy):
    main, calls, _ = toy
    given = Toy(teacher_model_name_or_path="org/teacher", teacher_training=None)
    assert not trains_its_teacher(given) and trains_its_teacher(Toy())
    assert trains_its_teacher(replace(given, teacher_training={"max_steps": 1}))
    compare_methods(main, given, arguments(tmp_path), methods_for("at"), "c")
    assert calls[1][0].teacher_model_name_or_path == "org/teacher"


def test_rows_show_steps_only_where_they_differ():
    entry = {"value": score([0.5, 0.6]), "agreement": None, "terms": "t", "steps": 5}
    outcome = {"metric": "accuracy", "reference": "kd", "teacher": 0.9, "alone": None, "control": None, "not_possible": {}}
    rows = comparison_rows({**outcome, "methods": {"a": entry, "b": {**entry, "steps": 5}}})
    assert [row.get("steps") for row in rows] == [None] * 3
    rows = comparison_rows({**outcome, "methods": {"a": entry, "b": {**entry, "steps": 7}}})
    assert [row.get("steps") for row in rows] == [None, 5, 7]


# ---- Refusals and trainers ----


class Parts:
    """What a recipe hands to `instead`, on random images."""

    def __init__(self, tmp_path, **options):
        self.args, self.tmp_path, self.said, self.made = arguments(tmp_path, **options), tmp_path, [], []

    def say(self, text):
        self.said.append(text)

    def folder(self, name):
        return str(self.tmp_path / name)

    def __iter__(self):
        def trainer_for(model, args, rows, teacher):
            self.made.append((args.seed, teacher is None, [term["loss"] for term in args.objective or []]))
            return DistillationTrainer(model, args, stack, rows, teacher=teacher)

        teacher = resnet(2, seed=2)
        data = {"train": Rows(vision_families.batch(32, rows=6))}
        return iter((self, Toy(seeds=(4, 5)), lambda seed: resnet(1, seed), trainer_for, data, {"teacher": teacher}, "accuracy"))


def test_what_two_models_cannot_do_is_found_without_training(tmp_path):
    parts = Parts(tmp_path)
    plans = {name: (Toy(), replace(parts.args, **METHODS[name].changes())) for name in ("at", "fsp")}
    plans["staged"] = (Toy(stages=[{"name": "a"}]), None)
    found = refusals(plans, *parts)
    reason = "student has 8 channels and teacher 16 at a mapped layer: their flows are matrices of different sizes."
    assert found == {"fsp": reason} and parts.said == [f"fsp is not possible: {reason}"]


def test_trainers_whose_steps_are_measured_have_one_start_and_one_data_set(tmp_path):
    parts = Parts(tmp_path)
    plans = {"at": (Toy(), replace(parts.args, **METHODS["at"].changes()))}
    trainers = cost_trainers(plans, *parts)
    assert list(trainers) == [ALONE, CONFIG, "at"]
    assert parts.made == [(4, True, []), (4, False, []), (4, False, ["task", "attention_transfer"])]
    assert trainers[ALONE].objective.terms.keys() == {"task"} and trainers[CONFIG].objective.terms.keys() == {"task", "kd"}
    first = [next(trainer.model.parameters()) for trainer in trainers.values()]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])


# ---- Costs ----


class SlowLoss(DistillationLoss):
    """Takes its time, or its memory."""

    def __init__(self, seconds=0.0, megabytes=0):
        super().__init__()
        self.seconds, self.megabytes, self.seen = seconds, megabytes, 0

    def compute(self, student, teacher, mask):
        time.sleep(self.seconds)
        self.seen += 1
        ballast = torch.ones(self.megabytes * 250_000)
        return LossValue((student - teacher).square().sum() + ballast.sum() * 0, torch.tensor(student.size(0)))


def slow_trainer(tmp_path, weight=1.0, **options):
    student, own = PAIRS["resnet"]()
    loss = SlowLoss(**{key: options.pop(key) for key in ("seconds", "megabytes") if key in options})
    data = Rows(vision_families.batch(32, rows=8))
    args = arguments(tmp_path, per_device_train_batch_size=2, **options)
    terms = [Term("task"), Term(loss, weight=weight, name="slow")]
    return DistillationTrainer(student, args, stack, data, teacher=own, objective=terms)


def test_times_of_a_step_are_ratios_to_the_first(tmp_path):
    quick, slow = slow_trainer(tmp_path), slow_trainer(tmp_path, seconds=0.2)
    before = [tensor.detach().clone() for tensor in quick.model.parameters()]
    costs = step_costs({"quick": quick, "slow": slow}, rounds=3)
    assert costs["quick"] == 1.0 and costs["slow"] > 2
    assert not any(torch.equal(old, new) for old, new in zip(before, quick.model.parameters()))  # an update belongs to a step
    assert step_costs({"slow": slow, "quick": quick}, rounds=3)["quick"] < 0.5


def test_a_step_is_a_window_of_accumulation_with_scheduled_terms_on(tmp_path):
    ramp = {"type": "linear", "start": 0.0, "end": 1.0}
    trainer = slow_trainer(tmp_path, weight=ramp, gradient_accumulation_steps=3)
    step_costs({"one": trainer}, rounds=2)
    assert trainer.objective.terms["slow"].loss.seen == 3 * (2 + 2)  # two to warm up; a term of weight 0 would not have been computed


def test_trainers_take_turns_and_every_other_round_backwards(tmp_path):
    order = []

    class Recorded(DistillationTrainer):
        def training_step(self, *args, **kwargs):
            order.append(self.card["name"])
            return super().training_step(*args, **kwargs)

    trainers = {}
    for name in "abc":
        student, teacher = PAIRS["resnet"]()
        trainers[name] = Recorded(student, arguments(tmp_path), stack, Rows(vision_families.batch(32)), teacher=teacher)
        trainers[name].card["name"] = name
    step_costs(trainers, rounds=3)
    assert "".join(order) == "aabbcc" + "abc" + "cba" + "abc"


def test_no_trainers_and_no_rounds():
    for trainers, rounds in (({}, 3), ({"a": None}, 0)):
        with pytest.raises(ValueError, match="at least one trainer and one round"):
            step_costs(trainers, rounds)


def test_memory_counts_what_a_loss_takes_and_not_what_was_there(tmp_path):
    ballast = torch.ones(50_000_000)  # 200 MB that are in memory already
    torch.ones(100_000_000)  # given back at once
    plain, heavy = (peak_memory(slow_trainer(tmp_path, megabytes=size)) for size in (0, 300))
    assert ballast.sum() > 0 and plain < 150 < 290 < heavy < 450


def test_memory_of_a_process_of_its_own(tmp_path, capsys):
    assert memory_in_a_process(["bash", "-c", "echo text; echo 12.5"]) == 12.5
    assert memory_in_a_process(["bash", "-c", "echo $MALLOC_MMAP_THRESHOLD_"]) == 65536
    assert memory_in_a_process(["bash", "-c", "echo 12.5; echo broken >&2; exit 1"]) is None
    assert "No figure for the memory: broken" in capsys.readouterr().out


# ---- The picture ----


def test_the_picture_has_methods_from_the_best_down_and_their_times(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    entries = {"a": {"value": score([0.5, 0.6]), "step_seconds": 2.0}, "b": {"value": score([0.7, 0.8]), "step_seconds": None}}
    outcome = {"metric": "accuracy", "seeds": [0, 1], "teacher": 0.9, "reference": "kd", "methods": entries}
    plot_methods({**outcome, "alone": {"value": score([0.3, 0.4])}}, tmp_path / "x.png")
    left, right = drawn[0].axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["b  0.750", "a  0.550"]
    bars = {container[0].get_xdata()[0]: container[2][0].get_segments()[0][:, 0] for container in left.containers}
    assert list(bars) == pytest.approx([0.75, 0.55]) and list(bars[0.75]) == pytest.approx([0.65, 0.85])
    assert {line.get_xdata()[0] for line in left.lines if line.get_linestyle() == "--"} == {0.9, 0.35}
    assert [(bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in right.patches] == [(2.0, 1.0)]
    entries["b"]["memory_mb"] = 7.0
    plot_methods({**outcome, "alone": {"value": score([0.3, 0.4]), "memory_mb": 5.0}}, tmp_path / "x.png")
    memory = drawn[1].axes[2]
    assert [bar.get_width() for bar in memory.patches] == [7.0] and memory.lines[0].get_xdata()[0] == 5.0
    entries["b"]["memory_mb"] = entries["a"]["step_seconds"] = None
    plot_methods({**outcome, "alone": None}, tmp_path / "x.png")
    assert len(drawn[2].axes) == 1


# ---- With the recipe ----


@pytest.mark.slow
def test_the_program_goes_on_with_more_methods_and_gives_all_the_same_start(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    program = load_program(ROOT / "scripts/compare.py")
    flags = ["--seeds", "0", "--max_steps", "3", "--teacher_training", '{"max_steps": 10}', "--allow_weak_teacher", "true"]
    flags += ["--max_eval_samples", "50", "--cpu_threads", "1", "--output_dir", str(tmp_path), "--disable_tqdm", "true"]
    first = program.main(["--methods", "at,fsp", "--memory", "false", *flags])
    assert list(first["methods"]) == [CONFIG, "at"] and list(first["not_possible"]) == ["fsp"]
    assert first["methods"]["at"]["step_time"] > 1  # a teacher has to be asked
    arms = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("arm.json")}
    assert len(arms) == 5  # teacher, alone, control, and two distilled
    second = program.main(["--methods", "crd,at", "--memory", "true", *flags])
    assert list(second["methods"]) == [CONFIG, "crd", "at"]
    assert second["methods"]["at"]["value"] == first["methods"]["at"]["value"]
    assert {path: path.stat().st_mtime_ns for path in arms} == arms and len(list(tmp_path.rglob("arm.json"))) == 6
    assert second["methods"]["crd"]["memory_mb"] > 0 and second["alone"]["memory_mb"] > 0
    recipe = load_recipe("image_classification")
    parsed = parse(recipe.ARGUMENTS, ["--config", program.CONFIG, *flags])
    teacher = str(tmp_path / CONFIG / "_arms/teacher")
    given = replace(parsed[0], teacher_model_name_or_path=teacher, teacher_training=None)
    starts = [
        recipe.main(own, replace(parsed[1], output_dir=folder), instead=lambda run, own, build, *_: build(0).state_dict())
        for own, folder in ((parsed[0], str(tmp_path / CONFIG)), (given, str(tmp_path / "start")))
    ]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
