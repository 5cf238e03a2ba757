"""The rules of the house: which module may import which, what is public, what must not be in the repository."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hfdistill


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hfdistill"

# A module imports its own floor and lower ones. A folder stands for all its modules, unless a module has its own line.
FLOORS = {
    "signals": 0, "pooling": 0, "schedules": 0, "suggest": 0, "redaction": 0, "memory_pages": 0, "process_memory": 0, "step_clock": 0,
    "arguments": 1, "recipe_arguments": 1, "peft_arguments": 1,
    "models": 2,
    "attention_taps": 3, "stage_taps": 3, "vocabulary_head": 3, "early_stop": 3, "capture_plan": 3, "capture": 3,
    "model_outputs": 3, "counting": 3, "packed": 3,
    "losses": 4,
    "terms": 5, "bound_term": 5, "vocabulary_terms": 5, "objective": 5, "binding": 5,
    "teachers": 6, "data": 6, "metrics": 6, "alignment": 6, "sentence_encoder": 6,
    "export": 7, "benchmark": 7, "plots": 7, "report": 7, "baselines": 7, "hub": 7, "side_file": 7, "citations": 7,
    "part_log": 7, "checkpoints": 7, "run_card": 7, "preparation": 7, "teacher_setup": 7,
    "trainer": 8, "trainer_files": 8, "trainer_optimization": 8, "trainer_store": 8, "trainer_search": 8,
    "trainer_profile": 8, "trainer_hardware": 8, "trainer_sampling": 8, "packing_check": 7, "trainer_shortcuts": 8,
    "runs": 9, "comparison": 9, "callbacks": 9, "stages": 9, "stage_training": 9, "model_pair": 9, "image_pair": 9,
    "ablation": 9,
    "mutual": 9,
    "costs": 9, "method_plots": 7, "method_comparison": 9, "sweep": 9, "benchmarking": 9,
    "usage": 10, "cli": 10,
}  # fmt: skip

# Needed although no line imports them.
INDIRECT = {"jinja2": "huggingface_hub renders model cards with it", "accelerate": "the README's commands are `accelerate launch`"}
IMPORT_NAMES = {"pyyaml": "yaml", "scikit-learn": "sklearn", "pillow": "PIL", "liger-kernel": "liger_kernel"}


def tracked(*suffixes: str) -> list[Path]:
    """Files of the repository, those not yet added included and ignored ones left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = sorted({ROOT / name for name in names if name and name.endswith(suffixes)})
    return [path for path in paths if path.is_file()]


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> list[str]:
    """Dotted names of everything a file imports, anywhere in it; `from a import b` gives `a.b`, relative ones are resolved."""
    found = []
    here = dotted(path).split(".")
    package = here if path.stem == "__init__" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found += [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
    return found


def module_in(name: str) -> str | None:
    """The module of hfdistill that a dotted import name reaches, or None for names from outside."""
    parts = name.split(".")
    return next((found for n in range(len(parts), 0, -1) if (found := ".".join(parts[:n])) in MODULES), None)


def floor_of(module: str) -> int | None:
    parts = module.split(".")[1:]
    return next((FLOORS[key] for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in FLOORS), None)


def test_imports_are_understood():
    """The guards below are worth nothing if this reads imports wrongly."""
    assert "hfdistill.losses.base.DistillationLoss" in imports(PACKAGE / "losses" / "__init__.py")
    assert "hfdistill.suggest.did_you_mean" in imports(PACKAGE / "schedules.py")
    assert "transformers.HfArgumentParser" in imports(PACKAGE / "cli.py")  # inside a function
    assert module_in("hfdistill.losses.base.DistillationLoss") == "hfdistill.losses.base"
    assert module_in("hfdistill.losses.LOSSES") == "hfdistill.losses"
    assert module_in("torch.nn") is None
    assert floor_of("hfdistill.losses.base") == 4 and floor_of("hfdistill.nowhere") is None


def test_all_modules_are_looked_at():
    assert {"hfdistill.signals", "hfdistill.losses.base", "hfdistill.trainer", "hfdistill.cli"} <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"hfdistill"}))
def test_imports_go_down(module):
    floor = floor_of(module)
    assert floor is not None, f"give {module} a floor in FLOORS"
    for name in imports(MODULES[module]):
        target = module_in(name)
        if target == "hfdistill":
            # The root holds no code; the names it hands out belong to modules with floors.
            public = name.removeprefix("hfdistill").lstrip(".")
            target = hfdistill.module_of(public) if public in hfdistill.__all__ else None
        if target is not None:
            assert floor_of(target) <= floor, f"{module} (floor {floor}) imports {name} (floor {floor_of(target)})"


def test_losses_import_torch_signals_and_their_own_helpers_only():
    files = [path for module, path in MODULES.items() if module.startswith("hfdistill.losses")]
    assert len(files) >= 5
    for path in files:
        for name in imports(path):
            top = name.split(".")[0]
            allowed = top in sys.stdlib_module_names or top == "torch" or name.startswith(("hfdistill.losses", "hfdistill.signals"))
            assert allowed, f"{dotted(path)} imports {name}"


def test_nothing_imports_recipes_or_tests():
    for module, path in MODULES.items():
        assert not {name.split(".")[0] for name in imports(path)} & {"recipes", "scripts", "tests", "conftest"}, module


def programs() -> list[Path]:
    return sorted([*ROOT.glob("recipes/*.py"), *ROOT.glob("scripts/*.py")])


def test_programs_use_public_names_and_cli_only():
    assert ROOT / "recipes" / "text_classification.py" in programs()
    for path in programs():
        used = [name for name in imports(path) if name.startswith("hfdistill.")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hfdistill":
                used.append(f"hfdistill.{node.attr}")
        for name in used:
            public = name.removeprefix("hfdistill.")
            assert public in hfdistill.__all__ or public.startswith("cli."), f"{path.name} uses {name}, which is not public"


def load_program(path: Path):
    spec = importlib.util.spec_from_file_location(f"program_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


RECIPE_CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))


def test_recipe_configs_are_found():
    names = [path.relative_to(ROOT / "recipes" / "configs").as_posix() for path in RECIPE_CONFIGS]
    assert "text_classification/stdlib_bert_kd.yaml" in names
    for name in names:
        assert (ROOT / "recipes" / f"{name.split('/')[0]}.py").is_file(), f"{name} belongs to no recipe"


@pytest.mark.parametrize("config", RECIPE_CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_parses_through_its_own_recipe(config, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    recipe = load_program(ROOT / "recipes" / f"{config.parent.name}.py")
    instances = hfdistill.parse(recipe.ARGUMENTS, ["--config", str(config)])
    assert len(instances) == len(recipe.ARGUMENTS)


@pytest.mark.parametrize("name", hfdistill.__all__)
def test_every_public_name_resolves_and_is_documented(name):
    value = getattr(hfdistill, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        text = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""  # not an inherited one
        assert text and not text.startswith(f"{name}("), f"{name} has no docstring of its own"
    else:
        assert name in documented_constants(), f"put a string under the assignment of {name}"


def documented_constants() -> set[str]:
    found = set()
    for path in MODULES.values():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node, following in zip(body, body[1:]):
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_type_checkers_see_the_same_names():
    block = next(node for node in ast.parse(MODULES["hfdistill"].read_text()).body if isinstance(node, ast.If))
    seen = {alias.asname: f"hfdistill.{node.module}" for node in block.body for alias in node.names}
    assert seen == {name: hfdistill.module_of(name) for name in hfdistill.__all__}


def test_public_names_are_listed_and_unknown_ones_suggested():
    assert set(hfdistill.__all__) <= set(dir(hfdistill))
    with pytest.raises(AttributeError, match="no attribute 'DistilationTrainer'. Did you mean 'DistillationTrainer'?"):
        hfdistill.DistilationTrainer  # noqa: B018


def test_import_is_cheap():
    code = "import sys, hfdistill; print(sorted({'torch', 'transformers', 'numpy', 'datasets', 'yaml'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def declared() -> dict[str, set[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {re.match(r"[\w-]+", line)[0].lower() for line in lines} for extra, lines in names.items()}


def imported_outside() -> set[str]:
    paths = [*MODULES.values(), *programs()]
    return {name.split(".")[0] for path in paths for name in imports(path)} - sys.stdlib_module_names - {"hfdistill"}


def test_what_is_imported_is_declared_and_what_is_declared_is_used():
    dependencies = {IMPORT_NAMES.get(name, name) for name in declared()[""]}
    extras = [names for extra, names in declared().items() if extra not in ("", "dev")]
    optional = {IMPORT_NAMES.get(name, name) for names in extras for name in names}
    assert imported_outside() <= dependencies | optional, imported_outside() - dependencies - optional
    assert dependencies <= imported_outside() | INDIRECT.keys(), dependencies - imported_outside() - INDIRECT.keys()


def test_constraints_pin_every_dependency_to_what_is_open_in_pyproject():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower() for line in lines if line and not line.startswith("#")}
    needed = (declared()[""] | declared()["dev"] | declared()["peft"] | declared()["plots"]) - {"hfdistill"}
    assert needed <= pins, needed - pins


TEXT = (".py", ".md", ".yaml", ".toml", ".txt", ".sh", "run", ".ipynb", ".json")
FORBIDDEN = {
    "a path of one machine": (r"(?<![\w.:/])/(root|work|mnt|(home|Users)/(?!ana/)\w+)/\w", TEXT),
    "a package index": (r"https?://[^\s\"')]*/simple\b", TEXT),
    "code from a checkpoint": (r"trust_remote_code\s*=\s*True", (".py", ".sh", "run")),
    "pickles": (r"\btorch\.load\((?!.*weights_only=True)|\bpickle\.loads?\(", (".py",)),
    "YAML that runs code": (r"\byaml\.(unsafe_|full_)?load\(", (".py",)),
    "unfinished work": (r"\b(TODO|FIXME|XXX)\b", (".py", ".md", ".yaml", ".toml")),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_repository_holds_no(what):
    pattern, suffixes = FORBIDDEN[what]
    paths = [path for path in tracked(*suffixes) if path != Path(__file__)]
    names = {path.relative_to(ROOT).as_posix() for path in paths}
    assert {"hfdistill/cli.py", "tests/conftest.py", "recipes/text_classification.py"} <= names
    assert len(paths) >= 40
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a path of one machine", 'open("/home/builder/x")'),
        ("a package index", "--index-url https://mirror.example/simple"),
        ("code from a checkpoint", "trust_remote_code=True"),
        ("pickles", "torch.load(path)"),
        ("pickles", "pickle.load(file)"),
        ("YAML that runs code", "yaml.load(text)"),
        ("unfinished work", "# TODO later"),
    ],
)
def test_the_patterns_find_what_they_are_for(what, line):
    assert re.search(FORBIDDEN[what][0], line)


def test_ci_runs_the_command_of_the_readme():
    command = 'pip install -c constraints.txt -e ".[dev]" && pytest'
    assert command in (ROOT / "README.md").read_text() and command in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_lint():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_deprecated_calls_of_transformers_are_errors(request):
    with pytest.raises(FutureWarning, match="is deprecated"):
        logging.getLogger("transformers.modeling_utils").warning("`old` is deprecated, use `new`")
    filters = request.config.getini("filterwarnings")
    assert {"error::DeprecationWarning:transformers", "error::FutureWarning:transformers"} <= set(filters)


def test_the_table_of_recipes_names_every_config():
    named = set()
    for line in (ROOT / "recipes/README.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\| `(\w+)\.py` \|", line):
            named |= {f"{found[1]}/{name}" for cell in line.split("|")[3:5] for name in re.findall(r"`(\w+)`", cell)}
    assert named == {f"{path.parent.name}/{path.stem}" for path in (ROOT / "recipes/configs").glob("*/*.yaml")}
