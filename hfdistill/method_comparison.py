"""What each of several methods is worth on one task: the same teacher, first weights, steps and seeds for all, and what they cost."""

from __future__ import annotations

import inspect
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from . import __version__
from .ablation import changed_settings, paired_difference, under_the_same_teacher, variant_folders
from .arguments import WEIGHTS, WITHOUT_TEACHER, DistillationTrainingArguments
from .costs import peak_memory, ratios, step_times
from .method_plots import plot_methods
from .redaction import shareable
from .report import print_table, results_table
from .runs import ARMS
from .schedules import Schedule
from .suggest import did_you_mean, nearest_or_all
from .terms import Term, resolve_terms
from .trainer import DistillationTrainer


CONFIG = "config"
ALONE = "student alone"
KD = "kd"
_SAME_FOR_ALL = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed",
    "output_dir", "push_to_hub",
)  # fmt: skip


@dataclass
class Method:
    """One way to distil: an objective, and training arguments that belong to it.

    Args:
        name: by which it is chosen, and which its folder gets.
        title: what it is, for the record.
        objective: its terms, as in `DistillationTrainingArguments`.
        settings: further training arguments, such as `learning_rate`, or `stages`.

    Raises:
        ValueError: without an objective or stages, for unknown settings, and for those that have to be the same for all methods.
    """

    name: str
    title: str = ""
    objective: list[dict[str, Any]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        where = f"The method {self.name!r}"
        if not self.objective and not self.settings.get("stages"):
            raise ValueError(f"{where} has neither an objective nor stages, so it would be the config once more. Give it a list of terms.")
        known = [f.name for f in fields(DistillationTrainingArguments) if f.init]
        for key in self.settings:
            if key in _SAME_FOR_ALL:
                raise ValueError(f"{where} sets {key}, which has to be the same for all methods. Set it in the config.")
            if key != "stages" and key not in known:
                raise ValueError(f"{where} has the unknown key {key!r}.{did_you_mean(key, ['title', 'objective', 'stages', *known])}")
            if key in WEIGHTS:
                raise ValueError(f"{where} sets {key} beside its objective, which would not be used. Write it as a term of the objective.")
        try:
            for term in self.objective or []:
                Term.from_dict(term)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def with_terms(self, terms: Sequence[Mapping[str, Any]]) -> Method:
        """The same with further terms, called `name + kd`; unchanged where it has soft targets already, or is in stages."""
        if not self.objective or any(term["loss"] == "soft_targets" for term in self.objective):
            return self
        return replace(self, name=f"{self.name} + {KD}", objective=[*self.objective, *terms])

    def changes(self) -> dict[str, Any]:
        """What it changes in the arguments of a recipe, for [`changed_settings`]: the weights of the config go with its objective."""
        knobs = DistillationTrainingArguments.__dataclass_fields__
        changes = {name: knobs[name].default for name in (*WEIGHTS, "schedules")} if self.objective else {}
        return {**changes, "objective": self.objective, **self.settings}


def load_methods(path: str | os.PathLike, names: Sequence[str] = ("all",)) -> dict[str, Method]:
    """Methods from a YAML file: name -> `title`, `objective` and further training arguments, see [`Method`].

    Args:
        path: of the file.
        names: which ones, in this order; `all` for all of the file.

    Raises:
        ValueError: for names that the file lacks, and methods that are not complete.
    """
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    names = list(entries) if list(names) == ["all"] else list(dict.fromkeys(names))
    for name in names:
        if name not in entries:
            raise ValueError(f"{path} has no method {name!r}.{nearest_or_all(name, entries)}")
    methods = {}
    for name in names:
        entry = dict(entries[name] or {})
        methods[name] = Method(name, entry.pop("title", name), entry.pop("objective", None), entry)
    return methods


def soft_targets_of(args: Any) -> list[dict[str, Any]]:
    """The soft targets of a config, as terms for an objective.

    Raises:
        ValueError: where it has none.
    """
    if args.objective is not None:
        terms = [dict(term) for term in args.objective if term["loss"] == "soft_targets"]
    else:
        terms = [term for term in resolve_terms(args) if term.loss == "soft_targets"]
        terms = [{"loss": term.loss, "name": KD, "weight": term.weight, **term.options} for term in terms]
    if not terms:
        raise ValueError(
            "with_kd adds the soft targets of the config to each method, but the config has none. Set its kd_weight, or leave with_kd out."
        )
    return [{key: value.as_dict() if isinstance(value, Schedule) else value for key, value in term.items()} for term in terms]


def compare_methods(
    main: Callable[..., Any],
    recipe: Any,
    args: Any,
    methods: Mapping[str, Method],
    command: str,
    with_kd: bool = False,
    measure_memory: Callable[[str], float | None] | None = None,
) -> dict[str, Any]:
    """Runs a recipe as its config has it, then once with each method, and writes `comparison.json`, `.md` and `.png`.

    The first run trains the teacher, the student alone and the control; all later ones take its teacher, and have the same first
    weights, steps and seeds. What was finished before is not run again: each method has a folder of its own below `output_dir`,
    and further methods can be added to the ones there. A method that these two models cannot do is reported as such.

    Costs are measured at the end, on one process: the time of an optimizer step with [`step_times`], in turns, in seconds and in
    relation to the student alone on the same images; and memory by `measure_memory`. Both need a recipe whose `main` takes `instead`.

    Args:
        main: of the recipe.
        recipe, args: its arguments, as `parse` gives them; `args.output_dir` is the root of all folders.
        methods: from [`load_methods`].
        command: that repeats it, for the record.
        with_kd: add the soft targets of the config to each method.
        measure_memory: name of a method (or `student alone`) -> megabytes, in a process of its own; see [`memory_of`].

    Returns:
        The contents of `comparison.json`.

    Raises:
        ValueError: for a recipe in stages, and before anything is trained for methods that cannot be compared.
    """
    if getattr(recipe, "stages", None):
        raise ValueError("This config is in stages, and a method replaces one objective. Choose a config with one objective.")
    root, args = Path(args.output_dir), replace(args, push_to_hub=False)  # all of them would go to one repository
    methods = chosen_methods(methods, args, with_kd)
    plans = {name: changed_settings(recipe, args, method.changes()) for name, method in methods.items()}
    folders = variant_folders(plans, recipe, CONFIG)
    base = recipe, replace(args, output_dir=str(root / CONFIG))
    first = main(*base)
    root.mkdir(parents=True, exist_ok=True)
    base = replace(recipe, overwrite_output_dir=False), base[1]
    offers = "instead" in inspect.signature(main).parameters
    refused = main(*base, instead=lambda *parts: refusals(plans, *parts)) if offers else {}
    shared = {"teacher_model_name_or_path": f"{ARMS}/teacher"} if trains_its_teacher(recipe) else {}
    measured = {CONFIG: first}
    for name, plan in plans.items():
        if name not in refused:
            try:
                measured[name] = main(*under_the_same_teacher(plan, root / CONFIG, root / folders[name], shared))
            except ValueError as error:  # what shows with the first batch only
                refused[name] = _first_sentence(error)
    outcome = _outcome(first, measured, methods, refused, command)
    if offers and args.world_size == 1:
        times = main(*base, instead=lambda *parts: step_times(cost_trainers({n: p for n, p in plans.items() if n not in refused}, *parts)))
        costs = ratios(times)
        rows = {**outcome["methods"], **({ALONE: outcome["alone"]} if outcome["alone"] else {})}
        for name, row in rows.items():
            row["step_time"] = costs.get(name)
            row["step_seconds"] = statistics.median(times[name]) if name in times else None
        if measure_memory is not None:
            settings = {name: json.dumps(shareable([methods[name].changes() if name in methods else {}, __version__])) for name in costs}
            memory = _memory(root / "memory.json", settings, measure_memory, anew=recipe.overwrite_output_dir)
            if outcome["alone"]:
                outcome["alone"]["memory_mb"] = memory[ALONE]
            for name in measured:
                outcome["methods"][name]["memory_mb"] = memory.get(name)
    if args.should_save:
        outcome = shareable(outcome)
        (root / "comparison.json").write_text(json.dumps(outcome, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        rows = comparison_rows(outcome)
        (root / "comparison.md").write_text(results_table(rows) + "\n", encoding="utf-8")
        short = [{key: value for key, value in row.items() if key != "terms"} for row in rows[: len(rows) - len(refused)]]
        print_table(short, title=f"{outcome['task']}: methods")
        for name, reason in refused.items():
            print(f"{name} is not possible: {reason}")
        plot_methods(outcome, root / "comparison.png")
    return outcome


def chosen_methods(methods: Mapping[str, Method], args: Any, with_kd: bool) -> dict[str, Method]:
    """The methods by their names in the comparison, with the soft targets of the config where these were asked for.

    Raises:
        ValueError: for a method with the name of the config's row.
    """
    extra = soft_targets_of(args) if with_kd else []
    chosen = [method.with_terms(extra) if extra else method for method in methods.values()]
    if CONFIG in {method.name for method in chosen}:
        raise ValueError(f"A method is called {CONFIG!r}: that is the config as it stands, which always runs. Choose another name.")
    return {method.name: method for method in chosen}


def trains_its_teacher(recipe: Any) -> bool:
    """Whether a run trains a teacher, which the others then take; else all have the same checkpoint."""
    return getattr(recipe, "teacher_model_name_or_path", None) is None or bool(getattr(recipe, "teacher_training", None))


def refusals(plans: Mapping[str, tuple[Any, Any]], *parts) -> dict[str, str]:
    """Method -> why these two models cannot do it, for those of `plans` whose trainer refuses them. Nothing is trained.

    Args:
        plans: method -> arguments of the recipe; those in stages are not looked at.
        parts: what a recipe hands to `instead`.
    """
    found = {}
    for name, (own, _) in plans.items():
        if not own.stages:
            try:
                cost_trainer(name, plans, *parts)
            except ValueError as error:
                found[name] = _first_sentence(error)
                parts[0].say(f"{name} is not possible: {found[name]}")
    return found


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0].rstrip(".") + "."


def cost_trainers(plans: Mapping[str, tuple[Any, Any]], *parts) -> dict[str, DistillationTrainer]:
    """Fresh trainers of the student alone (the first), of the config, and of each method that is not in stages, see [`cost_trainer`]."""
    names = [ALONE, CONFIG, *(name for name, (own, _) in plans.items() if not own.stages)]
    return {name: cost_trainer(name, plans, *parts) for name in names}


def cost_trainer(
    name: str, plans: Mapping[str, tuple[Any, Any]], run, recipe, build, trainer_for, datasets, teachers, metric
) -> DistillationTrainer:
    """A fresh trainer of the first seed; all have the same images.

    Args:
        name: of a method, or `student alone`, or `config`.
        plans: method -> arguments of the recipe.
        run, recipe, build, trainer_for, datasets, teachers, metric: what a recipe hands to `instead`.
    """
    training, teacher = run.args, teachers["teacher"]
    if name == ALONE:
        training, teacher = replace(training, **WITHOUT_TEACHER), None
    elif name != CONFIG:
        training = plans[name][1]
    seed = recipe.seeds[0]
    return trainer_for(build(seed), replace(training, output_dir=run.folder("costs"), seed=seed), datasets["train"], teacher)


def memory_of(main: Callable[..., Any], recipe: Any, args: Any, methods: Mapping[str, Method], name: str, with_kd: bool = False) -> float:
    """Megabytes that three optimizer steps of one method take beside the two models, after [`compare_methods`] has trained the teacher.

    For a process of its own, see [`memory_in_a_process`].

    Args:
        main, recipe, args, methods, with_kd: as there.
        name: of the method, as it is called in the comparison, or `student alone`.
    """
    root, args = Path(args.output_dir), replace(args, push_to_hub=False)
    own = chosen_methods(methods, args, with_kd)
    plans = {name: changed_settings(recipe, args, own[name].changes())} if name in own else {}
    base = replace(recipe, overwrite_output_dir=False), replace(args, output_dir=str(root / CONFIG))
    return main(*base, instead=lambda *parts: peak_memory(cost_trainer(name, plans, *parts)))


def _memory(path: Path, settings: Mapping[str, str], measure: Callable[[str], float | None], anew: bool) -> dict[str, float | None]:
    """Memory of each; figures in the file of a former command are kept where the settings of the method are the same."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not anew else {}
    for name, own in settings.items():
        entry = known.get(name)
        if not isinstance(entry, dict) or entry["memory_mb"] is None or entry["settings"] != own:
            known[name] = {"memory_mb": measure(name), "settings": own}
            path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return {name: known[name]["memory_mb"] for name in settings}


def memory_in_a_process(command: Sequence[str]) -> float | None:
    """What [`memory_of`] printed as the last word of its last line in a process of its own; `None`, with a line of why, where it failed.

    Memory that is freed goes back to the system there at once (settings of glibc), so that what was freed before is not used unseen.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # it finds the same modules
    done = subprocess.run(list(command), capture_output=True, text=True, env=environment)
    with suppress(ValueError, IndexError):
        if done.returncode == 0:
            return float(done.stdout.split()[-1])
    print(f"No figure for the memory: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", flush=True)
    return None


def _outcome(first: Mapping, measured: Mapping[str, Mapping], methods: Mapping[str, Method], refused: Mapping[str, str], command: str):
    metric, reference = first["metric"], KD if KD in measured else CONFIG
    values = {name: results["student_distilled"][metric] for name, results in measured.items()}
    alone = first["student_alone"] and first["student_alone"][metric]
    control = first["baselines"].get("control")
    entries = {}
    for name, results in measured.items():
        entries[name] = {
            "title": "the config as it stands" if name == CONFIG else methods[name].title,
            "terms": _terms(results["objective"]),
            "value": values[name],
            "to_alone": alone and paired_difference(values[name], alone),
            "to_reference": None if name == reference else paired_difference(values[name], values[reference]),
            "agreement": results["agreement"],
            "steps": results["student_distilled"]["steps"],
            "seconds": results["seconds"]["distilled"],
            "step_time": None,
            "step_seconds": None,
            "memory_mb": None,
        }
    agreements = first.get("agreements", {})
    return {
        "task": first["task"],
        "metric": metric,
        "seeds": first["seeds"],
        "teacher": first["teacher"][metric],
        "alone": alone
        and {"value": alone, "agreement": agreements.get("alone"), "step_time": None, "step_seconds": None, "memory_mb": None},
        "control": control and {"value": control[metric], "agreement": agreements.get("control")},
        "reference": reference,
        "methods": entries,
        "not_possible": dict(refused),
        "objectives": {name: results["objective"] for name, results in measured.items()},
        "versions": first["versions"],
        "num_processes": first["num_processes"],
        "command": command,
    }


def _terms(objective: Sequence[Mapping[str, Any]]) -> str:
    """`0.1 task + 0.9 soft_targets`, from the record of a run; one stage after the other."""
    stages: dict[str, list[str]] = {}
    for term in objective:
        weight = term["weight"]
        weight = f"({weight['start']:g} to {weight['end']:g})" if isinstance(weight, Mapping) else f"{weight:g}"
        stages.setdefault(term.get("stage", ""), []).append(f"{weight} {term['loss']}")
    return ", then ".join(" + ".join(words) for words in stages.values())


def comparison_rows(outcome: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table, for `results_table`: teacher, student alone, control, then the methods from the best down."""
    metric, reference = outcome["metric"], outcome["reference"]
    entries = sorted(outcome["methods"].items(), key=lambda item: -item[1]["value"]["mean"])
    uneven = len({entry["steps"] for _, entry in entries}) > 1
    rows = [{"method": "teacher", metric: outcome["teacher"]}]
    for name, entry in (("student alone", outcome["alone"]), ("control", outcome["control"]), *entries):
        if entry is not None:
            row = {
                "method": name,
                metric: entry["value"],
                "more than alone": entry.get("to_alone"),
                f"more than {reference}": entry.get("to_reference"),
                "agreement with teacher": entry["agreement"],
                "step (s)": entry.get("step_seconds"),
                "step time (alone = 1)": entry.get("step_time"),
                "memory (MB)": entry.get("memory_mb"),
                "steps": entry.get("steps") if uneven else None,
                "terms": entry.get("terms", ""),
            }
            rows.append(row)
    return rows + [{"method": name, "terms": f"not possible: {reason}"} for name, reason in outcome["not_possible"].items()]
