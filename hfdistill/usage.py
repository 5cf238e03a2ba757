"""The text of `--help`, written without importing torch or transformers.

Importing `TrainingArguments` takes seconds, and `--help` needs only names, types, defaults and help texts. For a class
that is given by its public name these are read from its source. A test compares them with the real parser's, flag by flag.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import os
import sys
from importlib.util import find_spec
from typing import Any, NamedTuple

import hfdistill


OUTSIDE_BASES = {"TrainingArguments": "transformers.training_args"}  # base class -> the module whose source holds it


class Option(NamedTuple):
    """One flag as `--help` shows it; `default` is None where there is none or it is not a plain value."""

    type: str
    default: Any
    help: str


def usage(entries: tuple[type | str, ...], description: str | None = None) -> str:
    """The help text of a program whose flags are the fields of `entries`: dataclasses, or names of public ones."""
    program = os.path.basename(sys.argv[0])
    synopsis = f"{program} [--config FILE.yaml] [--FLAG VALUE ...]"
    keep_lines = argparse.RawDescriptionHelpFormatter  # the description is often a module's docstring
    parser = argparse.ArgumentParser(prog=program, usage=synopsis, description=description, add_help=False, formatter_class=keep_lines)
    parser.add_argument("-h", "--help", action="help", help="Show this text and exit.")
    parser.add_argument("--config", metavar="FILE", help="A YAML file with flag names as keys; flags on the command line win over it.")
    for entry in entries:
        for title, options in options_of(entry).items():
            group = parser.add_argument_group(title)
            for name, option in options.items():
                default = "" if option.default is None else f" (default: {option.default})"
                group.add_argument(f"--{name}", metavar=option.type, help=f"{option.help}{default}".replace("%", "%%"))
    return parser.format_help()


def options_of(entry: type | str) -> dict[str, dict[str, Option]]:
    """Class name -> flag -> `Option`, the most derived class first; an inherited flag that is redefined shows once.

    Args:
        entry: a dataclass, or the name of a public class of hfdistill, which is then read but not imported.
    """
    return _read_class(entry, hfdistill.module_of(entry)) if isinstance(entry, str) else _inspect_class(entry)


def _inspect_class(dataclass: type) -> dict[str, dict[str, Option]]:
    groups: dict[str, dict[str, Option]] = {}
    seen: set[str] = set()
    fields = {field.name: field for field in dataclasses.fields(dataclass) if field.init}
    for owner in dataclass.__mro__:
        annotations = inspect.get_annotations(owner)  # not `field.type`, which HfArgumentParser overwrites
        own = {name: _option(fields[name], hint) for name, hint in annotations.items() if name in fields and name not in seen}
        seen.update(own)
        if own:
            groups[owner.__name__] = own
    return groups


def _option(field: dataclasses.Field, hint: Any) -> Option:
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    default = None if field.default is dataclasses.MISSING else field.default
    return Option(_short(text), default, str(field.metadata.get("help", "")))


def _read_class(name: str, module: str, seen: frozenset[str] = frozenset()) -> dict[str, dict[str, Option]]:
    body = {node.name: node for node in ast.parse(_source(module)).body if isinstance(node, ast.ClassDef)}
    options = {}
    for node in body[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id not in seen:
            if not _is_init_false(node.value):
                options[node.target.id] = _read_option(node)
    groups = {name: options}
    for base in body[name].bases:
        home = module if ast.unparse(base) in body else OUTSIDE_BASES.get(ast.unparse(base))
        if home:
            groups.update(_read_class(ast.unparse(base), home, seen | options.keys()))
    return groups


def _source(module: str) -> str:
    package, _, rest = module.partition(".")
    folder = find_spec(package).submodule_search_locations[0]  # of the top package, which this does not import
    with open(os.path.join(folder, *rest.split(".")) + ".py", encoding="utf-8") as file:
        return file.read()


def _read_option(node: ast.AnnAssign) -> Option:
    """Reads `name: type = value`, `... = field(default=value, metadata={"help": text})` and `... = helper(value, text)`."""
    default, text = node.value, None
    if isinstance(node.value, ast.Call):
        keywords = {keyword.arg: keyword.value for keyword in node.value.keywords}
        positional = [*node.value.args, None, None]
        default, text = keywords.get("default", positional[0]), positional[1]
        if isinstance(keywords.get("metadata"), ast.Dict):
            entries = {_literal(key): value for key, value in zip(keywords["metadata"].keys, keywords["metadata"].values)}
            text = entries.get("help")
    return Option(_short(ast.unparse(node.annotation)), _literal(default), str(_literal(text) or ""))


def _is_init_false(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and any(k.arg == "init" and _literal(k.value) is False for k in value.keywords)


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:  # an expression: its value is unknown without importing
        return None


def _short(annotation: str) -> str:
    return " | ".join(part for part in annotation.split(" | ") if part != "None")
