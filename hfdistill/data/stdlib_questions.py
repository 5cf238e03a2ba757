"""Extractive question answering on every machine: what does this member of a class or module do, says its documentation."""

from __future__ import annotations

import ast
import os
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .stdlib_docs import parse_source, plain_text, source_files


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


MIN_MEMBERS, USUAL_MEMBERS = 4, 5
MIN_WORDS, MAX_WORDS = 3, 14

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_FIRST_SENTENCE = re.compile(r"(.+?[.!?])(?=\s+[A-Z`'\"(\[]|$)")


@dataclass(frozen=True)
class Member:
    """A documented function, method or class, the name of it in words, and the first sentence of its documentation."""

    words: str
    summary: str
    is_class: bool


@dataclass(frozen=True)
class Owner:
    """A class or module with at least four documented members."""

    path: str
    name: str
    members: tuple[Member, ...]

    @property
    def words(self) -> str:
        return words_of(self.name.rpartition(".")[2])


def load_stdlib_questions(seed: int = 0, rounds: int = 1, root: str | os.PathLike | None = None) -> Dataset:
    """Questions about the members of classes and modules of the standard library, answered by their documentation.

    A context is the first sentences of the documentation of 4 to 7 members of one class or module, in random order; each of
    the members is asked for by its name in words (`What does limit denominator of fraction do?`), and its sentence is the
    answer. Sources are parsed, never imported. Sentences of fewer than 3 or more than 14 words and dunder names are left out,
    of sentences that differ only in case or punctuation the first one of the whole library is kept, and what is left must
    stand in its context once.

    Many a name shares a word with its sentence and none with the others, so that counting common words answers a part of the
    questions: a model has to be better than `hfdistill.data.readers.word_overlap` to have learnt more than that.

    Rows depend on the version of Python: quote a fingerprint of them beside every result.

    Args:
        seed (`int`, defaults to 0): of the order of sentences.
        rounds (`int`, defaults to 1): how often every member is asked for, each time in another context.
        root (`str`, *optional*): the folder that holds the sources. Default: the standard library of this Python.

    Returns:
        `datasets.Dataset`: `id`, `title` (the class or module), `context`, `question` and `answers`, the columns of SQuAD.

    Raises:
        ValueError: when there are no sources, as in zipped or embedded distributions of Python.
    """
    return _dataset([row for owner in stdlib_owners(root) for row in _rows(owner, seed, rounds)])


def load_stdlib_questions_splits(
    few: int = 300,
    seed: int = 0,
    test_size: float = 0.2,
    rounds: int = 1,
    root: str | os.PathLike | None = None,
    hide_answers: bool = True,
) -> DatasetDict:
    """[`load_stdlib_questions`] as a label-scarce task: questions with answers, others without, and a test part.

    Cut by class and module: no context of one part holds a sentence of another. Outside the test part one half (A) is the
    teacher's; the student has `few` of its answers, and the questions of the other half (B) without answers.

    Args:
        few (`int`, defaults to 300): how many questions the student knows the answer to, in all contexts that they are asked in.
        seed (`int`, defaults to 0): of the cuts and of the order of sentences.
        test_size (`float`, defaults to 0.2): share of the test part.
        rounds (`int`, defaults to 1): contexts of every question outside the test part, which has one.
        root (`str`, *optional*): as in [`load_stdlib_questions`].
        hide_answers (`bool`, defaults to `True`): `False` leaves the answers of B where they are, for comparison runs.

    Returns:
        `datasets.DatasetDict`: `teacher` (A), `few` (rows of A), `transfer` (B, `answers` is `None`) and `test`.

    Raises:
        ValueError: when `few` does not fit into A, and as [`load_stdlib_questions`] does.
    """
    from datasets import DatasetDict

    draw = random.Random(f"{seed} owners")
    owners = stdlib_owners(root)
    draw.shuffle(owners)
    test, train = _cut(owners, test_size)
    teacher, transfer = _cut(train, 0.5)
    rows = {name: [row for owner in part for row in _rows(owner, seed, rounds)] for name, part in (("A", teacher), ("B", transfer))}
    asked = list(dict.fromkeys(_member_of(row) for row in rows["A"]))
    if not 1 <= few <= len(asked):
        raise ValueError(f"few={few} answers cannot be drawn from the teacher's {len(asked)}. Choose few between 1 and that.")
    known = set(draw.sample(asked, few))
    return DatasetDict(
        teacher=_dataset(rows["A"]),
        few=_dataset([row for row in rows["A"] if _member_of(row) in known]),
        transfer=_dataset([{**row, "answers": None} for row in rows["B"]] if hide_answers else rows["B"]),
        test=_dataset([row for owner in test for row in _rows(owner, seed, 1)]),
    )


def stdlib_owners(root: str | os.PathLike | None = None) -> list[Owner]:
    """The classes and modules of the standard library that document at least four members, in the order of the files."""
    root = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    owners = []
    for path, _ in source_files(root):
        name = path.relative_to(root).with_suffix("").as_posix().removesuffix("/__init__").replace("/", ".")
        for owner, body in _bodies(name, parse_source(path).body):
            members = tuple(_members(body, seen))
            if len(members) >= MIN_MEMBERS:
                owners.append(Owner(name, owner, members))
    if not owners:
        raise ValueError(
            f"No documentation of the standard library in {root}: its .py sources are not there (zipped, embedded or stripped Python), "
            "so the embedded questions cannot be built. Use a Python installed with its sources, or bring data of your own (--train_file)."
        )
    return owners


def words_of(name: str) -> str:
    """An identifier in words.

    Example:
        >>> words_of("_getNowait_v2"), words_of("HTTPServer"), words_of("posixpath")
        ('get nowait v2', 'http server', 'posixpath')
    """
    return " ".join(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+", " ", name).lower().split())


def first_sentence(documentation: str) -> str:
    """The first sentence of the first paragraph, on one line, with a full stop.

    Example:
        >>> first_sentence("Return x.real, e.g. 1.5\\nor so.  Else fail.\\n\\nMore.")
        'Return x.real, e.g. 1.5 or so.'
    """
    text = plain_text(re.split(r"\n\s*\n", documentation.strip())[0])
    found = _FIRST_SENTENCE.match(text)
    text = found.group(1) if found else text
    return text if not text or text[-1] in ".!?" else text.rstrip(" :;,") + "."


def _bodies(name: str, body: list[ast.stmt]) -> Iterator[tuple[str, list[ast.stmt]]]:
    """A module and its classes, with what stands directly in them."""
    yield name, body
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _bodies(f"{name}.{node.name}", node.body)


def _members(body: list[ast.stmt], seen: set[str]) -> Iterator[Member]:
    names = set()
    for node in body:
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)) or node.name.startswith("__"):
            continue
        words, summary = words_of(node.name), first_sentence(ast.get_docstring(node) or "")
        key = re.sub(r"\W+", " ", summary.lower()).strip()
        if words and words not in names and key not in seen and MIN_WORDS <= len(summary.split()) <= MAX_WORDS:
            names.add(words)
            seen.add(key)
            yield Member(words, summary, isinstance(node, ast.ClassDef))


def _rows(owner: Owner, seed: int, rounds: int) -> Iterator[dict[str, Any]]:
    for turn in range(rounds):
        draw = random.Random(f"{seed} {turn} {owner.path} {owner.name}")
        members = list(owner.members)
        draw.shuffle(members)
        groups = max(round(len(members) / USUAL_MEMBERS), 1)
        for group in range(groups):
            together = members[group * len(members) // groups : (group + 1) * len(members) // groups]
            context = " ".join(member.summary for member in together)
            for member in together:
                if context.count(member.summary) == 1:
                    yield {
                        "id": f"{owner.name}.{member.words.replace(' ', '_')}#{turn}",
                        "title": owner.name,
                        "context": context,
                        "question": _question(member, owner),
                        "answers": {"text": [member.summary], "answer_start": [context.index(member.summary)]},
                    }


def _question(member: Member, owner: Owner) -> str:
    return f"What is {member.words} in {owner.words}?" if member.is_class else f"What does {member.words} of {owner.words} do?"


def _member_of(row: dict[str, Any]) -> str:
    """Who is asked for, whatever the context."""
    return row["id"].rpartition("#")[0]


def _cut(owners: list[Owner], share: float) -> tuple[list[Owner], list[Owner]]:
    """The first owners, with `share` of all members (or a little more), and the others."""
    wanted, count = share * sum(len(owner.members) for owner in owners), 0
    for number, owner in enumerate(owners):
        if count >= wanted:
            return owners[:number], owners[number:]
        count += len(owner.members)
    return owners, []


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset, Features, List, Value

    answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    columns = {name: Value("string") for name in ("id", "title", "context", "question")}
    return Dataset.from_list(rows, features=Features({**columns, "answers": answers}))
