"""docs6: real English text on every machine, the documentation strings of Python's own standard library."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


STDLIB_AREAS = {
    "concurrency": "asyncio threading multiprocessing concurrent subprocess sched queue contextvars _threading_local _weakrefset",
    "data formats": (
        "json csv xml html pickle zipfile tarfile gzip bz2 lzma plistlib configparser base64 shelve dbm sqlite3 codecs struct quopri"
    ),
    "files and processes": (
        "os pathlib shutil tempfile glob fnmatch io _pyio posixpath ntpath genericpath argparse optparse getopt logging getpass ctypes "
        "platform locale gettext fileinput filecmp linecache cmd shlex signal stat"
    ),
    "language tools": (
        "ast inspect dis tokenize importlib typing unittest doctest pdb bdb traceback types abc contextlib dataclasses pydoc trace "
        "pickletools warnings code codeop pkgutil runpy modulefinder symtable timeit cProfile profile pstats tracemalloc zipimport site "
        "sysconfig compileall py_compile pyclbr keyword token opcode"
    ),
    "network": (
        "email http urllib socket ssl smtplib imaplib poplib ftplib xmlrpc ipaddress mailbox socketserver wsgiref selectors uuid "
        "webbrowser mimetypes"
    ),
    "numbers and containers": (
        "decimal _pydecimal fractions statistics random functools operator heapq hashlib hmac secrets numbers datetime _pydatetime "
        "_strptime calendar collections _collections_abc bisect zoneinfo graphlib enum copy reprlib pprint textwrap difflib string re "
        "weakref"
    ),
}
"""Area -> its top-level modules. The position of an area (they are sorted by name) is its label."""

AREA_NAMES = tuple(sorted(STDLIB_AREAS))
UNLABELLED = -100
MIN_WORDS, MIN_PARAGRAPH_WORDS = 8, 10

_LABELS = {module: label for label, area in enumerate(AREA_NAMES) for module in STDLIB_AREAS[area].split()}
_SKIPPED_FOLDERS = frozenset("site-packages dist-packages test tests __pycache__ lib-dynload _vendor idlelib tkinter turtledemo".split())
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def load_stdlib_docs(root: str | os.PathLike | None = None, mask_module: bool = True) -> Dataset:
    """Documentation strings of the standard library, labelled with the area they are about.

    The question is: which of six areas is this documentation about? Sources are parsed, never imported. Rulers are
    removed, white space is collapsed, the module's own name becomes the word `module` (it would give the label away),
    texts of fewer than 8 words are dropped, and of texts that differ only in case or punctuation the first is kept.
    Near-duplicates are *not* grouped: about 7 % of the rows have a neighbour that is almost the same text, so an
    accuracy on a random split is somewhat flattering.

    Rows depend on the version of Python (4,382 in 3.11.7): quote [`stdlib_docs_fingerprint`] beside every result.

    Args:
        root (`str`, *optional*): the folder that holds the sources. Default: the standard library of this Python.
        mask_module (`bool`, defaults to `True`): whether the module's own name is masked; `False` is for language models.

    Returns:
        `datasets.Dataset`: columns `text`, `label` (`ClassLabel` with the six area names) and `module` (top-level
        module), always in the same order.

    Raises:
        ValueError: when there are no sources, as in zipped or embedded distributions of Python.
    """
    from datasets import ClassLabel, Dataset, Features, Value
    from tqdm.auto import tqdm

    root = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    rows, seen = [], set()
    # On a terminal only: the bar is for whoever waits, and parsing takes seconds.
    for path, module in tqdm(list(source_files(root)), desc="Reading the standard library", leave=False, disable=None):
        for text in _documentation(path, module if mask_module else None):
            key = re.sub(r"\W+", " ", text.lower())
            if len(text.split()) >= MIN_WORDS and key not in seen:
                seen.add(key)
                rows.append({"text": text, "label": _LABELS[module], "module": module})
    if not rows:
        raise ValueError(
            f"No documentation of the standard library in {root}: its .py sources are not there (zipped, embedded or stripped Python), "
            "so the embedded text task cannot be built. Use a Python installed with its sources, or bring data of your own (--train_file)."
        )
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(AREA_NAMES)), "module": Value("string")})
    return Dataset.from_list(rows, features=features)


def load_stdlib_docs_splits(
    few: int = 300, seed: int = 0, test_size: float = 0.2, root: str | os.PathLike | None = None, hide_labels: bool = True
) -> DatasetDict:
    """docs6 as a label-scarce task: a labelled half, another half without labels, and a test part nobody trains on.

    The documents outside the test part are halved into A and B. The teacher learns from A with its labels; the student
    has the labels of `few` rows of A and the unlabelled text of B, which its teacher has never seen. Every cut is
    stratified by area. Near-duplicates are not grouped, so they may lie on both sides of a cut.

    Args:
        few (`int`, defaults to 300): how many labelled rows the student gets.
        seed (`int`, defaults to 0): of all three cuts.
        test_size (`float`, defaults to 0.2): share of the test part.
        root (`str`, *optional*): as in [`load_stdlib_docs`].
        hide_labels (`bool`, defaults to `True`): `False` leaves the labels of B where they are, for comparison runs.

    Returns:
        `datasets.DatasetDict`: `teacher` (A), `few` (rows of A), `transfer` (B, every label -100) and `test`.

    Raises:
        ValueError: when `few` is smaller than the number of areas or does not fit into A, and as [`load_stdlib_docs`] does.
    """
    import pyarrow as pa
    from datasets import Dataset, DatasetDict
    from sklearn.model_selection import train_test_split

    data = load_stdlib_docs(root)
    labels = data["label"][:]

    def cut(rows: list[int], **size) -> tuple[list[int], list[int]]:
        return train_test_split(rows, stratify=[labels[row] for row in rows], random_state=seed, **size)

    train, test = cut(list(range(len(data))), test_size=test_size)
    teacher, transfer = cut(train, test_size=0.5)
    areas = len(AREA_NAMES)
    if not areas <= few <= len(teacher) - areas:
        raise ValueError(
            f"few={few} labelled rows cannot be drawn from the teacher's {len(teacher)} so that every one of the {areas} areas occurs on "
            f"both sides. Choose few between {areas} and {len(teacher) - areas}."
        )
    rows = {"teacher": teacher, "few": cut(teacher, train_size=few)[0], "transfer": transfer, "test": test}
    splits = DatasetDict({name: data.select(indices) for name, indices in rows.items()})
    if not hide_labels:
        return splits
    # datasets refuses a ClassLabel outside its range when it encodes Python values, but not in an Arrow column. All four
    # splits keep the same features that way, so that `concatenate_datasets([few, transfer])` works.
    table = splits["transfer"].with_format("arrow")[:]
    hidden = pa.array([UNLABELLED] * len(transfer), pa.int64())
    splits["transfer"] = Dataset(table.set_column(table.column_names.index("label"), table.schema.field("label"), hidden))
    return splits


def stdlib_docs_fingerprint(dataset: Dataset) -> str:
    """sha256 of the texts and labels of a dataset, in their order: equal fingerprints mean equal data.

    Example:
        >>> from datasets import Dataset
        >>> stdlib_docs_fingerprint(Dataset.from_dict({"text": ["Return the sum."], "label": [5]}))[:12]
        '7bf938b96944'
    """
    digest = hashlib.sha256()
    for text, label in zip(dataset["text"], dataset["label"], strict=True):
        digest.update(json.dumps([text, label]).encode() + b"\n")
    return digest.hexdigest()


def load_topics_paragraphs() -> list[str]:
    """Paragraphs of Python's language reference as `help()` shows it: unlabelled text for tokenizers and language models.

    Split at blank lines, white space collapsed, at least 10 words, exact duplicates dropped (1,363 in Python 3.11.7).

    Raises:
        ValueError: when this Python has no `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "This Python has no pydoc_data.topics, the text behind help(), so there is no text to train a tokenizer on. Use a Python "
            "installed with its whole standard library, or text of your own."
        ) from None
    return topic_paragraphs(topics)


def topic_paragraphs(topics: dict[str, str]) -> list[str]:
    """The paragraphs of some topics, in the order of their names; see [`load_topics_paragraphs`]."""
    texts = (" ".join(part.split()) for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name]))
    return list(dict.fromkeys(text for text in texts if len(text.split()) >= MIN_PARAGRAPH_WORDS))


def source_files(root: Path) -> Iterator[tuple[Path, str]]:
    """The sources of the modules of `STDLIB_AREAS` with their top-level module, tests left out, in a fixed order."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith("config-"))
        for name in sorted(files):
            path = Path(folder, name)
            module = path.relative_to(root).parts[0].removesuffix(".py")
            if name.endswith(".py") and module in _LABELS:
                yield path, module


def parse_source(path: Path) -> ast.Module:
    """The syntax tree of one file; an empty one where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's source
            return ast.parse(path.read_bytes().decode("utf-8", errors="replace"))
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def plain_text(text: str) -> str:
    """`text` without rulers, on one line."""
    return " ".join(re.sub(r"[=\-~^*]{4,}", " ", text).split())


def _documentation(path: Path, masked: str | None) -> Iterator[str]:
    """Cleaned documentation strings of one file."""
    for node in ast.walk(parse_source(path)):
        text = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        if not text:
            continue
        text = plain_text(text)
        if masked is not None:
            text = re.sub(rf"\b{re.escape(masked.lstrip('_'))}\b", "module", text, flags=re.IGNORECASE)
        yield text


def label_counts(dataset: Dataset) -> dict[str, int]:
    """Rows per area, in label order; rows without a label are left out."""
    counts = Counter(dataset["label"])
    return {name: counts[label] for label, name in enumerate(AREA_NAMES)}
