"""Extractive question answering on every machine: what does this documentation say about a function or class?"""

from __future__ import annotations

import ast
import os
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .readers import SENTENCE_END
from .stdlib_docs import parse_source, plain_text, source_files


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


QUESTIONS = {
    "return": "What does {} return?",
    "error": "When does {} raise an error?",
    "default": "What is the default of {}?",
    "case": "What happens in a special case of {}?",
}
MIN_SENTENCES, MAX_SENTENCES, MAX_CONTEXT_WORDS = 2, 8, 90
MIN_WORDS, MAX_WORDS = 3, 30

_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# What gives away that a sentence answers a question.
_ANSWERS = {
    "return": re.compile(r"(Return|Returns|Yield|Yields)\b|.*\b(returns|is returned|are returned)\b"),
    "error": re.compile(r".*\b[Rr]aise[sd]?\b"),
    "default": re.compile(r".*\b[Dd]efault(s|ing)?\b"),
    "case": re.compile(r"(If|When)\b"),
}


def load_stdlib_questions(root: str | os.PathLike | None = None) -> Dataset:
    """Questions about the functions and classes of the standard library, answered by a sentence of their documentation.

    A context is what is left of a documentation string without sentences of fewer than 3 or more than 30 words, where that is 2 to 8
    sentences and at most 90 words. It is asked what the thing returns, when it raises an error, what its
    default is, and what happens in a special case, where exactly one sentence says so by its words (`Return ...`, `... raises ...`,
    `... default ...`, `If ...`). Sources are parsed, never imported; texts that stand twice in the library are used once.

    The questions are made by rules, and whoever knows the rules answers all of them. A model is shown examples only, and must find both
    ends of a sentence and what kind of sentence is asked for.

    Rows depend on the version of Python: quote a fingerprint of them beside every result.

    Args:
        root (`str`, *optional*): the folder that holds the sources. Default: the standard library of this Python.

    Returns:
        `datasets.Dataset`: `id` (`module.name.kind`), `title` (the module), `context`, `question` and `answers`, the columns of SQuAD.

    Raises:
        ValueError: when there are no sources, as in zipped or embedded distributions of Python.
    """
    return _dataset([row for rows in _rows_by_module(root).values() for row in rows])


def load_stdlib_questions_splits(
    few: int = 100, seed: int = 0, test_size: float = 0.2, root: str | os.PathLike | None = None, hide_answers: bool = True
) -> DatasetDict:
    """[`load_stdlib_questions`] as a label-scarce task: questions with answers, others without, and a test part.

    Cut by module: no documentation of one part is about the module of another. Near-copies are not grouped: `posixpath` and `ntpath`,
    say, may fall on both sides. Outside the test part one half (A) is the teacher's;
    the student has `few` of its answers, and the questions of the other half (B) without answers.

    Args:
        few (`int`, defaults to 100): how many questions the student knows the answer to.
        seed (`int`, defaults to 0): of the cuts.
        test_size (`float`, defaults to 0.2): share of the test part.
        root (`str`, *optional*): as in [`load_stdlib_questions`].
        hide_answers (`bool`, defaults to `True`): `False` leaves the answers of B where they are, for comparison runs.

    Returns:
        `datasets.DatasetDict`: `teacher` (A), `few` (rows of A), `transfer` (B, `answers` is `None`) and `test`.

    Raises:
        ValueError: when `few` does not fit into A, and as [`load_stdlib_questions`] does.
    """
    from datasets import DatasetDict

    draw = random.Random(f"{seed} modules")
    modules = list(_rows_by_module(root).values())
    draw.shuffle(modules)
    test, train = _cut(modules, test_size)
    teacher, transfer = ([row for rows in part for row in rows] for part in _cut(train, 0.5))
    if not 1 <= few <= len(teacher):
        raise ValueError(f"few={few} answers cannot be drawn from the teacher's {len(teacher)}. Choose few between 1 and that.")
    return DatasetDict(
        teacher=_dataset(teacher),
        few=_dataset(draw.sample(teacher, few)),
        transfer=_dataset([{**row, "answers": None} for row in transfer] if hide_answers else transfer),
        test=_dataset([row for rows in test for row in rows]),
    )


def words_of(name: str) -> str:
    """An identifier in words.

    Example:
        >>> words_of("_getNowait_v2"), words_of("HTTPServer"), words_of("posixpath")
        ('get nowait v2', 'http server', 'posixpath')
    """
    return " ".join(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+", " ", name).lower().split())


def sentences_in(documentation: str) -> list[str]:
    """The sentences of a documentation string, each on one line; those of fewer than 3 or more than 30 words are left out.

    Example:
        >>> sentences_in("Return x.real, e.g. 1.5\\nor so.  Else fail.\\n\\nRaise an error (see below).")
        ['Return x.real, e.g. 1.5 or so.', 'Raise an error (see below).']
    """
    paragraphs = (plain_text(paragraph) for paragraph in re.split(r"\n\s*\n", documentation.strip()))
    sentences = (sentence for paragraph in paragraphs for sentence in SENTENCE_END.split(paragraph))
    return [sentence for sentence in sentences if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS]


def answers_in(sentences: list[str]) -> dict[str, str]:
    """Kind of question -> the one sentence that answers it."""
    found = {kind: [sentence for sentence in sentences if pattern.match(sentence)] for kind, pattern in _ANSWERS.items()}
    return {kind: own[0] for kind, own in found.items() if len(own) == 1}


def _rows_by_module(root: str | os.PathLike | None) -> dict[str, list[dict[str, Any]]]:
    root = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    modules = {}
    for path, _ in source_files(root):
        name = path.relative_to(root).with_suffix("").as_posix().removesuffix("/__init__").replace("/", ".")
        rows = [row for owner, body in _definitions(name, parse_source(path).body) for row in _rows(name, owner, body, seen)]
        if rows:  # a name that is defined twice (a property and its setter) would give one id twice
            modules[name] = list({row["id"]: row for row in rows}.values())
    if not modules:
        raise ValueError(
            f"No documentation of the standard library in {root}: its .py sources are not there (zipped, embedded or stripped Python), "
            "so the embedded questions cannot be built. Use a Python installed with its sources, or bring data of your own (--train_file)."
        )
    return modules


def _definitions(owner: str, body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Dotted name and node of what is defined directly in a module, class or function; names that begin with `__` are left out."""
    for node in body:
        if isinstance(node, _DOCUMENTED) and not node.name.startswith("__"):
            yield f"{owner}.{node.name}", node
            yield from _definitions(f"{owner}.{node.name}", node.body)


def _rows(module: str, name: str, node: ast.stmt, seen: set[str]) -> Iterator[dict[str, Any]]:
    sentences = sentences_in(ast.get_docstring(node) or "")
    context = " ".join(sentences)
    key = re.sub(r"\W+", " ", context.lower())
    if not MIN_SENTENCES <= len(sentences) <= MAX_SENTENCES or len(context.split()) > MAX_CONTEXT_WORDS or key in seen:
        return
    seen.add(key)
    for kind, answer in answers_in(sentences).items():
        if context.count(answer) == 1:
            yield {
                "id": f"{name}.{kind}",
                "title": module,
                "context": context,
                "question": QUESTIONS[kind].format(words_of(name.rpartition(".")[2])),
                "answers": {"text": [answer], "answer_start": [context.index(answer)]},
            }


def _cut(modules: list[list[dict[str, Any]]], share: float) -> tuple[list[list[dict[str, Any]]], list[list[dict[str, Any]]]]:
    """The first modules, with `share` of all rows (or a little more), and the others."""
    wanted, count = share * sum(len(rows) for rows in modules), 0
    for number, rows in enumerate(modules):
        if count >= wanted:
            return modules[:number], modules[number:]
        count += len(rows)
    return modules, []


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset, Features, List, Value

    answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    columns = {name: Value("string") for name in ("id", "title", "context", "question")}
    return Dataset.from_list(rows, features=Features({**columns, "answers": answers}))
