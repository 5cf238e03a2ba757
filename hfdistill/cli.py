"""`parse`: the settings of a program from dataclass defaults, a YAML file and flags, in this order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, NoReturn

import yaml

import hfdistill

from .suggest import did_you_mean
from .usage import usage


RESERVED = ("config", "env")
# Where a run writes, reports, is pushed or computes; two runs that differ only here have the same results.
PLACES = frozenset(
    "output_dir run_name project report_to trackio_space_id trackio_bucket_id trackio_static_space_id disable_tqdm log_level "
    "log_level_replica push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision "
    "resume_from_checkpoint overwrite_output_dir allow_weak_teacher use_cpu local_rank ddp_backend ddp_timeout teacher_device cpu_threads "
    "dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor cache_dir augmentation_cache_dir "
    "token overwrite_cache preprocessing_num_workers".split()
)


def parse(dataclasses: tuple[type | str, ...] | type | str, args: list[str] | None = None, description: str | None = None) -> tuple:
    """Fill dataclasses from their defaults, then `--config file.yaml`, then flags; the later wins.

    Keys of the YAML file are flag names, and its values are converted as the flag's would be; mappings and lists
    (`objective`, `schedules`, `lr_scheduler_kwargs`) arrive as they are. An `env:` block sets environment variables
    that are not set yet: what the user has exported stays. `1e-3` is a number, as in YAML 1.2.

    Args:
        dataclasses: the dataclasses to fill. A public class of hfdistill may be given by its name, such as
            `"DistillationTrainingArguments"`; then `--help` answers at once, without importing torch.
        args: the command line; `sys.argv[1:]` if left out.
        description: first lines of the help text.

    Returns:
        One instance of each dataclass, in the given order.

    Raises:
        ValueError: for unknown keys and flags (the nearest known name is suggested), values that do not fit, keys that
            stand twice, required flags that are missing, and a file that is missing or is no YAML mapping.
        SystemExit: after `--help` or `-h`.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> from hfdistill.cli import parse
    >>> @dataclass
    ... class Arguments:
    ...     temperature: float = 2.0
    >>> parse(Arguments, ["--temperature", "4"])[0].temperature
    4.0
    ```
    """
    entries = dataclasses if isinstance(dataclasses, tuple) else (dataclasses,)
    args = list(sys.argv[1:] if args is None else args)
    if "-h" in args or "--help" in args:
        print(usage(entries, description), end="")
        raise SystemExit(0)
    path, args = _take_config(args)
    settings = read_yaml(path) if path else {}
    _set_environment(settings.pop("env", None), path)  # before torch is imported: OMP_NUM_THREADS is read then
    return _fill(tuple(getattr(hfdistill, entry) if isinstance(entry, str) else entry for entry in entries), args, settings, path)


def _fill(classes: tuple[type, ...], args: list[str], settings: dict[str, Any], path: str | None) -> tuple:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(classes, allow_abbrev=False, add_help=False)
    parser.error = _refuse  # argparse would print the usage of 150 flags before its one line
    hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    names = [field.name for cls in classes for field in dataclasses.fields(cls) if field.init]
    for name in RESERVED:
        if name in names:
            raise ValueError(f"a dataclass has a field {name!r}, which `--config` files use themselves. Give it another name")
    for key in settings:
        if key not in names:
            raise ValueError(f"unknown key {key!r} in {path}.{did_you_mean(key, [*names, 'env'])} Keys are flag names; see --help")
    actions: dict[str, Any] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # the first is `--flag`; a second one would be `--no_flag`
        if _holds(action.type, dict):
            action.type = _json_object
        if action.dest in settings:
            action.required = False
    parser.set_defaults(**{key: _convert(value, actions[key], hints[key], f"{key} in {path}") for key, value in settings.items()})
    _, rest = parser.parse_known_args(args)
    for word in rest:
        if word.startswith("--"):
            flag = word.split("=")[0]
            near = did_you_mean("--" + flag[2:].replace("-", "_"), [f"--{name}" for name in names])
            raise ValueError(f"unknown flag {flag!r}.{near} See --help")
    if rest:
        raise ValueError(f"{rest[0]!r} belongs to no flag. Values follow their flag, as in `--temperature 2`")
    return parser.parse_args_into_dataclasses(args, look_for_args_file=False)


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}. See --help")


def _take_config(args: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--config` and the command line without it."""
    path, rest, words = None, [], iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise ValueError("--config has no value. Give a YAML file, as in `--config recipe.yaml`")
        if path is not None:
            raise ValueError(f"--config is given twice, {path} and {value}, and only one file can set the defaults. Merge them into one")
        path = value
    return path, rest


class _Loader(yaml.SafeLoader):
    """`SafeLoader` that refuses a key that stands twice and reads `1e-3` as a number."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen and key is not None:
                line = key_node.start_mark.line + 1
                raise ValueError(f"key {key!r} stands twice, the second time in line {line}, so one value would be lost. Keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file, with plain Python values.

    Raises:
        ValueError: when the file is missing, is no YAML, holds no mapping, or has a key twice.
    """
    if not os.path.isfile(path):
        raise ValueError(f"--config {path} is not a file, seen from {os.getcwd()}. Give the path of a YAML file")
    with open(path, encoding="utf-8") as file:
        loader = _Loader(file.read())
    try:
        settings = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(settings, dict | None):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not a mapping. Write lines such as `temperature: 2.0`")
    return settings or {}


def _set_environment(block: Any, path: str | None) -> None:
    if block is None:
        return
    if not isinstance(block, dict) or any(isinstance(value, dict | list | None) for value in block.values()):
        raise ValueError(f"env in {path} must be a mapping of names to single values, got {block!r}")
    for name, value in block.items():
        os.environ.setdefault(str(name), str(value).lower() if isinstance(value, bool) else str(value))


def _convert(value: Any, action: Any, hint: Any, where: str) -> Any:
    """What the flag would have made of `value`; mappings, lists and null pass where the type hint has a place for them."""
    if value is None:
        if _holds(hint, type(None)):
            return None
        raise ValueError(f"{where} has no value. Give one, or leave the key out for the default, {action.default!r}")
    if action.nargs == "+":
        return [_convert_one(item, action, typing.Any, where) for item in (value if isinstance(value, list) else [value])]
    return _convert_one(value, action, hint, where)


def _convert_one(value: Any, action: Any, hint: Any, where: str) -> Any:
    wanted = getattr(action.type, "__name__", "value")
    if isinstance(value, dict | list):
        if action.type is not _json_object and not _holds(hint, type(value)):
            raise ValueError(f"{where} is a {type(value).__name__}, and --{action.dest} takes one {wanted}")
        return value
    if isinstance(value, bool) and not _holds(hint, bool) or isinstance(value, float | int) and action.type is str:
        raise ValueError(f"{where}: YAML reads it as {value!r} ({type(value).__name__}), and --{action.dest} takes {wanted}. Quote a word")
    if action.type is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # max_steps: 1e5
    try:
        converted = action.type(str(value))
    except Exception as error:  # whatever the flag's own converter raises
        raise ValueError(f"{where} is {value!r}, which is no {wanted} for --{action.dest}: {error}") from None
    if action.choices is not None and converted not in action.choices:
        choices = [str(choice) for choice in action.choices]
        raise ValueError(f"{where} is {value!r}.{did_you_mean(value, choices)} --{action.dest} takes one of {', '.join(choices)}")
    return converted


def _holds(hint: Any, kind: type) -> bool:
    """Whether a type hint has a place for `kind`: `dict[str, Any] | str | None` for dict, str and NoneType."""
    if hint is Any or hint is kind:
        return True
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_holds(member, kind) for member in members)
    if origin is typing.Literal:
        return any(isinstance(member, kind) for member in members)
    return isinstance(origin, type) and issubclass(kind, origin)


def _json_object(text: str) -> dict:
    """The type of a flag that takes a mapping: `--lr_scheduler_kwargs '{"num_cycles": 2}'`."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def config_sha256(instances: tuple) -> str:
    """SHA-256 of the resolved settings, the same for every run that should give the same results.

    Left out is where a run writes, reports, is pushed or computes (`PLACES`), so a rerun elsewhere has the same hash.

    Args:
        instances: what `parse` returned.
    """
    settings = {
        type(instance).__name__: {
            field.name: getattr(instance, field.name) for field in dataclasses.fields(instance) if field.init and field.name not in PLACES
        }
        for instance in instances
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    for method in ("as_dict", "to_dict"):
        if hasattr(value, method):
            return getattr(value, method)()
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"a setting is a {type(value).__name__}, which has no stable text to hash. Use plain values in dataclasses")


def check_keys(block: Mapping[str, Any] | None, known: typing.Iterable[str], where: str) -> None:
    """Refuses keys of a nested block that nobody would read.

    Raises:
        ValueError: naming the key and the nearest known one.
    """
    known = list(known)
    for key in block or {}:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}.{did_you_mean(key, known)} It would have no effect")


def begin(recipe: Any, args: Any) -> None:
    """What every recipe does first: refuses settings that would have no effect, and sets the threads.

    Args:
        recipe: `RecipeArguments`; its blocks of training arguments (`..._training`) are checked.
        args: `DistillationTrainingArguments`.

    Raises:
        ValueError: for `resume_from_checkpoint`, and for unknown keys of the blocks.
    """
    if args.resume_from_checkpoint:
        raise ValueError(
            "resume_from_checkpoint is not needed: start the same command again, and arms that were killed go on where they were"
        )
    known = args.to_dict().keys() - {"output_dir", "push_to_hub"}
    for field in dataclasses.fields(recipe):
        if field.name.endswith("_training"):
            check_keys(getattr(recipe, field.name), known, field.name)
    use_cpu_threads(args, recipe.cpu_threads)


def use_cpu_threads(args: Any, threads: int | None = None) -> None:
    """Gives each process its share of the cores when training on CPU.

    `accelerate launch` without a config file sets `OMP_NUM_THREADS=1`, which leaves all cores but one idle.

    Args:
        args: `TrainingArguments`.
        threads: intra-op threads of PyTorch; default: cores divided by processes.
    """
    import torch

    if args.device.type == "cpu":
        torch.set_num_threads(threads or max(_cores() // args.world_size, 1))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_launch(state: Any) -> None:
    """Refuse a launch in which every process trains alone.

    On a machine without a GPU, `accelerate launch` and `torchrun` start the processes, but Accelerate joins them only
    when it is told to use the CPU; otherwise each one sees itself as the only process and all of them write the same files.

    Args:
        state: an `Accelerator`, a `PartialState`, or anything else with `num_processes`.

    Raises:
        ValueError: when the launcher started another number of processes than `state.num_processes`.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != state.num_processes:
        raise ValueError(
            f"the launcher started {started} processes (WORLD_SIZE), but Accelerate sees {state.num_processes}: each would train "
            "alone and write over the others. On CPU add `--use_cpu true`, or `ACCELERATE_USE_CPU=true` before the command"
        )
