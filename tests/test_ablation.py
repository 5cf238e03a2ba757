"""One part of a recipe left out at a time."""

import json
from dataclasses import dataclass, field

import pytest
import yaml
from recipes_under_test import ROOT, load_recipe

from hfdistill import load_ablation, parse, run_ablation
from hfdistill.ablation import changed_settings


@dataclass
class Recipe:
    student_init: str = "teacher"
    teacher_model_name_or_path: str | None = None
    teacher_training: dict | None = field(default_factory=lambda: {"max_steps": 3})
    baselines: bool = True
    allow_weak_teacher: bool = False
    stages: list | None = None
    seeds: tuple = (0, 1)


@dataclass
class Arguments:
    kd_weight: float = 5.0
    cosine_weight: float = 1.0
    output_dir: str = "out"
    should_save: bool = True
    push_to_hub: bool = True


STAGES = [
    {"name": "general", "embedding_weight": 1.0, "hidden_weight": 1.0, "max_steps": 4},
    {"name": "prediction", "kd_weight": 1.0, "data": "augmented"},
]


def test_changes_of_arguments_and_stages():
    recipe, args = changed_settings(Recipe(), Arguments(), {"kd_weight": 0.0, "student_init": "random"})
    assert (recipe.student_init, args.kd_weight, args.cosine_weight) == ("random", 0.0, 1.0)
    staged = Recipe(stages=STAGES)
    without, _ = changed_settings(staged, Arguments(), {"without_stages": ["general"]})
    assert without.stages == STAGES[1:]
    inside, _ = changed_settings(staged, Arguments(), {"in_stages": {"embedding_weight": 0.0, "data": "train"}})
    assert inside.stages == [{**STAGES[0], "embedding_weight": 0.0}, {**STAGES[1], "data": "train"}]
    one, _ = changed_settings(staged, Arguments(), {"of_stages": {"prediction": {"kd_weight": 0.0, "task_weight": 1.0}}})
    assert one.stages == [STAGES[0], {**STAGES[1], "kd_weight": 0.0, "task_weight": 1.0}]
    emptied, _ = changed_settings(staged, Arguments(), {"in_stages": {"kd_weight": 0.0}})
    assert [stage["name"] for stage in emptied.stages] == ["general"]  # a stage without any weight has nothing to train
    assert staged.stages is STAGES and STAGES[0]["embedding_weight"] == 1.0


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kd_wieght": 0.0}, "kd_weight"),
        ({"without_stages": ["pretraining"]}, "the stage 'pretraining'"),
        ({"in_stages": {"cosine_weight": 0.0}}, "would change nothing"),
    ],
)
def test_a_variant_that_would_be_the_full_recipe_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        changed_settings(Recipe(stages=STAGES), Arguments(), changes)


def settings(tmp_path, **changes):
    entries = {
        "recipe": "masked_lm", "config": "c.yaml", "output_dir": str(tmp_path / "out"),
        "shared": {"teacher_model_name_or_path": "_arms/teacher"},
        "variants": {"without soft targets": {"kd_weight": 0.0}, "random start": {"student_init": "random"}},
    } | changes  # fmt: skip
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in entries.items() if v is not None}, sort_keys=False))
    return path


def test_bad_files(tmp_path):
    for changes, words in [
        ({"variant": {}}, "unknown key 'variant'"),
        ({"config": None}, "has no 'config'"),
        ({"variants": {"full": {}}}, "'full'"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_ablation(settings(tmp_path, **changes))


def test_every_variant_runs_under_the_teacher_of_the_full_recipe_and_is_compared_seed_by_seed(tmp_path):
    calls = []

    def main(recipe, args):
        calls.append((recipe, args))
        values = [0.8, 0.6] if args.kd_weight and recipe.student_init == "teacher" else [0.5, 0.5] if args.kd_weight else [0.7, 0.4]
        score = {"mean": sum(values) / 2, "std": 0.1, "values": values}
        alone = {"accuracy": {"mean": 0.3, "std": 0.0, "values": [0.3, 0.3]}} if recipe.baselines else None
        return {
            "task": "toy", "metric": "accuracy", "seeds": [0, 1], "teacher": {"accuracy": 0.9}, "student_alone": alone,
            "student_distilled": {"accuracy": score}, "versions": {"torch": "1"},
        }  # fmt: skip

    path = settings(tmp_path)
    outcome = run_ablation(main, Recipe(), Arguments(), load_ablation(path), "the command")
    root = tmp_path / "out"
    assert [args.output_dir for _, args in calls] == [str(root / name) for name in ("full", "without_soft_targets", "random_start")]
    assert calls[0][0] == Recipe() and not any(args.push_to_hub for _, args in calls)
    for recipe, _ in calls[1:]:
        assert recipe.teacher_model_name_or_path == str(root / "full/_arms/teacher")
        assert recipe.teacher_training is None and not recipe.baselines and recipe.allow_weak_teacher
    assert outcome["differences"]["without soft targets"]["values"] == pytest.approx([-0.1, -0.2])
    assert outcome["differences"]["random start"]["mean"] == pytest.approx(-0.2)
    written = json.loads((root / "ablation.json").read_text())
    assert written["variants"]["full"]["values"] == [0.8, 0.6] and written["command"] == "the command"
    table = (root / "ablation.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "teacher",
        "student alone",
        "full",
        "without soft targets",
        "random start",
    ]
    assert (root / "ablation.png").stat().st_size > 10_000


def test_the_picture_has_a_bar_a_variant_and_a_dot_a_seed(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from hfdistill.plots import plot_variants

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    values = {name: {"mean": m, "std": 0.1, "values": [m - 0.1, m + 0.1]} for name, m in (("full", 0.7), ("without a", 0.5))}
    outcome = {"metric": "accuracy", "seeds": [0, 1], "teacher": 0.9, "alone": {"mean": 0.3}, "variants": values}
    plot_variants(outcome, tmp_path / "x.png")
    axis = drawn[0].axes[0]
    assert [patch.get_width() for patch in axis.patches] == [0.7, 0.5]
    dots = [line.get_xdata() for line in axis.lines if line.get_marker() == "o"]
    assert [list(xs) for xs in dots] == [[pytest.approx(0.6), pytest.approx(0.8)], [pytest.approx(0.4), pytest.approx(0.6)]]
    assert {line.get_xdata()[0] for line in axis.lines if line.get_marker() != "o"} == {0.9, 0.3}
    assert [text.get_text().split("  ")[0] for text in axis.get_yticklabels()] == ["full", "without a"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_ablations_change_their_recipes(path):
    ablation = load_ablation(path)
    recipe, args = parse(load_recipe(ablation["recipe"]).ARGUMENTS, ["--config", str(ROOT / ablation["config"])])
    variants = [changed_settings(recipe, args, changes) for changes in ablation["variants"].values()]
    assert len(variants) >= 4 and all((one, other) != (recipe, args) for one, other in variants)
    for name in ablation["shared"]:
        assert hasattr(recipe, name)


@pytest.mark.parametrize(
    "variants, words", [({"a b": {}, "a_b": {"kd_weight": 0.0}}, "share a folder"), ({"a": {"seeds": [3]}}, "changes the seeds")]
)
def test_what_could_not_be_compared_fails_before_the_full_run(tmp_path, variants, words):
    def never(*_):
        raise AssertionError("the full recipe was run")

    with pytest.raises(ValueError, match=words):
        run_ablation(never, Recipe(), Arguments(), load_ablation(settings(tmp_path, variants=variants)), "x")
