"""Searches over arguments: what a trial sets reaches its student and its objective, and sweeps that go on after a kill."""

from __future__ import annotations

import gc
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass, field

import families
import numpy as np
import pytest
import torch
import yaml
from recipes_under_test import ROOT, load_recipe
from training import arguments, pad, ragged, state, without_dropout

import hfdistill
from hfdistill import DistillationTrainer, Run, parse, run_sweep
from hfdistill.sweep import VALIDATION_SHARE, arguments_of, best_as_yaml, check_space, on_validation_data, read_space


optuna = pytest.importorskip("optuna")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Transformers collects garbage three times a trial, which takes longer than these trials."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    optuna.logging.set_verbosity(optuna.logging.WARNING)


# ---- Trainer.hyperparameter_search ----


class Watched(DistillationTrainer):
    """Notes at each step what the trial is trained with."""

    def __init__(self, *args, **kwargs):
        self.steps = []
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        kd = self.objective.terms["kd"]
        mine = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        assert self.student.model is self.model and all(id(p) in mine for p in self.model.parameters())
        weights = next(p for name, p in self.model.named_parameters() if "query" in name).flatten()[0].item()
        self.steps.append((self._trial.number, kd.loss.temperature, kd.term.weight(0.0), self.args.seed, round(weights, 6)))
        return super().training_step(model, inputs, num_items_in_batch)


def searching(tmp_path, cls=Watched, **options):
    def fresh():
        return families.build("bert", 2, seed=trainer.args.seed if built else 0)

    built = []
    trainer = cls(
        args=arguments(tmp_path, **options), data_collator=pad, train_dataset=ragged("bert"), eval_dataset=ragged("bert", seed=2),
        model_init=fresh, teacher=families.build("bert", 3, seed=9),
    )  # fmt: skip
    built.append(True)
    return trainer


def grid_of(**values):
    return lambda trial: {name: trial.suggest_categorical(name, options) for name, options in values.items()}


def test_what_a_trial_sets_reaches_its_student_and_its_objective(tmp_path):
    trainer = searching(tmp_path)
    space = {"temperature": [1.0, 8.0], "kd_weight": [0.25], "seed": [5, 6]}
    best = trainer.hyperparameter_search(
        grid_of(**space), n_trials=4, backend="optuna", sampler=optuna.samplers.GridSampler(space, seed=0)
    )
    assert {steps[1:4] for steps in trainer.steps} == {(t, 0.25, seed) for t in (1.0, 8.0) for seed in (5, 6)}
    of_seed = {}
    for _, _, _, seed, weight in trainer.steps:
        of_seed.setdefault(seed, set()).add(weight)
    assert len(of_seed[5]) == len(of_seed[6]) == 1 and of_seed[5] != of_seed[6]  # each trial begins with the weights of its seed
    assert set(best.hyperparameters) == {"temperature", "kd_weight", "seed"} and np.isfinite(best.objective)
    assert set(trainer.objective.terms) == {"task", "kd"}  # and not the value of the last trial


def test_evaluation_and_pruning_in_a_trial_leave_the_objective_alone(tmp_path):
    trainer = searching(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1)

    class FirstReport(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 0

    storage = optuna.storages.InMemoryStorage()
    trainer.hyperparameter_search(
        grid_of(temperature=[2.0]), n_trials=2, backend="optuna", pruner=FirstReport(), storage=storage, study_name="s"
    )
    study = optuna.load_study(study_name="s", storage=storage)
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE"]
    assert [number for number, *_ in trainer.steps] == [0, 1, 1, 1]
    values = list(study.trials[1].intermediate_values.values())
    assert len(values) == 3 and study.trials[1].value == values[-1]
    assert set(trainer.objective.terms) == {"task", "kd"}


@pytest.mark.parametrize(
    ("options", "trial", "words"),
    [
        ({}, {"kd_weight": -1.0}, "kd_weight must be a finite number >= 0"),
        ({}, {"temperature": 0.0}, "temperature must be a finite number > 0"),
        ({"objective": [{"loss": "task"}, {"loss": "soft_targets", "name": "kd"}]}, {"kd_weight": 0.9}, "would not be used"),
        ({}, {"attention_weight": 1.0, "attention_loss": "attention_scores"}, "attention_loss must be one of"),
    ],
)
def test_a_trial_that_could_not_train_is_refused(tmp_path, options, trial, words):
    trainer = searching(tmp_path, **options)
    with pytest.raises(ValueError, match=words):
        trainer.hyperparameter_search(lambda _: trial, n_trials=1, backend="optuna")
    assert not trainer.steps and set(trainer.objective.terms) == {"task", "kd"}


def test_a_trial_trains_as_a_run_of_its_own_with_these_arguments(tmp_path):
    def fresh(seed):
        return families.build("bert", 2, seed=seed, **without_dropout("bert"))

    def trainer_of(model, **options):
        args = arguments(tmp_path, max_steps=3, train_sampling_strategy="random", per_device_train_batch_size=2, **options)
        return DistillationTrainer(model, args, pad, ragged("bert"), ragged("bert"), teacher=families.build("bert", 3, seed=9))

    plain = trainer_of(fresh(7), seed=7, temperature=5.0)
    plain.train()
    searched, weights = trainer_of(fresh(1), seed=1), []
    searched.model_init = lambda: fresh(searched.args.seed)
    evaluate = searched.evaluate
    searched.evaluate = lambda: weights.append(state(searched.model)) or evaluate()
    searched.hyperparameter_search(grid_of(temperature=[5.0], seed=[7]), n_trials=1, backend="optuna")
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in plain.model.state_dict().items())


# ---- The space ----


def test_spaces_from_json_and_yaml(tmp_path):
    assert read_space('{"temperature": {"low": 1, "high": 4}}') == {"temperature": {"low": 1, "high": 4}}
    path = tmp_path / "space.yaml"
    path.write_text("temperature: [1, 2.5]\n")
    assert read_space(str(path)) == {"temperature": [1, 2.5]}
    for text in ("{temperature", str(tmp_path / "no.yaml")):
        with pytest.raises(ValueError, match="neither JSON nor a YAML file"):
            read_space(text)
    with pytest.raises(ValueError, match="is a list, not a mapping"):
        read_space("[1, 2]")


OBJECTIVE = [{"loss": "task", "weight": 1.0}, {"loss": "soft_targets", "name": "kd", "weight": 1.0}, {"loss": "dist", "weight": 2.0}]


@pytest.mark.parametrize(
    ("space", "options", "trials", "words"),
    [
        ({}, {}, None, "space is empty"),
        ({"temperature": []}, {}, None, "at least one"),
        ({"temperature": [1, 2, 1.0]}, {}, None, "each once"),
        ({"temprature": [1]}, {}, None, "Did you mean 'temperature'"),
        ({"seed": [1]}, {}, None, "Pass --seeds"),
        ({"objective": ["x"]}, {}, None, "no training argument that can be swept"),
        ({"temperature": 4}, {}, None, "neither a list of values nor a range"),
        ({"temperature": {"low": 1, "hi": 4}}, {}, 3, "neither a list of values nor a range"),
        ({"temperature": {"low": 4, "high": 1}}, {}, 3, "low must be below high"),
        ({"temperature": {"low": 0, "high": 1, "log": True}}, {}, 3, "above 0 with log"),
        ({"temperature": {"low": 1, "high": 4}}, {}, None, "got trials=None. Pass --trials"),
        ({"temperature": [1, 2]}, {}, 3, "trials=3 has no effect"),
        ({"temperature": [1, 2]}, {"kd_weight": 0.0}, None, "no effect at kd_weight=0"),
        ({"temperature": [1, 2]}, {"schedules": {"temperature": {"type": "linear", "end": 1.0}}}, None, "has a schedule"),
        ({"temperature": [1, 2]}, {"objective": OBJECTIVE}, None, "Write term.setting, such as task.weight, kd.weight, dist.weight"),
        ({"kd.temperature": [1, 2]}, {}, None, "no term 'kd'.* It has plain weights"),
        ({"dst.weight": [1, 2]}, {"objective": OBJECTIVE}, None, "no term 'dst'.* Did you mean 'dist'"),
        ({"dist.betta": [1, 2]}, {"objective": OBJECTIVE}, None, "no setting 'betta'. Did you mean 'beta'"),
    ],
)
def test_spaces_without_effect_are_refused(tmp_path, space, options, trials, words):
    with pytest.raises(ValueError, match=words):
        check_space(space, arguments(tmp_path, **options), trials)


def test_settings_of_terms_and_lines_for_a_config(tmp_path):
    args = arguments(tmp_path, objective=OBJECTIVE)
    point = {"learning_rate": 0.01, "kd.temperature": 4.0, "dist.weight": 3.0}
    assert check_space({name: [value] for name, value in point.items()}, args)
    changed = arguments_of(args, point)
    assert changed["objective"] == [OBJECTIVE[0], {**OBJECTIVE[1], "temperature": 4.0}, {**OBJECTIVE[2], "weight": 3.0}]
    assert "temperature" not in args.objective[1] and changed["learning_rate"] == 0.01
    lines = best_as_yaml(point, args)
    assert yaml.safe_load(lines) == changed and lines.count("\n") == 5


# ---- Sweeps, on tiny text models ----


@dataclass
class Toy:
    seeds: list = field(default_factory=lambda: [0, 1])
    baselines: bool = True
    validation_share: float | None = None
    overwrite_output_dir: bool = False
    stages: list | None = None


class Toys:
    """A recipe on random rows: what is trained, and after how many trainings it breaks."""

    def __init__(self):
        self.trained, self.recipes, self.left = [], [], None

    def main(self, recipe, args, instead=None):
        self.recipes.append(recipe)
        toys = self

        class Student(DistillationTrainer):
            def training_step(self, *args, **kwargs):
                if toys.left is not None:
                    toys.left -= 1
                    if toys.left < 0:
                        raise toys.error
                kd = self.objective.terms["kd"]
                assert self.card["seed"] == self.args.seed  # what is made with the trainer, such as its collator, is of this seed
                toys.trained.append((self.args.seed, kd.term.weight(0.0), kd.loss.temperature))
                return super().training_step(*args, **kwargs)

            def evaluate(self, *args, **kwargs):
                seed, weight, temperature = toys.trained[-1]
                return {"eval_accuracy": weight + temperature / 100 + seed / 1000}

        def trainer_for(model, own, rows, teacher):
            trainer = Student(model, own, pad, rows, ragged("bert", seed=2), teacher=teacher)
            trainer.card["seed"] = own.seed
            return trainer

        def build(seed):
            return families.build("bert", 2, seed=seed)

        run = Run(args, "a fingerprint", overwrite=recipe.overwrite_output_dir)
        teachers = {"teacher": families.build("bert", 3, seed=9)}
        return instead(run, recipe, build, trainer_for, {"train": ragged("bert")}, teachers, "accuracy")


@pytest.fixture
def toys():
    return Toys()


GRID = {"temperature": [1, 4], "kd_weight": [0.25, 0.75]}
POINTS = [(seed, weight, temperature) for seed in (0, 1) for temperature in (1.0, 4.0) for weight in (0.25, 0.75)]


def test_a_grid_is_every_point_with_every_seed(tmp_path, toys, capsys):
    outcome = run_sweep(toys.main, Toy(), arguments(tmp_path, eval_strategy="steps"), GRID, "the command")
    assert toys.trained == POINTS
    assert toys.recipes[0].validation_share == VALIDATION_SHARE and not toys.recipes[0].baselines
    assert [point["settings"] for point in outcome["points"]] == [{"temperature": t, "kd_weight": w} for t in (1, 4) for w in (0.25, 0.75)]
    expected = [[w + t / 100 + seed / 1000 for seed in (0, 1)] for t in (1, 4) for w in (0.25, 0.75)]
    assert [point["value"]["values"] for point in outcome["points"]] == [pytest.approx(values) for values in expected]
    assert outcome["best"] == outcome["points"][3]
    assert json.loads((tmp_path / "sweep.json").read_text()) == outcome and outcome["command"] == "the command"
    assert len((tmp_path / "sweep.md").read_text().splitlines()) == 6
    assert (tmp_path / "accuracy-against-temperature.png").stat().st_size > 10_000
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("temperature:", "kd_weight:"))]
    assert yaml.safe_load("\n".join(lines)) == outcome["best"]["settings"]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])  # optuna calls the second one still running
def test_a_sweep_goes_on_where_it_was_stopped_and_grows(tmp_path, toys, error):
    toys.left, toys.error = 1, error
    args, grid = arguments(tmp_path), {**GRID, "kd_weight": [0.25]}
    points = [point for point in POINTS if point[1] == 0.25]
    with pytest.raises(type(error)):
        run_sweep(toys.main, Toy(), args, grid, "c")
    assert toys.trained == points[:1] and not (tmp_path / "sweep.json").exists()
    toys.left, toys.trained = None, []
    first = run_sweep(toys.main, Toy(), args, grid, "c")
    assert toys.trained == points[1:]  # the one that broke comes first
    toys.trained = []
    assert run_sweep(toys.main, Toy(), args, grid, "c") == first and not toys.trained
    grown = run_sweep(toys.main, Toy(seeds=[0, 1, 2]), args, {**grid, "temperature": [4, 1, 16.5]}, "c")
    assert sorted(toys.trained) == [(0, 0.25, 16.5), (1, 0.25, 16.5), (2, 0.25, 1.0), (2, 0.25, 4.0), (2, 0.25, 16.5)]
    assert len(grown["points"]) == 3
    old = {json.dumps(point["settings"]): point["value"]["values"] for point in first["points"]}
    new = {json.dumps(point["settings"]): point["value"]["values"][:2] for point in grown["points"]}
    assert old.items() <= new.items()
    toys.trained = []
    run_sweep(toys.main, Toy(overwrite_output_dir=True), args, grid, "c")
    assert toys.trained == points


def test_a_trial_that_was_waiting_when_the_sweep_was_killed_is_trained_with_its_own_seed(tmp_path, toys, monkeypatch):
    args, grid = arguments(tmp_path), {"temperature": [1, 4]}
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "hyperparameter_search", lambda self, **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_sweep(toys.main, Toy(seeds=[7]), args, grid, "c")
    outcome = run_sweep(toys.main, Toy(seeds=[0, 7]), args, grid, "c")
    assert toys.trained == [(7, 0.5, 1.0), (0, 0.5, 1.0), (0, 0.5, 4.0), (7, 0.5, 4.0)]
    assert [point["value"]["values"] for point in outcome["points"]] == [pytest.approx([0.51, 0.517]), pytest.approx([0.54, 0.547])]


def test_ranges_are_sampled_and_resumed_without_repeating(tmp_path, toys):
    space = {"temperature": {"low": 1, "high": 16, "log": True}, "kd_weight": [0.25, 0.75]}
    args = arguments(tmp_path)
    toys.left, toys.error = 2, RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"):
        run_sweep(toys.main, Toy(), args, space, "c", trials=5)
    toys.left = None
    outcome = run_sweep(toys.main, Toy(), args, space, "c", trials=5)
    assert len(toys.trained) == 5 == len(outcome["points"]) and outcome["kind"] == "tpe"
    temperatures = [temperature for *_, temperature in toys.trained]
    assert len(set(temperatures)) == 5 and all(1 <= temperature <= 16 for temperature in temperatures)
    assert [point["settings"]["temperature"] for point in outcome["points"]] == temperatures
    assert [point["seed"] for point in outcome["points"]] == [seed for seed, *_ in toys.trained]
    assert {seed for seed, *_ in toys.trained} == {0, 1}
    run_sweep(toys.main, Toy(), args, space, "c", trials=6)
    assert len(toys.trained) == 6
    other = arguments(tmp_path / "other")
    again = Toys()
    run_sweep(again.main, Toy(), other, space, "c", trials=2)
    assert again.trained == toys.trained[:2]  # seeded


def test_terms_of_an_objective_are_swept(tmp_path, toys):
    args = arguments(tmp_path, objective=OBJECTIVE[:2])
    outcome = run_sweep(toys.main, Toy(seeds=[3]), args, {"kd.temperature": [2.0, 9.0], "kd.weight": [0.5]}, "c")
    assert toys.trained == [(3, 0.5, 2.0), (3, 0.5, 9.0)] and (tmp_path / "accuracy-against-kd-temperature.png").is_file()
    assert outcome["best"]["settings"].keys() == {"kd.temperature", "kd.weight"}


# ---- Never on the test data ----


def test_recipes_that_would_choose_on_test_data_are_refused(tmp_path, toys):
    @dataclass
    class Text:
        seeds: list = field(default_factory=lambda: [0])

    for main, recipe in ((toys.main, Text()), (lambda recipe, args: None, Toy())):
        with pytest.raises(ValueError, match="measures on the data that it reports"):
            run_sweep(main, recipe, arguments(tmp_path), GRID, "c")
    with pytest.raises(ValueError, match="This config is in stages"):
        run_sweep(toys.main, Toy(stages=[{"name": "hint"}]), arguments(tmp_path), GRID, "c")
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="on the test data"):
            run_sweep(toys.main, Toy(validation_share=share), arguments(tmp_path), GRID, "c")
    assert on_validation_data(toys.main, Toy(validation_share=0.1)).validation_share == 0.1


def test_the_image_recipe_is_swept_on_images_that_nobody_is_trained_or_reported_on(tmp_path):
    recipe = load_recipe("image_classification")
    config = str(ROOT / "recipes/configs/image_classification/digits_resnet_kd.yaml")
    (own, args) = parse(recipe.ARGUMENTS, ["--config", config, "--output_dir", str(tmp_path), "--cpu_threads", "1"])
    test = set(next(iter(hfdistill.load_image_data(own).evaluation.values()))["example_id"])
    data = hfdistill.load_image_data(on_validation_data(recipe.main, own))
    assert list(data.evaluation) == ["validation"]
    held_out = set(data.evaluation["validation"]["example_id"])
    assert len(held_out) > 200 and not held_out & test
    for split in (data.teacher_train, data.labelled, data.transfer):
        assert not held_out & set(split["example_id"])


def test_without_optuna_the_error_says_what_to_install(tmp_path, toys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'hfdistill\[sweep\]'"):
        run_sweep(toys.main, Toy(), arguments(tmp_path), GRID, "c")


def test_one_process_only(tmp_path, toys, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match="--num_processes 1"):
        run_sweep(toys.main, Toy(), args, GRID, "c")


# ---- The program ----


@pytest.mark.slow
def test_a_killed_sweep_of_the_image_recipe_goes_on(tmp_path):
    program = ROOT / "scripts/sweep.py"
    flags = ["--space", '{"temperature": [1, 4], "kd_weight": [0.5]}', "--seeds", "0", "1", "--max_steps", "3"]
    flags += ["--teacher_training", '{"max_steps": 10}', "--allow_weak_teacher", "true", "--max_eval_samples", "50"]
    flags += ["--cpu_threads", "1", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, program, *flags], **quiet)

    def complete() -> int:
        try:
            with sqlite3.connect(tmp_path / "study.db") as base:
                return base.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]
        except sqlite3.OperationalError:
            return 0

    deadline = time.monotonic() + 240
    while complete() < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = complete()
    teacher = (tmp_path / "_arms/teacher/arm.json").stat().st_mtime_ns
    assert 2 <= done < 4
    subprocess.run([sys.executable, program, *flags], check=True, **quiet)
    assert complete() == 4 and (tmp_path / "_arms/teacher/arm.json").stat().st_mtime_ns == teacher
    assert json.loads((tmp_path / "sweep.json").read_text())["teacher"] > 0
