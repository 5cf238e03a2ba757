"""The arms of a run: which are trained, on what, for how long; and whose the output folder is. Nothing is trained here."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from example_results import make_results
from training import arguments

from hfdistill import WITHOUT_TEACHER, Comparison, RecipeArguments, Run, label_comparisons, open_run


class Recorded(Run):
    """Writes down what would be trained; every distilled student takes 37 steps."""

    def __init__(self, args):
        super().__init__(args, "a" * 64)
        self.calls = []

    def finish(self, name, trainer):
        self.calls.append((name, *trainer))
        return SimpleNamespace(name=name, steps=37, model=f"trained {trainer[0]}")

    def finish_stages(self, name, stages, model, seed, **options):
        self.calls.append((name, stages, model, seed, options))
        return SimpleNamespace(name=name, steps=60)

    def measure(self, name, trainer):
        self.calls.append((name, "measured", *trainer))
        return SimpleNamespace(name=name, model=trainer[0])


def trainer_for(model, args, rows=None, teacher=None):
    return model, args, rows, teacher


def build(seed, say=None, **sizes):
    if say is not None:
        say("built once")
    return f"student {seed} {sizes}" if sizes else f"student {seed}"


def students(run, recipe, comparisons):
    data = {"train": "mixed", "labelled": "few"}
    return run.finish_students(recipe, build, trainer_for, data, {"teacher": "big"}, "accuracy", "all texts", comparisons)


def test_students_by_epochs_and_what_they_are_compared_with(tmp_path, capsys):
    """An epoch over few rows is shorter than one over many: all students get the steps of the distilled one."""
    run = Recorded(arguments(tmp_path, num_train_epochs=3, max_steps=-1, kd_weight=0.7, task_weight=0.3, learning_rate=2e-3))
    comparisons = {
        "alone": Comparison("student alone", "few", WITHOUT_TEACHER),
        "kd_alone": Comparison("soft targets alone", "more", {}, "big", steps=5),
    }
    arms = students(run, RecipeArguments(seeds=[3, 4]), comparisons)
    assert [call[0] for call in run.calls] == ["distilled_3", "alone_3", "kd_alone_3", "distilled_4", "alone_4", "kd_alone_4"]
    assert {name: [arm.name for arm in own] for name, own in arms.items()} == {
        name: [f"{name}_3", f"{name}_4"] for name in ("alone", "kd_alone", "distilled")
    }
    for (_, model, args, rows, teacher), (steps, epochs, kd, task, expected_rows, expected_teacher) in zip(
        run.calls, [(-1, 3, 0.7, 0.3, "mixed", "big"), (37, 3, 0.0, 1.0, "few", None), (5, 3, 0.7, 0.3, "more", "big")]
    ):
        assert (args.max_steps, args.num_train_epochs, args.kd_weight, args.task_weight) == (steps, epochs, kd, task)
        assert (model, rows, teacher, args.seed, args.learning_rate) == ("student 3", expected_rows, expected_teacher, 3, 2e-3)
        assert not args.push_to_hub
    assert run.calls[4][2].output_dir == run.folder("alone_4") and run.calls[4][2].seed == 4
    said = capsys.readouterr().out
    assert said.count("built once") == 1 and "Seed 4: student alone, 37 steps" in said


def test_students_in_stages(tmp_path):
    run = Recorded(arguments(tmp_path))
    stages = [{"name": "hints"}]
    arms = students(run, RecipeArguments(seeds=[0], stages=stages), {"alone": Comparison("student alone", "few", WITHOUT_TEACHER)})
    (name, own, model, seed, options), (_, _, args, _, _) = run.calls
    assert (name, own, model, seed, options["metric"]) == ("distilled_0", stages, "student 0", 0, "accuracy")
    assert options["teachers"] == {"teacher": "big"} and options["datasets"]["labelled"] == "few"
    assert options["build"]({"hidden_size": 8}) == "student 0 {'hidden_size': 8}"
    assert args.max_steps == 60 and list(arms) == ["alone", "distilled"]


def test_no_comparisons(tmp_path):
    assert list(students(Recorded(arguments(tmp_path)), RecipeArguments(seeds=[0]), {})) == ["distilled"]


@pytest.mark.parametrize("given", [True, False])
def test_teacher(tmp_path, given):
    run = Recorded(arguments(tmp_path, kd_weight=1.0, max_steps=9))
    recipe = RecipeArguments(teacher_training=None if given else {"max_steps": 4})
    pair = SimpleNamespace(needs_teacher_training=not given, recipe=recipe, teacher="big")
    arm = run.finish_teacher(pair, trainer_for, "rows", "all texts")
    assert arm.name == "teacher" and pair.teacher == arm.model
    if given:
        assert run.calls[0][:3] == ("teacher", "measured", "big") and pair.teacher == "big"
    else:
        _, model, args, rows, teacher = run.calls[0]
        assert (model, rows, teacher, args.max_steps, args.kd_weight, args.task_weight) == ("big", "rows", None, 4, 0.0, 1.0)
        assert pair.teacher == "trained big"


def test_control_only_where_the_teacher_has_more_labels():
    both = label_comparisons([1, 2], [3], [1, 2, 3, 4])
    assert [(name, own.rows, own.teacher) for name, own in both.items()] == [("alone", [1, 2], None), ("control", [1, 2, 3, 4], None)]
    assert "2 labelled texts" in both["alone"].title and "4 labelled texts" in both["control"].title
    assert list(label_comparisons([1, 2], [], [1, 2])) == ["alone"]


def processes(folder, count):
    return SimpleNamespace(
        output_dir=str(folder), world_size=count, should_save=True, should_log=False, main_process_first=lambda desc: nullcontext()
    )


def test_a_folder_belongs_to_a_number_of_processes(tmp_path):
    """Batches are put together anew on another number of them."""
    Run(processes(tmp_path, 2), "a" * 64)._claim()
    Run(processes(tmp_path, 2), "a" * 64)  # goes on
    with pytest.raises(ValueError, match="run aaaaaaaaaaaa on 2 processes, this one is aaaaaaaaaaaa\\)"):
        Run(processes(tmp_path, 1), "a" * 64)
    with pytest.raises(ValueError, match="this one is bbbbbbbbbbbb on 2 processes"):
        Run(processes(tmp_path, 2), "b" * 64)


def test_a_run_that_trained_nothing_owns_what_it_published(tmp_path, monkeypatch):
    """Its arms were all there already; started again, it must not take its own student for that of somebody else."""
    monkeypatch.setattr("hfdistill.runs.plot_results", lambda *args: None)
    run = Run(arguments(tmp_path), "a" * 64)
    (tmp_path / "config.json").write_text("{}")  # the published student
    trainer = SimpleNamespace(args=SimpleNamespace(), save_model=lambda folder: None, create_model_card=lambda: None)
    arm = SimpleNamespace(trainer=trainer, metrics={"eval_accuracy": 0.5}, log_history=[], stages=[])
    run.publish(arm, {"command": "x", **make_results()})
    Run(arguments(tmp_path), "a" * 64)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        Run(arguments(tmp_path), "b" * 64)


def test_a_run_is_known_by_settings_data_and_the_files_of_its_checkpoints(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/config.json").write_text("{}")
    recipe = RecipeArguments(teacher_model_name_or_path=str(tmp_path / "teacher"))

    def of(sha="s", data="d", recipe=recipe):
        return open_run(recipe, arguments(tmp_path / "out"), sha, data).fingerprint

    first = of()
    assert of() == first and len({first, of(sha="t"), of(data="e"), of(recipe=RecipeArguments())}) == 4
    (tmp_path / "teacher/config.json").write_text("{1}")
    assert of() != first
