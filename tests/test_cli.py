from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hfdistill.arguments import DistillationTrainingArguments
from hfdistill.cli import check_launch, config_sha256, parse
from hfdistill.usage import Option, options_of


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Recipe:
    name: str = field(default="plain", metadata={"help": "A name, 100 % free."})
    temperature: float = 2.0
    layers: int = 3
    shuffle: bool = True
    cased: bool = False
    samples: int | None = None
    method: Literal["kd", "plain"] = "kd"
    colour: Colour = Colour.RED
    seeds: list[int] = field(default_factory=lambda: [0])
    rates: list[float] | None = None
    objective: list[dict] | str | None = None
    schedules: dict[str, Any] | str | None = None
    options: dict[str, Any] | None = None


@dataclass
class Needs:
    data: str = field(metadata={"help": "No default."})


def recipe(tmp_path, text: str, *flags: str, types=Recipe):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    return parse(types, ["--config", str(file), *flags])


def test_defaults_then_yaml_then_flags(tmp_path):
    text = "temperature: 3.0\nlayers: 6\n"
    (plain,) = parse(Recipe, [])
    (from_yaml,) = recipe(tmp_path, text)
    (from_flag,) = recipe(tmp_path, text, "--temperature", "4")
    assert [(r.temperature, r.layers) for r in (plain, from_yaml, from_flag)] == [(2.0, 3), (3.0, 6), (4.0, 6)]
    assert plain.name == from_yaml.name == from_flag.name == "plain"


def test_a_flag_equal_to_the_default_still_wins(tmp_path):
    (settings,) = recipe(tmp_path, "temperature: 3.0\nshuffle: false\nseeds: [4, 5]", "--temperature", "2.0", "--shuffle", "--seeds", "0")
    assert (settings.temperature, settings.shuffle, settings.seeds) == (2.0, True, [0])


def test_yaml_values_have_the_type_of_their_flag(tmp_path):
    text = """
temperature: 5e-5
layers: 1e2
shuffle: "no"
cased: yes
samples: null
method: plain
colour: blue
seeds: [1, 2]
rates: [1e-3, "2e-3", 3]
name: "3"
"""
    (settings,) = recipe(tmp_path, text)
    assert dataclasses.asdict(settings) | {"objective": 0, "schedules": 0, "options": 0} == dict(
        temperature=5e-5, layers=100, shuffle=False, cased=True, samples=None, method="plain", colour="blue", seeds=[1, 2],
        rates=[0.001, 0.002, 3.0], name="3", objective=0, schedules=0, options=0,
    )  # fmt: skip
    assert type(settings.layers) is int and type(settings.temperature) is float and all(type(rate) is float for rate in settings.rates)


@pytest.mark.parametrize("text", ["learning_rate: 1e-3", "learning_rate: '1e-3'", "learning_rate: 0.001", "learning_rate: 1.0E-3"])
def test_learning_rate_of_training_arguments_is_a_float(tmp_path, text):
    (args,) = recipe(tmp_path, f"output_dir: out\nuse_cpu: true\n{text}", types=TrainingArguments)
    assert type(args.learning_rate) is float and args.learning_rate == 0.001


def test_mappings_and_lists_arrive_as_python_objects(tmp_path):
    text = """
objective:
- {loss: soft_targets, weight: 1e-3}
- {loss: hidden_mse, layer_map: "0:1"}
schedules: {temperature: {type: linear, end: 1, over: [0.0, 5e-1]}}
options: {a: 1}
"""
    (settings,) = recipe(tmp_path, text)
    assert settings.objective == [{"loss": "soft_targets", "weight": 0.001}, {"loss": "hidden_mse", "layer_map": "0:1"}]
    assert settings.schedules == {"temperature": {"type": "linear", "end": 1, "over": [0.0, 0.5]}}
    assert settings.options == {"a": 1}
    assert parse(Recipe, ["--options", '{"a": [1]}'])[0].options == {"a": [1]}


def test_the_real_arguments_take_them_too(tmp_path):
    text = """
output_dir: out
use_cpu: true
warmup_steps: 1e-1
lr_scheduler_type: polynomial
lr_scheduler_kwargs: {lr_end: 1e-7}
schedules: {kd_weight: {end: 0.0}}
objective: [{loss: task}]
report_to: [tensorboard]
"""
    needs, args = recipe(tmp_path, "data: docs" + text, types=(Needs, "DistillationTrainingArguments"))
    assert needs == Needs("docs") and type(args) is DistillationTrainingArguments
    assert args.lr_scheduler_kwargs == {"lr_end": 1e-7} and args.warmup_steps == 0.1 and args.report_to == ["tensorboard"]
    assert args.schedules == {"kd_weight": {"end": 0.0}} and args.objective == [{"loss": "task"}]


def test_a_required_flag_may_stand_in_yaml(tmp_path):
    assert recipe(tmp_path, "data: docs", types=Needs)[0].data == "docs"
    with pytest.raises(ValueError, match="the following arguments are required: --data"):
        parse(Needs, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature: 2", r"unknown key 'temprature' in .*x\.yaml\. Did you mean 'temperature'\?"),
        ("config: other.yaml", r"unknown key 'config'"),
        ("temperature: 2\nlayers: 3\ntemperature: 4", r"x\.yaml: key 'temperature' stands twice, the second time in line 3"),
        ("schedules:\n  a: 1\n  a: 2", r"key 'a' stands twice"),
        ("temperature: warm", r"temperature in .* is 'warm', which is no float"),
        ("layers: 2.5", r"layers in .* is 2\.5, which is no int"),
        ("layers: true", r"YAML reads it as True \(bool\)"),
        ("method: no", r"YAML reads it as False \(bool\).* Quote a word"),
        ("name: 3", r"YAML reads it as 3 \(int\).* Quote a word"),
        ("name: 2024-01-01\nlayers: [1]", r"layers in .* is a list, and --layers takes one int"),
        ("temperature: {a: 1}", r"temperature in .* is a dict, and --temperature takes one float"),
        ("method: pkd", r"method in .* is 'pkd'\. Did you mean 'kd'\? --method takes one of kd, plain"),
        ("colour: green", r"--colour takes one of red, blue"),
        ("seeds: [1, x]", r"seeds in .* is 'x', which is no int"),
        ("cased: perhaps", r"cased in .* is 'perhaps'"),
        ("temperature:", r"temperature in .* has no value\. .* the default, 2\.0"),
        ("- 1", r"holds a list, not a mapping"),
        ("a: [", r"is not valid YAML"),
        ("env: [A]", r"env in .* must be a mapping"),
    ],
)
def test_bad_yaml_says_what_to_do(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, text)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temprature", "2"], r"unknown flag '--temprature'\. Did you mean '--temperature'\?"),
        (["--temprature=2"], r"unknown flag '--temprature'\. Did you mean '--temperature'\?"),
        (["--temp", "2"], r"unknown flag '--temp'"),  # no abbreviations: a typo must not be one
        (["docs"], r"'docs' belongs to no flag"),
        (["--temperature", "warm"], r"invalid float value: 'warm'"),
        (["--config", "missing.yaml"], r"--config missing\.yaml is not a file"),
        (["--config"], r"--config has no value"),
        (["--config", "a.yaml", "--config=b.yaml"], r"--config is given twice, a\.yaml and b\.yaml"),
    ],
)
def test_bad_flags_say_what_to_do(args, message):
    with pytest.raises(ValueError, match=message):
        parse(Recipe, args)


def test_config_and_env_are_reserved():
    clash = dataclasses.make_dataclass("Clash", [("config", str, "x")])
    with pytest.raises(ValueError, match="has a field 'config'"):
        parse(clash, [])


def test_env_sets_what_the_user_has_not_exported(tmp_path, monkeypatch):
    monkeypatch.setenv("HFDISTILL_TEST_EXPORTED", "mine")
    monkeypatch.setenv("HFDISTILL_TEST_NEW", "")
    monkeypatch.delenv("HFDISTILL_TEST_NEW")
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what parse sets goes with the test
    recipe(tmp_path, "env: {HFDISTILL_TEST_EXPORTED: theirs, HFDISTILL_TEST_NEW: false}")
    assert os.environ["HFDISTILL_TEST_EXPORTED"] == "mine" and os.environ["HFDISTILL_TEST_NEW"] == "false"


def test_yaml_runs_no_code(tmp_path):
    with pytest.raises(ValueError, match="is not valid YAML"):
        recipe(tmp_path, "name: !!python/object/apply:os.getcwd []")


def test_help_imports_neither_torch_nor_transformers(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from hfdistill.cli import parse\n"
        "try:\n    parse('DistillationTrainingArguments', description='Train a student.')\n"
        "finally:\n    print('IMPORTED', sorted({'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, str(program), "--help"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "Train a student." in run.stdout and "--kd_weight" in run.stdout and "--learning_rate" in run.stdout
    assert run.stdout.splitlines()[-1] == "IMPORTED []"


@pytest.mark.parametrize("entry", ["DistillationTrainingArguments", DistillationTrainingArguments], ids=["by name", "imported"])
def test_help_shows_exactly_the_flags_of_the_real_parser(entry):
    shown: dict[str, Option] = {}
    for options in options_of(entry).values():
        assert not shown.keys() & options.keys()
        shown |= options
    assert shown.keys() == {action.dest for action in HfArgumentParser(DistillationTrainingArguments, add_help=False)._actions}
    for knob in dataclasses.fields(DistillationTrainingArguments):
        if knob.init:
            assert shown[knob.name].help == knob.metadata["help"]
            assert shown[knob.name].default in (None, knob.default), knob.name
    unknown = {k.name for k in dataclasses.fields(DistillationTrainingArguments) if k.default and k.init and shown[k.name].default is None}
    assert unknown - {"optim"} <= {k.name for k in dataclasses.fields(DistillationTrainingArguments) if k.default is dataclasses.MISSING}
    own = next(iter(options_of(entry).values()))
    assert own["temperature"].default == 2.0 and own["logging_nan_inf_filter"].default is False and own["layer_map"].type == "str"


def test_help_of_a_plain_dataclass(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Recipe, ["--temperature", "2", "-h"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--name str A name, 100 % free. (default: plain)" in text and "--seeds list[int]" in text


def test_hash_of_the_settings(tmp_path):
    def sha(*flags):
        return config_sha256(parse((Recipe, TrainingArguments), ["--use_cpu", "true", *flags]))

    base = sha("--output_dir", "a")
    assert len(base) == 64 and base == sha("--output_dir", "b", "--run_name", "other", "--dataloader_num_workers", "2")
    assert base != sha("--temperature", "3") and base != sha("--seed", "7") and base != sha("--learning_rate", "1e-3")


def test_hash_is_the_same_in_another_process():
    code = (
        "from dataclasses import dataclass; from enum import Enum; from pathlib import Path; from hfdistill.cli import config_sha256\n"
        "Colour = Enum('Colour', {'RED': 'red'})\n"
        "@dataclass\nclass Settings:\n    words: object; colour: object; file: object\n"
        "sha = config_sha256((Settings(frozenset('abcdefgh'), Colour.RED, Path('a/b')),))\n"
    )
    here: dict[str, Any] = {}
    exec(code, here)
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", code + "print(sha)"], capture_output=True, text=True, env=environment)
        assert run.stdout.strip() == here["sha"], run.stderr


def test_what_cannot_be_hashed_is_refused():
    @dataclass
    class Odd:
        value: Any = None

    with pytest.raises(ValueError, match="a setting is a object, which has no stable text"):
        config_sha256((Odd(object()),))


def test_launch_guard(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_launch(SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match=r"started 2 processes \(WORLD_SIZE\), but Accelerate sees 1.*--use_cpu true"):
        check_launch(SimpleNamespace(num_processes=1))
