"""A temperature and weights chosen by measurement: many trainings of one student, compared on data that nothing is reported on."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .arguments import WEIGHTS
from .method_plots import plot_sweep
from .redaction import shareable
from .report import print_table, results_table, summarise, versions
from .suggest import did_you_mean, nearest_or_all
from .terms import Term


DEFAULT_SWEEP = {"temperature": [1.0, 2.0, 4.0, 8.0], "kd_weight": [0.3, 0.7, 0.9]}
"""What is swept where nothing is named."""
VALIDATION_SHARE = 0.25
"""Share of the training images on which settings are compared, where the config says none. Half of the digits without a label are that."""
LOWER_IS_BETTER = ("loss", "perplexity", "pseudo_perplexity", "mse", "rmse", "mae")
"""Metrics of which the smallest value is the best."""


def run_sweep(
    main: Callable[..., Any],
    recipe: Any,
    args: Any,
    space: Mapping[str, Any],
    command: str,
    trials: int | None = None,
) -> dict[str, Any]:
    """Trains the student of a recipe with many settings, and writes `sweep.json`, a table and a picture.

    Every training is a trial of `Trainer.hyperparameter_search` (optuna), kept in `study.db` below `args.output_dir`: what has finished is
    not run again when the same command, or one with more values, seeds or trials, is given again. The teacher is trained once.

    Lists of values make a grid, of which every point is trained with every seed. With a range in it, optuna's TPE sampler proposes
    `trials` settings, each trained with one of the seeds in turn: that finds the region, and says little about neighbours in it.

    The data that settings are compared on are never those that are reported: `validation_share` of the training images is held out
    from teacher and students. The best of many is good by luck too; train it anew, and report that on the test data.

    Args:
        main: of a recipe, which takes `instead` and has `validation_share`, such as `image_classification`.
        recipe, args: its arguments, as `parse` gives them; `recipe.seeds` are the seeds.
        space: name -> list of values, or `{"low": 1, "high": 16, "log": true}` (`"step"` for steps). Names are training arguments, such as
            `temperature` and `kd_weight`, or `term.setting` where the config has an objective: `crd.weight`, `kd.temperature`.
        command: that repeats it, for the record.
        trials: number of settings in all, where there is a range.

    Returns:
        The contents of `sweep.json`: `metric`, `points` (settings, mean, std and values over seeds), `best`.

    Raises:
        ImportError: without optuna.
        ValueError: for names and values that would have no effect or cannot be had, recipes and settings with which the comparison would
            be on test data, and several processes.
    """
    try:
        import optuna
    except ImportError:
        raise ImportError("A sweep needs optuna, which is not installed. Get it with: pip install 'hfdistill[sweep]'") from None
    space = check_space(space, args, trials)
    seeds, kind = list(recipe.seeds), "grid" if is_grid(space) else "tpe"
    recipe = on_validation_data(main, recipe)
    if args.world_size > 1:
        raise ValueError(f"A sweep trains on one process, and {args.world_size} were started. Launch it with --num_processes 1.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    args = replace(args, push_to_hub=False, eval_strategy="no", load_best_model_at_end=False)

    def search(run, _, build, trainer_for, datasets, teachers, metric):
        def trainer_of(seed: int):
            trainer = trainer_for(build(seed), run.settings("sweep", seed=seed), datasets["train"], teachers["teacher"])
            trainer.model_init = lambda: build(seed)
            return trainer

        trials_of = _Trials(trainer_of, run, space, args, metric, anew=recipe.overwrite_output_dir)
        record = Path(run.folder("teacher"), "arm.json")  # not there for a teacher that is not trained
        teacher = json.loads(record.read_text())["metrics"][f"eval_{metric}"] if record.is_file() else None
        return metric, teacher, trials_of.grid(seeds) if kind == "grid" else trials_of.sampled(trials, seeds)

    # The seeds are the sweep's: another number of them is no other run.
    metric, teacher, points = main(replace(recipe, seeds=[0], baselines=False), args, instead=search)
    best = (min if metric in LOWER_IS_BETTER else max)(points, key=lambda point: point["value"]["mean"])
    outcome = shareable(
        {
            "metric": metric,
            "kind": kind,
            "space": space,
            "seeds": seeds,
            "validation_share": recipe.validation_share,
            "teacher": teacher,
            "best": best,
            "points": points,
            "versions": {**versions(), "optuna": optuna.__version__},
            "command": command,
        }
    )
    root = Path(args.output_dir)
    (root / "sweep.json").write_text(json.dumps(outcome, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [{**point["settings"], metric: point["value"], "seed": point.get("seed")} for point in points]
    (root / "sweep.md").write_text(results_table(rows) + "\n", encoding="utf-8")
    print_table(rows, title=f"{metric} on validation data")
    plot_sweep(outcome, root / f"{metric}-against-{first_setting(space).replace('.', '-')}.png")
    print(f"\n# {metric} {best['value']['mean']:.4f} on validation data, the best of {len(points)} settings; test data were not looked at")
    print(best_as_yaml(best["settings"], args), end="")
    return outcome


def read_space(text: str) -> dict[str, Any]:
    """A space for [`run_sweep`] from JSON, or from a YAML file.

    Raises:
        ValueError: where `text` is neither.

    Example:
        >>> read_space('{"temperature": [1, 2, 4]}')
        {'temperature': [1, 2, 4]}
    """
    try:
        space = yaml.safe_load(Path(text).read_text(encoding="utf-8")) if Path(text).suffix in (".yaml", ".yml") else json.loads(text)
    except (json.JSONDecodeError, OSError, yaml.YAMLError) as error:
        raise ValueError(f"--space {text!r} is neither JSON nor a YAML file: {error}. Example: '{{\"temperature\": [1, 2, 4]}}'.") from None
    if not isinstance(space, dict):
        raise ValueError(f"--space is a {type(space).__name__}, not a mapping. Example: '{{\"temperature\": [1, 2, 4]}}'.")
    return space


def is_grid(space: Mapping[str, Any]) -> bool:
    """Whether all of a space is lists of values."""
    return all(isinstance(values, list) for values in space.values())


def first_setting(space: Mapping[str, Any]) -> str:
    """The setting that a sweep is about: a temperature where there is one, else the first."""
    return min(space, key=lambda name: name.split(".")[-1] != "temperature")


def check_space(space: Mapping[str, Any], args: Any, trials: int | None = None) -> dict[str, Any]:
    """The space as it was given.

    Raises:
        ValueError: for names that do not exist or would have no effect, values that are missing, twice or in no order, and for `trials`
            with a grid, or a range without it.
    """
    if not space:
        raise ValueError('The space is empty, so there is nothing to sweep. Example: {"temperature": [1, 2, 4]}.')
    for name, values in space.items():
        if isinstance(values, list):
            if not values or any(value in values[:k] for k, value in enumerate(values)) or any(isinstance(v, (list, dict)) for v in values):
                raise ValueError(f"The values of {name} are {values!r}. Give at least one, each once, and no lists.")
        else:
            _check_range(name, values)
        _check_name(name, values[0] if isinstance(values, list) else values["low"], space, args)
    if is_grid(space) and trials is not None:
        raise ValueError(f"trials={trials} has no effect: every point of a grid is trained, with every seed. Remove it, or give a range.")
    if not is_grid(space) and (trials is None or trials < 1):
        raise ValueError(f"A range needs the number of settings to try, got trials={trials}. Pass --trials 20, or lists of values.")
    return dict(space)


def _check_range(name: str, values: Any) -> None:
    if not isinstance(values, Mapping) or not {"low", "high"} <= values.keys() <= {"low", "high", "log", "step"}:
        raise ValueError(
            f'{name} is {values!r}, neither a list of values nor a range. Write [1, 2, 4] or {{"low": 1, "high": 16, "log": true}}; '
            "a range may have a step instead of log."
        )
    low, high = values["low"], values["high"]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in (low, high))
    if not numbers or not low < high or (values.get("log") and (low <= 0 or "step" in values)):
        raise ValueError(f"The range of {name} is {dict(values)!r}. low must be below high, and above 0 with log, which takes no step.")


def _check_name(name: str, value: Any, space: Mapping[str, Any], args: Any) -> None:
    term_name, dot, setting = name.partition(".")
    if dot:
        entry = next((entry for entry in args.objective or [] if _name_of(entry) == term_name), None)
        if entry is None:
            known = [_name_of(entry) for entry in args.objective or []]
            cure = nearest_or_all(term_name, known) if known else " It has plain weights: sweep kd_weight, temperature and so on."
            raise ValueError(f"The config's objective has no term {term_name!r} to set {setting!r} of.{cure}")
        Term.from_dict({**entry, setting: value})
        return
    known = [field.name for field in fields(args) if field.init]
    if name == "seed":
        raise ValueError("Seeds are no part of the space: the settings are compared over them. Pass --seeds 0 1 2.")
    if name not in known or name in ("output_dir", "objective", "schedules", "push_to_hub"):
        raise ValueError(f"{name!r} is no training argument that can be swept.{did_you_mean(name, known)}")
    if name in (*WEIGHTS, "temperature") and args.objective is not None:
        terms = ", ".join(f"{_name_of(entry)}.weight" for entry in args.objective)
        raise ValueError(f"{name} has no effect beside an objective. Write term.setting, such as {terms}.")
    if name == "temperature" and not args.kd_weight and "kd_weight" not in space and "kd_weight" not in (args.schedules or {}):
        raise ValueError("The temperature has no effect at kd_weight=0. Set kd_weight, or sweep it too.")
    if name in (args.schedules or {}):
        raise ValueError(f"{name} has a schedule in this config, which would not be swept. Remove it from schedules.")


def _name_of(entry: Mapping[str, Any]) -> str:
    return entry.get("name") or entry["loss"]


def on_validation_data(main: Callable[..., Any], recipe: Any) -> Any:
    """The recipe, told to measure on images that are held out of the training data.

    Raises:
        ValueError: for a recipe that cannot, and a share that would leave none.
    """
    if not hasattr(recipe, "validation_share") or "instead" not in inspect.signature(main).parameters:
        raise ValueError(
            "This recipe measures on the data that it reports, and settings chosen there would report their luck. Sweep a recipe with "
            "validation_share, such as image_classification."
        )
    if getattr(recipe, "stages", None):
        raise ValueError("This config is in stages, each with settings of its own. A sweep needs a config with one objective.")
    share = VALIDATION_SHARE if recipe.validation_share is None else recipe.validation_share
    if not 0 < share < 1:
        raise ValueError(f"validation_share={share} would compare settings on the test data. Hold out a share such as {VALIDATION_SHARE}.")
    return replace(recipe, validation_share=share)


def arguments_of(args: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments of one point: plain ones as they are, and the config's objective with what `term.setting` names changed."""
    plain = {name: value for name, value in settings.items() if "." not in name}
    inside = {name: value for name, value in settings.items() if "." in name}
    if not inside:
        return plain
    terms = [dict(entry) for entry in args.objective]
    for name, value in inside.items():
        term, _, setting = name.partition(".")
        next(entry for entry in terms if _name_of(entry) == term)[setting] = value
    return {**plain, "objective": terms}


def best_as_yaml(settings: Mapping[str, Any], args: Any) -> str:
    """Lines for a config.

    Example:
        >>> print(best_as_yaml({"temperature": 4.0, "kd_weight": 0.7}, None), end="")
        temperature: 4.0
        kd_weight: 0.7
    """
    lines = []
    for name, value in arguments_of(args, settings).items():
        if name == "objective":
            terms = (yaml.safe_dump(term, sort_keys=False, default_flow_style=True, width=10**6).strip() for term in value)
            lines += ["objective:", *(f"  - {term}" for term in terms)]
        else:
            lines.append(yaml.safe_dump({name: value}, default_flow_style=False).strip())
    return "\n".join(lines) + "\n"


class _Trials:
    """The trials of one run in its database, and what is missing there."""

    def __init__(self, trainer_of: Callable[[int], Any], run, space: Mapping[str, Any], args: Any, metric: str, anew: bool):
        import optuna

        self.trainer_of = cache(trainer_of)  # one for each seed: its images are changed by the seed, too
        self.run, self.space, self.args, self.metric = run, space, args, metric
        root = run.root.resolve()
        root.mkdir(parents=True, exist_ok=True)
        if anew:
            (root / "study.db").unlink(missing_ok=True)
        # Optuna refuses other choices under the name of a study; the numbers of a grid may become more.
        kinds = {name: "numbers" if _are_numbers(values) and is_grid(space) else values for name, values in space.items()}
        digest = hashlib.sha256(json.dumps([run.fingerprint, is_grid(space), kinds], sort_keys=True).encode()).hexdigest()
        self.study = {
            "storage": optuna.storages.RDBStorage(f"sqlite:///{root / 'study.db'}"),
            "study_name": digest[:16],
            "load_if_exists": True,
            "direction": "minimize" if metric in LOWER_IS_BETTER else "maximize",
            "pruner": optuna.pruners.NopPruner(),
        }
        self.seeds: Sequence[int] = ()
        self.seed: int | None = None  # of the trial that runs, where a sampler proposes settings

    def grid(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Trains what is missing of all points and seeds; all points with their values over seeds.

        Not optuna's GridSampler: for it a point that failed is done, and a larger space another grid.
        """
        points = [dict(zip(self.space, values)) for values in itertools.product(*self.space.values())]
        wanted = [{**point, "seed": seed} for seed in seeds for point in points]
        study = self._open()
        while True:
            trials = study.trials
            values = {_key(trial.params): trial.value for trial in trials if trial.state.name == "COMPLETE"}
            missing = [point for point in wanted if _key(point) not in values]
            if not missing:
                break
            self.run.say(f"Trial {len(wanted) - len(missing) + 1} of {len(wanted)}: {_words(missing[0])}")
            # One may be waiting, of a command that was killed before it began; it comes first.
            waiting = [trial.system_attrs["fixed_params"] for trial in trials if trial.state.name == "WAITING"]
            if not waiting:
                study.enqueue_trial(missing[0])
            self._search([*waiting, missing[0]][0]["seed"])
        return [{"settings": point, "value": summarise([values[_key({**point, "seed": seed})] for seed in seeds])} for point in points]

    def sampled(self, trials: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Trains settings that TPE proposes until there are so many; all of them."""
        import optuna

        self.seeds = seeds
        study = self._open()
        while (done := sum(trial.state.name == "COMPLETE" for trial in study.trials)) < trials:
            self.run.say(f"Trial {done + 1} of {trials}")
            number = len(study.trials)
            # A sampler begins with random settings: with one seed for all they would be the same ones again.
            self.seed = self.seeds[number % len(self.seeds)]
            self._search(self.seed, optuna.samplers.TPESampler(seed=self.args.seed + number))
        complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
        return [{"settings": dict(t.params), "value": summarise([t.value]), "seed": t.user_attrs["seed"]} for t in complete]

    def _open(self):
        import optuna

        return optuna.create_study(**self.study)

    def _search(self, seed: int, sampler=None) -> None:
        self.trainer_of(seed).hyperparameter_search(
            hp_space=self._arguments,
            compute_objective=lambda metrics: metrics[f"eval_{self.metric}"],
            n_trials=1,
            backend="optuna",
            sampler=sampler,
            **self.study,
        )

    def _arguments(self, trial) -> dict[str, Any]:
        """Training arguments of a trial."""
        settings = {name: self._suggest(trial, name, values) for name, values in self.space.items()}
        if not self.seeds:
            trial.suggest_int("seed", 0, 2**32 - 1)  # the trainer has it already
        else:
            trial.set_user_attr("seed", self.seed)  # another command may give other seeds
        return arguments_of(self.args, settings)

    def _suggest(self, trial, name: str, values: Any) -> Any:
        if not isinstance(values, list):
            whole = isinstance(getattr(self.args, name, None), int)
            suggest = trial.suggest_int if whole else trial.suggest_float
            return suggest(name, **values)
        if self.seeds or not _are_numbers(values):
            return trial.suggest_categorical(name, values)
        chosen = trial.suggest_float(name, min(values), max(values))
        return next((value for value in values if value == chosen), chosen)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _key(point: Mapping[str, Any]) -> tuple:
    return tuple(sorted((name, float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v) for name, v in point.items()))


def _words(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in point.items())
