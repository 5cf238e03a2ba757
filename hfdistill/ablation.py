"""What each part of a recipe is worth: the recipe again, with one part left out at a time."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from .arguments import WEIGHTS
from .plots import plot_variants
from .redaction import shareable
from .report import print_table, results_table, summarise
from .suggest import did_you_mean


FULL = "full"
_KEYS = ("recipe", "config", "output_dir", "shared", "variants")


def load_ablation(path: str | os.PathLike) -> dict[str, Any]:
    """An ablation from YAML.

    Keys: `recipe` (name of a file in `recipes/`), `config` (its YAML), `output_dir`, `variants` (name -> changes, see
    [`changed_settings`]), and optionally `shared`: arguments of the recipe that name a folder (its teachers, augmented texts) ->
    folder below the output of the full run, so that all variants use the same.

    Raises:
        ValueError: for missing and unknown keys.
    """
    settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    for key in settings:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r} in {path}.{did_you_mean(key, _KEYS)}")
    missing = [key for key in _KEYS if key not in settings and key != "shared"]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}. An ablation needs {', '.join(_KEYS)} (shared may be left out).")
    if FULL in settings["variants"]:
        raise ValueError(f"{path} has a variant called {FULL!r}: that is the recipe itself, which always runs. Choose another name.")
    return {"shared": {}, **settings}


def changed_settings(recipe: Any, args: Any, changes: Mapping[str, Any]) -> tuple[Any, Any]:
    """Arguments of a recipe with the changes of one variant.

    Args:
        recipe, args: the two dataclasses of the recipe.
        changes: arguments -> values; and, for runs in stages, `without_stages` (names of stages to leave out), `in_stages`
            (settings that replace those of the same name in every stage that has them; a weight of 0 removes the term) and
            `of_stages` (name of a stage -> settings that it gets).

    Raises:
        ValueError: for names that neither the recipe nor its stages have: the variant would be the full recipe.
    """
    changes = dict(changes)
    stages = deepcopy(getattr(recipe, "stages", None))
    left_out, inside, single = changes.pop("without_stages", []), changes.pop("in_stages", {}), changes.pop("of_stages", {})
    names = [stage["name"] for stage in stages or []]
    for name in [*left_out, *single]:
        if name not in names:
            raise ValueError(f"A variant names the stage {name!r}, but the stages are {names}: it would be the full recipe.")
    for stage in stages or []:
        stage.update(single.get(stage["name"], {}))
    stages = [stage for stage in stages or [] if stage["name"] not in left_out]
    for key, value in inside.items():
        hit = [stage for stage in stages if key in stage]
        if not hit:
            raise ValueError(f"in_stages sets {key!r}, which no stage has: the variant would change nothing.")
        for stage in hit:
            stage[key] = value
    # A stage whose objective is gone has nothing to train.
    stages = [s for s in stages if not any(w in s for w in WEIGHTS) or any(s.get(w) for w in WEIGHTS)]
    if names and not stages:
        raise ValueError("A variant leaves no stage, so there would be nothing to train. Leave one in.")
    own, training = {}, {}
    for key, value in changes.items():
        if key in {f.name for f in fields(recipe)}:
            own[key] = value
        elif key in {f.name for f in fields(args) if f.init}:
            training[key] = value
        else:
            known = [f.name for f in (*fields(recipe), *fields(args))]
            raise ValueError(f"unknown argument {key!r} in a variant.{did_you_mean(key, known)}")
    if left_out or inside or single:
        own["stages"] = stages or None
    return replace(recipe, **own), replace(args, **training)


def run_ablation(main: Callable[[Any, Any], dict], recipe: Any, args: Any, ablation: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Runs the recipe, then every variant of it with the same teachers and seeds, and writes `ablation.json`, `.md` and `.png`.

    What was finished before is not run again: every run has a folder of its own under `output_dir`.

    Args:
        main: of the recipe.
        recipe, args: its arguments, as `parse` gives them.
        ablation: from [`load_ablation`].
        command: that repeats it, for the record.

    Returns:
        The contents of `ablation.json`: `metric`, `seeds`, `variants` (name -> mean, std, values), `differences` to the full recipe,
        paired by seed.
    """
    root = Path(ablation["output_dir"])
    args = replace(args, push_to_hub=False)  # all of them would go to one repository
    plans = {name: changed_settings(recipe, args, changes or {}) for name, changes in ablation["variants"].items()}
    folders = variant_folders(plans, recipe, FULL)
    full = main(recipe, replace(args, output_dir=str(root / FULL)))
    metric = full["metric"]
    measured = {FULL: full["student_distilled"][metric]}
    for name, plan in plans.items():
        results = main(*under_the_same_teacher(plan, root / FULL, root / folders[name], ablation["shared"]))
        measured[name] = results["student_distilled"][metric]
    outcome = {
        "task": full["task"],
        "metric": metric,
        "seeds": full["seeds"],
        "teacher": full["teacher"][metric],
        "alone": None if full["student_alone"] is None else full["student_alone"][metric],
        "variants": measured,
        "differences": {name: paired_difference(value, measured[FULL]) for name, value in measured.items() if name != FULL},
        "changes": dict(ablation["variants"]),
        "versions": full["versions"],
        "command": command,
    }
    if args.should_save:
        outcome = shareable(outcome)
        root.mkdir(parents=True, exist_ok=True)
        (root / "ablation.json").write_text(json.dumps(outcome, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        rows = ablation_rows(outcome)
        (root / "ablation.md").write_text(results_table(rows) + "\n", encoding="utf-8")
        print_table(rows, title=f"{outcome['task']}: one part left out")
        plot_variants(outcome, root / "ablation.png")
    return outcome


def load_recipe(path: str | os.PathLike) -> Any:
    """A recipe's file as a module, with its `main` and `ARGUMENTS`.

    Raises:
        ValueError: where there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file, so there is no such recipe. Configs lie in a folder with the name of their recipe.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    recipe = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(recipe)
    return recipe


def variant_folders(plans: Mapping[str, tuple[Any, Any]], recipe: Any, first: str) -> dict[str, str]:
    """The folder of each plan, beside that of the run called `first`; before anything is trained.

    Raises:
        ValueError: for names that would share a folder, and plans that could not be compared with `recipe` seed by seed.
    """
    folders = {name: "".join(c if c.isalnum() else "_" for c in name) for name in plans}
    if len({first, *folders.values()}) <= len(folders):
        raise ValueError(f"Two variants would share a folder: {sorted(folders.values())}. Give them names that differ in letters.")
    if any(own.seeds != recipe.seeds for own, _ in plans.values()):
        raise ValueError("A variant changes the seeds, and differences are taken seed by seed. Set the seeds in the config.")
    return folders


def under_the_same_teacher(plan: tuple[Any, Any], first: Path, folder: Path, shared: Mapping[str, str]) -> tuple[Any, Any]:
    """Arguments of a recipe that trains its student alone in `folder`, under what the run in `first` has trained.

    Args:
        shared: arguments of the recipe that name a folder -> that folder below `first`.
    """
    own, training = plan
    own = replace(own, **{key: str(first / below) for key, below in shared.items()}, baselines=False)
    if "teacher_model_name_or_path" in shared:  # trained and measured by the first run
        own = replace(own, teacher_training=None, allow_weak_teacher=True)
    if "general_teacher_name_or_path" in shared:
        own = replace(own, general_teacher_training=None, general_teacher_mlm_probability=None)
    return own, replace(training, output_dir=str(folder))


def paired_difference(value: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and spread of `value - base`, seed by seed; both as [`summarise`] gives them."""
    return summarise([own - other for own, other in zip(value["values"], base["values"], strict=True)])


def ablation_rows(outcome: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table, for `results_table`: teacher, student alone, the full recipe, and each variant with its difference."""
    metric = outcome["metric"]
    rows = [{"variant": "teacher", metric: outcome["teacher"]}]
    if outcome["alone"] is not None:
        rows.append({"variant": "student alone", metric: outcome["alone"]})
    for name, value in outcome["variants"].items():
        rows.append({"variant": name, metric: value, "difference": outcome["differences"].get(name)})
    return rows
